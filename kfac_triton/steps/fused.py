"""The first-order rule in two launches for all parameters of a group, where the device decides which of them move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.finite_flags import FiniteFlags
from ..kernels import ops, runtime
from ..kernels.device_tables import device_vector
from ..kernels.first_order.launch import can_move
from ..kernels.first_order.rule import Rule
from .hold import State
from .param_groups import changing_moments

_PLAIN = {Tensor, nn.Parameter}
Work = tuple[list[Tensor], list[Tensor], list[State]]


class FusedSteps:
    """Steps of one group's parameters that the kernel can move. The constructor does all that can fail.

    Args:
        group: its options.
        work: parameters, gradients and states.
        finite: which gradients are finite.
        backend: of the kernels.

    Attributes:
        rest: parameters, gradients and states that PyTorch's rules have to move.
    """

    def __init__(self, group: dict[str, Any], work: Work, finite: FiniteFlags, backend: str) -> None:
        adam = group["tail"] == "adamw"
        options = {name: group[name] for name in ("nesterov", "weight_decay", "maximize", "betas", "eps")}
        self._rule = Rule(adam, **options | {"momentum": 0.0 if adam else group["momentum"], "betas": tuple(group["betas"])})
        self._names = changing_moments(group)
        self._moves: list[Callable[[], None]] = []
        self.rest: Work = [], [], []
        by_device: dict[torch.device, Work] = {}
        for p, gradient, state in zip(*work, strict=True):
            if state["step"].device != p.device:  # before the first step, or in a checkpoint
                state["step"] = state["step"].to(p.device)
            serves = runtime.choose("move", backend, p.device, lambda: None) and self._can_move(p, gradient, state)
            params, gradients, states = by_device.setdefault(p.device, ([], [], [])) if serves else self.rest
            params.append(p)
            gradients.append(gradient)
            states.append(state)
        for device, (params, gradients, states) in by_device.items():
            moments = [[state[name] for state in states] for name in self._names]
            counters = [state["step"] for state in states]
            flags, rate = finite.gathered(params, device), _rate(group["lr"], device)
            self._moves.append(
                ops.prepared_move(params, gradients, moments, counters, rate, flags, self._rule, backend=backend)
            )

    def _can_move(self, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> bool:
        moments = tuple(state[name] for name in self._names)
        # Others may be spread over processes.
        return all(type(x) in _PLAIN for x in (p, gradient, *moments)) and can_move(p, gradient, moments, state["step"])

    def apply(self) -> None:
        """Moves the parameters."""
        for move in self._moves:
            move()


def _rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate on the device, float64 (1,); a tensor is not read by the host."""
    if isinstance(lr, Tensor):
        return lr.to(device, torch.float64, non_blocking=True).reshape(1)
    return device_vector((lr,), device, torch.float64)
