"""The first-order rule in two launches for all parameters of a group, where the device decides which of them move."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.finite_flags import FiniteFlags
from ..kernels import runtime
from ..kernels.device_tables import device_vector
from ..kernels.first_order.launch import Launch, movable
from ..kernels.first_order.rule import Rule
from .hold import State, move_counters
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
        names = changing_moments(group)
        self._launches: list[Launch] = []
        self.rest: Work = [], [], []
        for device, (params, gradients, states) in _by_device(work).items():
            move_counters(params, states)  # before the first step they are on the host, as in a checkpoint
            moments, counters = [[state[name] for state in states] for name in names], [state["step"] for state in states]
            chosen = [False] * len(params)
            if runtime.choose("move", backend, device, lambda: None):
                plain = [set(map(type, tensors)) <= _PLAIN for tensors in zip(params, gradients, *moments, strict=True)]
                chosen = list(map(operator.and_, plain, movable(params, gradients, moments, counters)))
            if not all(chosen):
                _extend(self.rest, (params, gradients, states), [i for i, moves in enumerate(chosen) if not moves])
                params, gradients, counters, *moments = (
                    list(itertools.compress(x, chosen)) for x in (params, gradients, counters, *moments)
                )
            if params:
                flags, rate = finite.gathered(params, device), _rate(group["lr"], device)
                self._launches.append(Launch(params, gradients, moments, counters, rate, flags, self._rule))

    def apply(self) -> None:
        """Moves the parameters."""
        for launch in self._launches:
            launch.run()


def _by_device(work: Work) -> dict[torch.device, Work]:
    devices = [p.device for p in work[0]]
    if len(set(devices)) == 1:
        return {devices[0]: work}
    found: dict[torch.device, Work] = {device: ([], [], []) for device in devices}
    for device, some in found.items():
        _extend(some, work, [i for i, other in enumerate(devices) if other == device])
    return found


def _extend(some: Work, work: Work, places: list[int]) -> None:
    """Adds what is at these places."""
    some[0].extend([work[0][i] for i in places])
    some[1].extend([work[1][i] for i in places])
    some[2].extend([work[2][i] for i in places])


def _rate(lr: float | Tensor, device: torch.device) -> Tensor:
    """The learning rate on the device, float64 (1,); a tensor is not read by the host."""
    if isinstance(lr, Tensor):
        return lr.to(device, torch.float64, non_blocking=True).reshape(1)
    return device_vector((lr,), device, torch.float64)
