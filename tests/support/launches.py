"""Counts what a step launches, and forbids what would make the host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from typing_extensions import Self

from kfac_triton.curvature.async_flags import AsyncFlags
from kfac_triton.kernels import device_tables
from kfac_triton.kernels.operators import OPERATORS
from kfac_triton.kernels.runtime import triton

# Operators whose result, or whose shape, the host must know before it goes on.
WAITING = ("_local_scalar_dense", "nonzero", "item", "equal", "masked_select", "unique", "is_nonzero")
READING = ("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__")
TABLES = device_tables._copies
VIEWS = ("view", "slice", "select", "expand", "unsqueeze", "squeeze", "transpose", "t", "permute", "alias", "detach", "split")


@contextmanager
def counted_launches(run: bool = False) -> Iterator[Counter[str]]:
    """Kernel launches by name; the kernels themselves run only on request."""
    counts: Counter[str] = Counter()
    kind = type(triton.jit(lambda: None))
    original = kind.run

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] += 1
        return original(self, *args, **kwargs) if run else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "run", launch)
        yield counts


class CountedOperators(TorchDispatchMode):
    """Calls of torch operators that compute something, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if func.namespace == "kfac_triton":  # not what it is called, but what it does
            with self:
                return OPERATORS[name].run(name, *args, **(kwargs or {}))
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def _tensors(values: Any) -> list[Tensor]:
    """Indices among the arguments of an indexing operator: the tensors in its list."""
    return [x for value in values if isinstance(value, (list, tuple)) for x in value if isinstance(x, Tensor)]


class NobodyWaits(TorchDispatchMode):
    """Raises on an operator that waits for the device, or copies from it to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        has_mask = name.startswith("index") and any(x.dtype == torch.bool for x in _tensors(args))
        if name in WAITING or has_mask:
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class CountedWaits(TorchDispatchMode):
    """Counts what would make the host wait for a GPU, by name: operators, tensors that are read whole or made of numbers.

    Attributes:
        counts: of waits, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self._patch = pytest.MonkeyPatch()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name in (*WAITING, "lift_fresh") or (
            name.startswith("index") and any(x.dtype == torch.bool for x in _tensors(args))
        ):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> Self:
        for name in ("tolist", "numpy", "cpu"):  # which no operator of a CPU tells
            self._patch.setattr(Tensor, name, self._counting(name, getattr(Tensor, name)))
        self._patch.setattr(device_tables, "_copies", self._copies)
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._patch.undo()

    def _counting(self, name: str, original: Any) -> Any:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.counts[name] += 1
            return original(tensor, *args, **kwargs)

        return read

    def _copies(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        """A table in pinned memory is made of numbers, too, but its copy makes nobody wait."""
        with _disable_current_modes():
            return TABLES(*arguments)


@contextmanager
def nobody_waits() -> Iterator[None]:
    """Inside, no operator waits and no Python number is read from a tensor, but for flags that arrived by themselves."""
    arrived = AsyncFlags.arrived

    def refuse(name: str) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"Tensor.{name} reads from the device")

        return read

    with pytest.MonkeyPatch.context() as patch, NobodyWaits():
        originals = {name: getattr(torch.Tensor, name) for name in READING}

        def arrived_allowed(flags: AsyncFlags) -> list[int]:
            with pytest.MonkeyPatch.context() as inner:
                for name, original in originals.items():
                    inner.setattr(torch.Tensor, name, original)
                return arrived(flags)

        for name in READING:
            patch.setattr(torch.Tensor, name, refuse(name))
        patch.setattr(AsyncFlags, "arrived", arrived_allowed)
        yield
