"""Flags that travel from the device to the host without the host waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import runtime


class AsyncFlags:
    """Flags that a device computed, for the host to read when they have arrived.

    While a CUDA graph is recorded, the host reads no flags, since its decision would be recorded. It can read the flags of
    replays afterwards.

    Args:
        count: number of flags.
        device: the device that computes them.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.bool, device="cpu", pin_memory=self._is_gpu)
        self._arrival = torch.cuda.Event() if self._is_gpu else None
        self._sent = self._is_recorded = False

    def copy_to_host(self, flags: Tensor) -> None:
        """Starts a copy to the host, which overwrites earlier flags."""
        self._host.copy_(flags, non_blocking=True)
        self._is_recorded = runtime.is_recording()
        if self._arrival is not None and not self._is_recorded:
            self._arrival.record()
        self._sent = True

    def arrived(self) -> list[int]:
        """Indices of the flags that are set, once for each copy; empty before they arrive, and while a graph is recorded."""
        if not self._sent or runtime.is_recording():
            return []
        # A replay records no event, but the flags of any replay will do.
        if self._arrival is not None and not self._is_recorded and not self._arrival.query():
            return []
        self._sent = False
        return [i for i, flag in enumerate(self._host.tolist()) if flag]

    def is_any_set(self) -> bool:
        """Whether the last copy, as far as it has arrived, has a flag that is set; without a wait, also of replays."""
        return bool(self._host.any())
