"""Parameter groups: their options, and the state that the first-order rule keeps of each parameter."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .. import validation

MOMENTS = {"sgd": ("momentum_buffer",), "adamw": ("exp_avg", "exp_avg_sq")}  # of each first-order rule
TAILS = tuple(MOMENTS)


def changing_moments(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tensors in a parameter's state that a step of the group changes, beside the counter."""
    return MOMENTS[group["tail"]] if group["tail"] == "adamw" or group["momentum"] else ()


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
    for name in ("nesterov", "maximize", "capturable"):
        validation.flag(name, group[name])
    if group["nesterov"] and group["tail"] == "sgd" and not group["momentum"]:
        raise ValueError(
            f"nesterov is True, which for tail='sgd' needs a momentum greater than 0, but momentum is {group['momentum']!r}"
        )
    if group["foreach"] not in (None, True, False):
        raise TypeError(f"foreach must be True, False or None, but is {group['foreach']!r}")
    if group["foreach"] and group["tail"] == "adamw" and isinstance(group["lr"], Tensor) and not group["capturable"]:
        raise ValueError(
            "foreach is True and lr is a tensor, for which tail='adamw' needs capturable=True; set it, or leave foreach out"
        )
    if group.get("fused"):
        raise RuntimeError("fused is not supported; leave it out (foreach updates many parameters at once)")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, but is {betas!r}")
    for i, beta in enumerate(betas):
        validation.real(f"betas[{i}]", beta, high=1.0)


def require_adam(groups: Sequence[dict[str, Any]], advice: str) -> None:
    """Refuses groups that curvature="adam" cannot move; one without a tail takes the default.

    Raises:
        ValueError: if the tail of a group is not "adamw".
    """
    tails = [group.get("tail", "adamw") for group in groups]
    if set(tails) - {"adamw"}:
        raise ValueError(f"curvature is 'adam', so the tail of every group must be 'adamw', but is {tails}: {advice}")


def initial_state(parameter: nn.Parameter, group: dict[str, Any], has_averages: bool = True) -> dict[str, Tensor]:
    """State of one parameter, complete from the start: checkpoint tools ask for it before the first step.

    Without averages it is a counter alone: those of the parameter are in the eigenbasis of its layer.

    The step is counted on the host, as in PyTorch's optimizers, unless it has to be part of a recorded graph. If only the
    device knows which gradients are finite, `Hold` moves the counter there.
    """
    device = parameter.device if group["capturable"] else torch.device("cpu")
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for key in MOMENTS[group["tail"]] if has_averages else ():
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Those of all groups, in order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def complete(optimizer: Optimizer, betas: tuple[float, float], averaged: Sequence[nn.Parameter] = ()) -> list[nn.Parameter]:
    """Gives groups the options and the state that they lack.

    Args:
        optimizer: the optimizer.
        betas: for groups that have none.
        averaged: parameters whose averages are in the eigenbasis of their layers, and not in their own state.

    Returns:
        All parameters.
    """
    elsewhere = {id(p) for p in averaged}
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults.items():
            if key != "differentiable":  # which the base class adds when it loads, and no group has
                group.setdefault(key, value)
        group.setdefault("betas", betas)
        for parameter in group["params"]:
            own = optimizer.state[parameter]
            if id(parameter) in elsewhere:
                for key in MOMENTS[group["tail"]]:
                    own.pop(key, None)
                if "step" not in own:
                    own.update(initial_state(parameter, group, has_averages=False))
                continue
            if not own.keys() >= {"step", *MOMENTS[group["tail"]]}:
                own.update(initial_state(parameter, group) | own)
    return parameters_of(optimizer)


def rekey_swapped(optimizer: Optimizer, known: Sequence[Tensor]) -> list[Tensor]:
    """Gives the state of parameters that were replaced in the groups (accelerate does that) to their replacements.

    Args:
        optimizer: the optimizer.
        known: the parameters that the state belongs to, in the order of the groups.

    Returns:
        The parameters that it belongs to now.
    """
    now: list[Tensor] = list(parameters_of(optimizer))
    if len(now) == len(known) and all(map(operator.is_, known, now)):
        return now
    for old, new in zip(known, now, strict=True):
        if old is not new and old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
    return now


def move_state(optimizer: Optimizer) -> None:
    """Moves the state of the first-order rule to the devices of the parameters."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            tensors = {key: x for key, x in state.items() if isinstance(x, Tensor)}
            # A counter stays on the host, unless the device counts.
            moving = {key: x for key, x in tensors.items() if x.dim() or group["capturable"] or x.device.type != "cpu"}
            state.update({key: x.to(p.device) for key, x in moving.items()})


def check_tail(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Checks that the saved state of the first-order rule fits the parameters.

    Raises:
        ValueError: if the groups do not match, or a tensor has the wrong shape or is not finite.
    """
    saved_groups, groups = state_dict["param_groups"], optimizer.param_groups
    if [len(g["params"]) for g in saved_groups] != [len(g["params"]) for g in groups]:
        raise ValueError(
            f"state_dict must have groups of {[len(g['params']) for g in groups]} parameters, like the optimizer, but has "
            f"{[len(g['params']) for g in saved_groups]}"
        )
    numbers = [i for group in saved_groups for i in group["params"]]
    for number, parameter in zip(numbers, parameters_of(optimizer), strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{key} of parameter {number} must have shape {tuple(parameter.shape)}, but has {tuple(value.shape)}; load "
                    "a checkpoint of the same model"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{key} of parameter {number} has values that are not finite; load another checkpoint")
