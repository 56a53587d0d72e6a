"""Registration of the operators with PyTorch, and the choice between their two implementations.

Through `torch.library.Library.define` and `impl` (2 us a call; `custom_op` costs 26).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import runtime
from .covariance import launch as covariance_launch
from .covariance.reference import covariance_ema_reference
from .factored_newton import launch as factored_newton_launch
from .factored_newton.reference import factored_newton_refresh_reference
from .multi_tensor.launch import can_use_blend, can_use_gather, can_use_squares, launch_blend, launch_gather, launch_squares
from .multi_tensor.reference import blend_reference, gather_reference, squares_reference
from .newton_schulz import launch as newton_schulz_launch
from .newton_schulz.reference import newton_schulz_inverse_reference
from .precondition import launch as precondition_launch
from .precondition.reference import precondition_reference

# The registrations live as long as this object does.
LIBRARY = torch.library.Library("kfac_triton", "DEF")


@dataclass(frozen=True)
class Operator:
    """An operator's arguments, its plain-torch reference, and its kernel's launcher, if it has one.

    `can_use` names what the kernel cannot do. Where the choice is open, `library` serves the devices that `prefers_library`
    names: it calls a library's products with other settings than the reference does.
    """

    arguments: str
    reference: Callable[..., None]
    launch: Callable[..., None] | None = None
    can_use: Callable[..., str | None] | None = None
    library: Callable[..., None] | None = None
    prefers_library: Callable[[torch.device], bool] | None = None

    def why_not(self, *arguments: Any) -> str | None:
        """What the kernel cannot do in this call; None for nothing."""
        return self.can_use(*arguments) if self.can_use is not None else "it has no kernel"

    def run(self, name: str, first: Tensor | list[Tensor], *rest: Any, backend: str = "auto") -> None:
        """The call itself, by the kernel or by the reference.

        Raises:
            ValueError: if backend is unknown, or "triton" and the kernel cannot serve.
        """
        example = first if isinstance(first, Tensor) else first[0] if first else None
        if backend == "auto" and example is not None and self.library is not None and self.prefers_library is not None:
            if self.prefers_library(example.device):
                self.library(first, *rest)
                return
        if self.launch is not None and example is not None:
            why_not = functools.partial(self.why_not, first, *rest)
            if runtime.choose(name, backend, example.device, why_not):
                with runtime.current(example.device):
                    self.launch(first, *rest)
                return
        self.reference(first, *rest)


OPERATORS = {
    "covariance_ema": Operator(
        "Tensor(a!)[] factors, Tensor[] inputs, Tensor alpha, Tensor beta, bool[] ones_column, int[] windows, "
        "Tensor? accept=None",
        covariance_ema_reference,
        covariance_launch.launch,
        covariance_launch.can_use,
    ),
    "newton_schulz_inverse": Operator(
        "Tensor factor, Tensor damping, Tensor(a!) inverse, Tensor(b!) residual, float tolerance, int max_steps",
        newton_schulz_inverse_reference,
        newton_schulz_launch.launch,
        newton_schulz_launch.can_use,
    ),
    "factored_newton_refresh": Operator(
        "Tensor factor, Tensor damping, Tensor(a!) root, Tensor(b!) residual, float tolerance, int max_steps",
        factored_newton_refresh_reference,
        factored_newton_launch.launch,
        factored_newton_launch.can_use,
    ),
    "precondition": Operator(
        "Tensor gradient, Tensor left, Tensor right, Tensor(a!) out, Tensor(b!) product, bool factored",
        precondition_reference,
        precondition_launch.launch,
        precondition_launch.can_use,
        precondition_launch.multiply_by_library,
        precondition_launch.prefers_library,
    ),
    "squares": Operator("Tensor[] inputs, Tensor(a!) out", squares_reference, launch_squares, can_use_squares),
    "gather": Operator("Tensor[] weights, Tensor[] biases, Tensor(a!) out", gather_reference, launch_gather, can_use_gather),
    "blend": Operator(
        "Tensor(a!) factor, Tensor total, Tensor keep, Tensor gain, Tensor accept",
        blend_reference,
        launch_blend,
        can_use_blend,
    ),
}


def _no_result(*args: object, **kwargs: object) -> None:
    """Shape function: every operator writes to its arguments and returns nothing."""


for _name, _operator in OPERATORS.items():
    LIBRARY.define(f'{_name}({_operator.arguments}, *, str backend="auto") -> ()')
    LIBRARY.impl(_name, functools.partial(_operator.run, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"kfac_triton::{_name}", _no_result, lib=LIBRARY)
