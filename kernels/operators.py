"""Registration of the operators with PyTorch, and the choice between their implementations.

Through `torch.library.Library.define` and `impl` (2 us a call; `custom_op` costs 26).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import runtime

Function = TypeVar("Function", bound=Callable[..., None])

# The registrations live as long as this object does.
LIBRARY = torch.library.Library("kfac_triton", "DEF")
OPERATORS: dict[str, Operator] = {}


@dataclass(frozen=True)
class Operator:
    """The implementations of an operator, which take the same arguments.

    Attributes:
        reference: in plain PyTorch.
        launch: of the Triton kernel.
        can_use: why the kernel cannot serve a call; None if it can.
        library: the reference with other settings of the library that multiplies matrices.
        prefers_library: whether backend="auto" uses the library on a device.
    """

    reference: Callable[..., None]
    launch: Callable[..., None]
    can_use: Callable[..., str | None]
    library: Callable[..., None] | None = None
    prefers_library: Callable[[torch.device], bool] = lambda device: False

    def run(self, name: str, first: Tensor | list[Tensor], *rest: Any, backend: str = "auto") -> None:
        """Runs one of the implementations.

        Raises:
            ValueError: if backend is unknown, or "triton" and the kernel cannot serve.
        """
        example = first if isinstance(first, Tensor) else first[0] if first else None
        if example is not None:
            if backend == "auto" and self.library is not None and self.prefers_library(example.device):
                self.library(first, *rest)
                return
            if runtime.choose(name, backend, example.device, functools.partial(self.can_use, first, *rest)):
                with runtime.current(example.device):
                    self.launch(first, *rest)
                return
        self.reference(first, *rest)


def _no_result(*args: object, **kwargs: object) -> None:
    """Shape function: every operator writes to its arguments and returns nothing."""


def operator(arguments: str, **implementations: Any) -> Callable[[Function], Function]:
    """Registers an operator under the name of the decorated function, which checks the arguments and calls it.

    Args:
        arguments: of the operator's schema, without the backend.
        implementations: fields of `Operator`.
    """

    def register(function: Function) -> Function:
        name = function.__name__
        OPERATORS[name] = Operator(**implementations)
        LIBRARY.define(f'{name}({arguments}, *, str backend="auto") -> ()')
        LIBRARY.impl(name, functools.partial(OPERATORS[name].run, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"kfac_triton::{name}", _no_result, lib=LIBRARY)
        return function

    return register
