"""Tables of numbers and addresses that kernels read from device memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import runtime

_KEPT = 256  # cached tables; a training loop repeats a handful
_RECORDED: list[tuple[Tensor, Tensor]] = []  # tables that CUDA graphs read, with their pinned copies


class Table(tuple[Any, ...]):
    """The numbers of a table that is looked up again and again: its hash is computed once."""

    _hash: int

    def __hash__(self) -> int:
        try:
            return self._hash
        except AttributeError:
            self._hash = tuple.__hash__(self)
            return self._hash


@functools.lru_cache(maxsize=_KEPT)
def _copies(rows: tuple[Any, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    host = torch.tensor(rows, dtype=dtype, device="cpu")
    if device.type != "cpu":
        host = host.pin_memory()
    return host.to(device, non_blocking=True), host


def device_table(rows: tuple[Any, ...], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A table on the device, copied there without a wait and remembered. Rows are tuples of numbers, or numbers.

    A CUDA graph copies it at every replay. A table made during a capture is therefore kept for good with its pinned copy, and
    is not shared: another caller might read it before the first replay has filled it.
    """
    if not runtime.is_recording():
        return _copies(rows, device, dtype)[0]
    _RECORDED.append(_copies.__wrapped__(rows, device, dtype))
    return _RECORDED[-1][0]


def device_vector(values: Iterable[float], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A vector on the device; see `device_table`."""
    return device_table((tuple(values),), device, dtype)[0]
