"""Answers from a device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import runtime


class AsyncFlags:
    """Flags that a device computed, read by the host without waiting: those of the last `send` that has arrived.

    In a CUDA graph the host asks for none: what it decided would be recorded. It may read those of the replays after them.

    Args:
        count: number of flags.
        device: where they are computed.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._is_gpu = device.type == "cuda"
        self._host = torch.zeros(count, dtype=torch.bool, pin_memory=self._is_gpu)
        self._arrival = torch.cuda.Event() if self._is_gpu else None
        self._sent = self._is_recorded = False

    def send(self, flags: Tensor) -> None:
        """Starts a copy to the host; it overwrites what came before."""
        self._host.copy_(flags, non_blocking=True)
        self._is_recorded = runtime.is_recording()
        if self._arrival is not None and not self._is_recorded:
            self._arrival.record()
        self._sent = True

    def receive(self) -> list[int]:
        """Indices of the flags that are set, each answer once; empty while none has arrived, and in a CUDA graph."""
        if not self._sent or runtime.is_recording():
            return []
        # Of replays no event tells; flags of any of them are as good.
        if self._arrival is not None and not self._is_recorded and not self._arrival.query():
            return []
        self._sent = False
        return [i for i, flag in enumerate(self._host.tolist()) if flag]
