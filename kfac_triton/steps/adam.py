"""A step with curvature="adam": covered parameters move along the engine's directions, others by Adam in their own axes."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from ..curvature.eigen_adam import AdamOptions
from ..settings import Settings
from .first_order import Group, prepare
from .fused import Work
from .hold import State
from .param_groups import MOMENTS


def adam_settings(settings: Settings) -> Settings:
    """Without a KL clip: Adam's directions have a length of their own."""
    return dataclasses.replace(settings, kl_clip=None)


def adam_options(group: Group) -> AdamOptions:
    """The options of a parameter group that Adam's directions depend on."""
    beta1, beta2 = group["betas"]
    return AdamOptions(beta1, beta2, group["eps"], group["nesterov"])


class AdamWork:
    """What a step moves, with the options of the rules that move it.

    Parameters that the engine covers, and where the host looks the others, too, move plainly along directions that are there
    before anything changes. Elsewhere a kernel moves the others, and does not fail half way.

    Args:
        groups: the parameter groups.
        updates: directions of the parameters that the engine covers; None for those that stay.
        states: of the optimizer.
        host_looks: whether the host knows which gradients are finite.

    Attributes:
        groups: options of each rule.
        work: what it moves.
    """

    def __init__(
        self,
        groups: list[Group],
        updates: dict[nn.Parameter, Tensor | None],
        states: dict[Any, State],
        host_looks: bool,
    ) -> None:
        self.groups: list[Group] = []
        self.work: list[Work] = []
        self._averages: list[tuple[list[Tensor], list[Tensor]]] = []
        for group in groups:
            along = {**group, "tail": "sgd", "momentum": 0.0, "nesterov": False}
            own, others = ([p for p in group["params"] if (p in updates) == covered] for covered in (True, False))
            covered, rest = (prepare({"params": params}, updates, states) for params in (own, others))
            for p, state in zip(rest[0], rest[2], strict=True):
                # A covered bias whose weight has no gradient moves by the group's rule.
                if not state.keys() >= set(MOMENTS[group["tail"]]):
                    state.update({key: torch.zeros_like(p) for key in MOMENTS[group["tail"]]})
            if host_looks:
                rest = rest[0], self._directions(group, rest), rest[2]
            self.groups += [along, along if host_looks else group]
            self.work += [covered, rest]

    def commit(self) -> None:
        """Takes the gradients into the averages; asks for no memory."""
        for kept, new in self._averages:
            torch._foreach_copy_(kept, new)

    def _directions(self, group: Group, work: Work) -> list[Tensor]:
        """N / (sqrt(V / (1 - b2^t)) + eps) of each parameter, see `curvature.eigen_adam`."""
        params, gradients, states = work
        if not params:
            return []
        (beta1, beta2), names = group["betas"], MOMENTS[group["tail"]]
        counts = [float(state["step"]) + 1 for state in states]
        kept = [[_real(state[name]) for state in states] for name in names]
        gradients = [_widened(_real(gradient)) for gradient in gradients]
        means, squares = ([_widened(x) for x in own] for own in kept)
        means = list(torch._foreach_mul(means, beta1))
        torch._foreach_add_(means, gradients, alpha=1 - beta1)
        squares = list(torch._foreach_mul(squares, beta2))
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        ahead = list(torch._foreach_div(means, [1 - beta1**count for count in counts]))
        if group["nesterov"]:
            torch._foreach_mul_(ahead, beta1)
            torch._foreach_add_(ahead, gradients, alpha=1 - beta1)
        divisors = list(torch._foreach_div(squares, [1 - beta2**count for count in counts]))
        torch._foreach_sqrt_(divisors)
        torch._foreach_add_(divisors, group["eps"])
        if not group["eps"]:  # what has never had a gradient stays where it is
            torch._foreach_add_(divisors, [(x == 0).to(x.dtype) for x in divisors])
        torch._foreach_div_(ahead, divisors)
        self._averages += [(kept[0], means), (kept[1], squares)]
        return [torch.view_as_complex(x) if p.is_complex() else x.to(p.dtype) for p, x in zip(params, ahead, strict=True)]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
