"""Registration of the operators with PyTorch, and the choice between their implementations.

Through `torch.library.Library.define` and `impl` (2 us a call; `custom_op` costs 26).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
        plan: finds out at once what the launch needs to know and what `can_use` answers, which is its attribute `obstacle`; the
            launch takes it as its argument `plan`.
        library: the reference with other settings of the library that multiplies matrices.
        prefers_library: whether backend="auto" uses the library on a device.
    """

    reference: Callable[..., None]
    launch: Callable[..., None]
    can_use: Callable[..., str | None]
    plan: Callable[..., Any] | None = None
    library: Callable[..., None] | None = None
    prefers_library: Callable[[torch.device], bool] = lambda device: False

    def run(self, name: str, first: Tensor | list[Tensor], *rest: Any, backend: str = "auto") -> None:
        """Runs one of the implementations.

        Raises:
            ValueError: if backend is unknown, or "triton" and the kernel cannot serve.
        """
        example = first if isinstance(first, Tensor) else first[0] if first else None
        if example is not None:
            device, extra = example.device, {}

            def why_not() -> str | None:
                if self.plan is None:
                    return self.can_use(first, *rest)
                extra["plan"] = self.plan(first, *rest)
                reason: str | None = extra["plan"].obstacle
                return reason

            if backend == "auto" and self.library is not None and self.prefers_library(device):
                self.library(first, *rest)
                return
            if runtime.choose(name, backend, device, why_not):
                with on_device(device):
                    self.launch(first, *rest, **extra)
                return
        self.reference(first, *rest)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which the device is the current one; entering one costs 5 us, and usually it is current already."""
    is_current = device.type != "cuda" or device.index == torch.cuda.current_device()
    return nullcontext() if is_current else runtime.current(device)


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
