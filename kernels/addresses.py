"""Tables of numbers and addresses that kernels read from device memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_KEPT = 256  # tables remembered; a training loop repeats a handful


@functools.lru_cache(maxsize=_KEPT)
def _copies(rows: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    host = torch.tensor(rows, dtype=dtype)
    if device.type != "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True), host


def device_table(rows: tuple[tuple[float, ...], ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A table on the device, copied there without a wait and remembered.

    Its pinned host copy lives as long: a captured CUDA graph reads it again at every replay.
    """
    return _copies(rows, device, dtype)[0]
