"""What tensors take at any time, on a CPU, where PyTorch keeps no count of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class MemoryMeter(TorchDispatchMode):
    """Bytes of the storages that operations inside it make, and that are still alive; each is counted once.

    What autograd saves counts, and so does what a hook keeps. What an operation asks for and frees before it returns (the
    packed operands of a matrix product) does not.

    Args:
        known: tensors from before that count, too.

    Attributes:
        current: bytes alive now.
        peak: most bytes that were alive at once since the last `restart`.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._watch(known)

    def restart(self) -> None:
        """Lets the peak begin anew."""
        self.peak = self.current

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # Of a tensor from before, a view or the result of an operation in place takes nothing; torch.tensor's is a new one.
        given = () if func is torch.ops.aten.lift_fresh.default else tree_iter((args, kwargs))
        old = {id(x.untyped_storage()) for x in given if isinstance(x, Tensor)} - self._sizes.keys()
        result = func(*args, **kwargs)
        self._watch(x for x in tree_iter(result) if isinstance(x, Tensor) and id(x.untyped_storage()) not in old)
        return result

    def _watch(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            number, size = id(storage), storage.nbytes()  # one object and number as long as anything holds the storage
            if number not in self._sizes:
                weakref.finalize(storage, self._forget, number)
            self.current += size - self._sizes.get(number, 0)
            self._sizes[number] = size  # an operation may have made it larger
        self.peak = max(self.peak, self.current)

    def _forget(self, number: int) -> None:
        self.current -= self._sizes.pop(number)
