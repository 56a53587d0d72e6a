"""The first-order rule that moves the parameters, along preconditioned gradients where there are any."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from . import validation
from .capture import local

TAILS = ("sgd", "adamw")
OPTIONS = ("momentum", "nesterov", "weight_decay", "tail", "betas", "eps", "foreach", "maximize", "capturable")  # of a group


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
    for name in ("maximize", "capturable"):
        if not isinstance(group[name], bool):
            raise TypeError(f"{name} must be True or False, but is {group[name]!r}")
    if group["foreach"] not in (None, True, False):
        raise TypeError(f"foreach must be True, False or None, but is {group['foreach']!r}")
    if group.get("fused"):
        raise RuntimeError("KFAC has no fused tail: leave fused out, foreach takes many parameters at once")
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas must be a pair of numbers, but is {betas!r}")
    for i, beta in enumerate(betas):
        validation.real(f"betas[{i}]", beta, high=1.0)


def initial_state(parameter: nn.Parameter, group: dict[str, Any]) -> dict[str, Tensor]:
    """State of one parameter, complete from the start: checkpoint tools ask for it before the first step.

    The step is counted on the host, as PyTorch's optimizers do it, unless it has to be part of a recorded graph.
    """
    device = parameter.device if group["capturable"] else None
    state = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    for key in ("momentum_buffer",) if group["tail"] == "sgd" else ("exp_avg", "exp_avg_sq"):
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def refuse_gradients(parameters: list[nn.Parameter]) -> None:
    """Refuses gradients that no step can be taken along.

    Raises:
        RuntimeError: if one is sparse.
    """
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise RuntimeError("KFAC does not support sparse gradients; make the embedding with sparse=False")


def drop_bad_gradients(
    parameters: list[nn.Parameter], updates: dict[nn.Parameter, Tensor | None], host_looks: bool
) -> int | Tensor:
    """Keeps a NaN or Inf out of parameters that K-FAC does not cover: adds to updates what stands for such a gradient.

    Where the host looks that is None, and the parameter stays as it is; elsewhere zeros. Returns how many there are.
    """
    others = [p for p in parameters if p.grad is not None and p not in updates]
    if not others:
        return 0
    gradients = [local(p.grad) for p in others if p.grad is not None]
    # The norm of largest magnitude does not overflow, and hands a NaN on.
    finite = [torch.isfinite(x) for x in torch._foreach_norm(gradients, torch.inf)]
    if host_looks:
        bad = [p for p, is_finite in zip(others, finite, strict=True) if not bool(is_finite)]
        updates.update(dict.fromkeys(bad))
        return len(bad)
    for p, is_finite in zip(others, finite, strict=True):
        assert p.grad is not None
        updates[p] = torch.where(is_finite, p.grad, 0.0)
    return torch.stack([~is_finite.to(finite[0].device) for is_finite in finite]).sum()


Work = tuple[list[Tensor], list[Tensor], list[dict[str, Any]]]


def prepare(group: dict[str, Any], updates: dict[nn.Parameter, Tensor | None], states: dict[Any, dict[str, Any]]) -> Work:
    """Parameters of a group that move, with what they move along and their states."""
    pairs = [(p, updates.get(p, p.grad)) for p in group["params"] if p.grad is not None]
    moving = [(p, along.to(p.dtype)) for p, along in pairs if along is not None]
    if group["tail"] == "adamw":
        # Adam asks for this much memory when it has changed its moments already: freed again, it is in the allocator's cache.
        reserve = [torch.empty_like(p) for p, _ in moving if p.is_cuda]
        del reserve
    return [p for p, _ in moving], [along for _, along in moving], [states[p] for p, _ in moving]


def apply(group: dict[str, Any], params: list[Tensor], gradients: list[Tensor], states: list[dict[str, Any]]) -> None:
    """One step of a group: decoupled weight decay (Loshchilov and Hutter 2019), then SGD with momentum or Adam.

    Args:
        group: options, checked by `validate_group`.
        params: parameters that have a gradient.
        gradients: what to move along, one a parameter; not changed.
        states: from `initial_state`, one a parameter.
    """
    if not params:
        return
    lr, decay = group["lr"], group["weight_decay"]
    if group["tail"] == "adamw":
        adamw(
            params,
            gradients,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            foreach=group["foreach"],
            capturable=group["capturable"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=lr,
            weight_decay=decay,
            eps=group["eps"],
            maximize=group["maximize"],
        )
        return
    if decay:
        torch._foreach_mul_(params, 1 - lr * decay)
    torch._foreach_add_([s["step"] for s in states], 1.0)
    buffers: list[Tensor | None] = [s["momentum_buffer"] if group["momentum"] else None for s in states]
    sgd(
        params,
        gradients,
        buffers,
        foreach=group["foreach"],
        weight_decay=0.0,
        momentum=group["momentum"],
        lr=lr,
        dampening=0.0,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
    )
