"""The first-order rule that moves the parameters, along preconditioned gradients where there are any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from . import validation

TAILS = ("sgd", "adamw")


def validate_group(group: dict[str, Any]) -> None:
    """Checks the options of one parameter group.

    Raises:
        TypeError: if an option has the wrong type.
        ValueError: if an option is outside its range.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr must be a number or a tensor with one element, but has shape {tuple(lr.shape)}")
        lr = lr.item()
    validation.real("lr", lr)
    validation.real("momentum", group["momentum"], high=1.0)
    validation.real("weight_decay", group["weight_decay"])
    validation.real("eps", group["eps"])
    validation.choice("tail", group["tail"], TAILS)
    if not isinstance(group["nesterov"], bool):
        raise TypeError(f"nesterov must be True or False, but is {group['nesterov']!r}")
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov needs a momentum greater than 0")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, but is {betas!r}")
    for i, beta in enumerate(betas):
        validation.real(f"betas[{i}]", beta, high=1.0)


def initial_state(parameter: nn.Parameter, tail: str) -> dict[str, Tensor]:
    """State of one parameter, complete from the start: checkpoint tools ask for it before the first step."""
    state = {"step": torch.zeros((), dtype=torch.float32)}
    for key in ("momentum_buffer",) if tail == "sgd" else ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def apply(group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]) -> None:
    """One step of a group: decoupled weight decay (Loshchilov and Hutter 2019), then SGD with momentum or Adam.

    Args:
        group: options, checked by `validate_group`.
        params: parameters that have a gradient.
        gradients: what to move along, one a parameter; not changed.
        states: from `initial_state`, one a parameter.
    """
    lr, decay = group["lr"], group["weight_decay"]
    if group["tail"] == "adamw":
        adamw(
            params,
            gradients,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=decay,
            eps=group["eps"],
            maximize=False,
        )
        return
    if decay:
        torch._foreach_mul_(params, 1 - lr * decay)
    for state in states:
        state["step"] += 1
    buffers: list[Tensor | None] = [s["momentum_buffer"] if group["momentum"] else None for s in states]
    sgd(
        params,
        gradients,
        buffers,
        weight_decay=0.0,
        momentum=group["momentum"],
        lr=lr,
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=False,
    )
