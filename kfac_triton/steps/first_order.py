"""The first-order rule (SGD or AdamW) that moves the parameters, by preconditioned gradients where there are any."""

from __future__ import annotations

import contextlib
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ..curvature.finite_flags import FiniteFlags
from ..layers.dtensor import local
from .fused import FusedSteps, Work
from .hold import Hold, State, portions
from .param_groups import changing_moments

Group = dict[str, Any]


def refuse_gradients(parameters: list[nn.Parameter]) -> None:
    """Refuses gradients that no rule can use.

    Raises:
        RuntimeError: if one is sparse.
    """
    if any(p.grad is not None and p.grad.is_sparse for p in parameters):
        raise RuntimeError("KFAC does not support sparse gradients; make the embedding with sparse=False")


def drop_bad_gradients(
    parameters: list[nn.Parameter],
    updates: dict[nn.Parameter, Tensor | None],
    finite: FiniteFlags | None,
    mixed: Container[nn.Parameter] = (),
) -> int | Tensor:
    """Keeps a NaN or Inf out of parameters that K-FAC does not cover, or not in all rows.

    Args:
        parameters: all of them.
        updates: of those that K-FAC covers. If the host checks, None is added for others whose gradient is not finite.
        finite: None if the host checks. Otherwise whether the gradients of those in updates are finite; others are added.
        mixed: those in updates some rows of which use the plain gradient.

    Returns:
        How many of these have a gradient that is not finite.
    """
    covered = {p for p, update in updates.items() if update is None or p not in mixed}
    others = [p for p in parameters if p.grad is not None and p not in covered]
    if not others:
        return 0
    gradients = [local(p.grad) for p in others if p.grad is not None]
    gradients = [x if x.numel() else x.new_zeros(1) for x in gradients]  # without elements there is no maximum
    # The maximum norm does not overflow, and it is NaN if an element is.
    norms = torch._foreach_norm(gradients, torch.inf)
    if finite is None:
        bad = [p for p, norm in zip(others, norms, strict=True) if not bool(torch.isfinite(norm))]
        updates.update(dict.fromkeys(bad))
        return len(bad)
    home = finite.flags.device
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        norms = tuple(norm.to(home, torch.float64) for norm in norms)
    are_finite = torch.isfinite(torch.stack(norms)).to(home)
    finite.add(others, are_finite)
    return len(others) - are_finite.sum()


def prepare(group: Group, updates: dict[nn.Parameter, Tensor | None], states: dict[Any, State]) -> Work:
    """The parameters of a group that a step updates, with the gradients that it uses and their states."""
    pairs = [(p, updates.get(p, p.grad)) for p in group["params"] if p.grad is not None]
    moving = [(p, along if along.dtype == p.dtype else along.to(p.dtype)) for p, along in pairs if along is not None]
    return [p for p, _ in moving], [along for _, along in moving], [states[p] for p, _ in moving]


def split(
    groups: list[Group], work: list[Work], finite: FiniteFlags | None, backend: str
) -> tuple[list[FusedSteps], list[Work]]:
    """What a kernel moves where only the device knows which gradients are finite, and what is left to PyTorch's rules.

    All memory of the former is allocated, and that of the latter is in the allocator's cache.
    """
    fused, rest = [], []
    for group, own in zip(groups, work, strict=True):
        if finite is not None and own[0] and group["foreach"] is not False:
            fused.append(FusedSteps(group, own, finite, backend))
            own = fused[-1].rest
        rest.append(own)
        if group["tail"] == "adamw" or group["capturable"]:
            # The rules need this much memory after they have changed their state: it is allocated and freed now.
            copies = 2 if _is_nesterov_adam(group) else 1
            for places in portions(own[0], group["foreach"] is not False):
                reserve = [torch.empty_like(own[0][i]) for i in places if own[0][i].is_cuda for _ in range(copies)]
                del reserve
    return fused, rest


def hold(groups: list[Group], work: list[Work], finite: FiniteFlags | None, backend: str = "auto") -> Hold | None:
    """A `Hold` for parameters whose gradients are not finite, with its memory allocated; None if the host checks gradients."""
    if finite is None:
        return None
    result = Hold(finite, backend)
    for group, (params, _, states) in zip(groups, work, strict=True):
        result.reserve(params, states, changing_moments(group), group["foreach"] is not False)
    return result


def apply(group: Group, params: list[Tensor], gradients: list[Tensor], states: list[State], held: Hold | None = None) -> None:
    """One step of a group: decoupled weight decay (Loshchilov and Hutter 2019), then SGD with momentum or Adam.

    With `nesterov`, Adam looks ahead as Nesterov's momentum does: in place of the corrected mean M / (1 - b1^t) it goes along
    b1 M / (1 - b1^t) + (1 - b1) g. PyTorch has no such rule: its NAdam has a schedule of momenta (Dozat 2016).

    Args:
        group: options, checked by `validate_group`.
        params: parameters that have a gradient.
        gradients: one for each parameter; not changed.
        states: from `initial_state`, one for each parameter.
        held: leaves some of them unchanged if only the device knows which. Steps are then counted on the device, and Adam's
            bias correction, which depends on the count, is computed there.
    """
    if not params:
        return
    if group["tail"] == "sgd" and not group["capturable"] and isinstance(group["lr"], Tensor):
        group = {**group, "lr": group["lr"].item()}  # as PyTorch's SGD does, but once
    if held is None and not group["capturable"] and not _is_nesterov_adam(group):
        _apply(group, params, gradients, states)
        return
    on_device = group["capturable"] or group["tail"] == "adamw"
    for i in portions(params, group["foreach"] is not False):
        some = [params[k] for k in i], [gradients[k] for k in i], [states[k] for k in i]
        with contextlib.nullcontext() if held is None else held.over(some[0], some[2], changing_moments(group)):
            (_apply_on_device if on_device else _apply)(group, *some)


def _is_nesterov_adam(group: Group) -> bool:
    return bool(group["tail"] == "adamw" and group["nesterov"])


def _apply(group: Group, params: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
    """`apply` by PyTorch's own rules."""
    steps = [s["step"] for s in states]
    options = {name: group[name] for name in ("lr", "foreach", "maximize")}
    if group["tail"] == "adamw":
        means, squares = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
        options |= {"weight_decay": group["weight_decay"], "eps": group["eps"], "amsgrad": False, "capturable": False}
        beta1, beta2 = group["betas"]
        adamw(params, gradients, means, squares, [], steps, beta1=beta1, beta2=beta2, **options)
        return
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
    torch._foreach_add_(steps, 1.0)
    options |= {"momentum": group["momentum"], "nesterov": group["nesterov"], "weight_decay": 0.0, "dampening": 0.0}
    sgd(params, gradients, [s["momentum_buffer"] if group["momentum"] else None for s in states], **options)


def _apply_on_device(group: Group, params: list[Tensor], gradients: list[Tensor], states: list[State]) -> None:
    """`apply` without a wait for the device. PyTorch's SGD would read a rate in a tensor, and its Adam needs a GPU for this."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        lr = lr.to(params[0].device, torch.float64, non_blocking=True).reshape(())
    if group["maximize"]:
        gradients = list(torch._foreach_neg(gradients))
    torch._foreach_add_([s["step"] for s in states], 1.0)
    if group["weight_decay"]:
        torch._foreach_mul_(params, _factor(1 - lr * group["weight_decay"], params))
    rule = _adamw_on_device if group["tail"] == "adamw" else _sgd_on_device
    rule(group, lr, params, gradients, states)


def _sgd_on_device(
    group: Group, lr: float | Tensor, params: list[Tensor], gradients: list[Tensor], states: list[State]
) -> None:
    along, momentum = gradients, group["momentum"]
    if momentum:
        along = [s["momentum_buffer"] for s in states]
        torch._foreach_mul_(along, momentum)
        torch._foreach_add_(along, gradients)
    if group["nesterov"]:
        along = list(torch._foreach_add(gradients, along, alpha=momentum))
    torch._foreach_add_(params, torch._foreach_mul(along, _factor(-lr, along)))


def _adamw_on_device(
    group: Group, lr: float | Tensor, params: list[Tensor], gradients: list[Tensor], states: list[State]
) -> None:
    beta1, beta2 = group["betas"]
    if params[0].is_complex():
        params, gradients = ([torch.view_as_real(x) for x in xs] for xs in (params, gradients))
    moments = ([s[name] for s in states] for name in ("exp_avg", "exp_avg_sq"))
    means, squares = ([torch.view_as_real(x) if x.is_complex() else x for x in xs] for xs in moments)
    # In double precision, as on the host: one minus a power near one would lose digits in single precision.
    steps = torch.stack([s["step"] for s in states]).to(params[0].device, torch.float64)
    corrections, roots = 1 - beta1**steps, (1 - beta2**steps).sqrt()
    torch._foreach_lerp_(means, gradients, 1 - beta1)
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
    divisors = list(torch._foreach_sqrt(squares))
    if divisors[0].dtype in (torch.bfloat16, torch.float16):  # to which a GPU would round the roots and rates
        divisors = [x.float() for x in divisors]
    torch._foreach_div_(divisors, roots.unbind())
    torch._foreach_add_(divisors, group["eps"])
    if group["nesterov"]:
        means, corrections = _ahead(means, gradients, beta1, corrections), torch.ones_like(corrections)
    torch._foreach_div_(divisors, (-lr / corrections).unbind())
    torch._foreach_addcdiv_(params, means, divisors)


def _ahead(means: list[Tensor], gradients: list[Tensor], beta: float, corrections: Tensor) -> list[Tensor]:
    """Corrected means with Nesterov's look ahead."""
    floats = [x.float() if x.dtype in (torch.bfloat16, torch.float16) else x for x in means]
    ahead = list(torch._foreach_mul(floats, (beta / corrections).unbind()))
    torch._foreach_add_(ahead, gradients, alpha=1 - beta)
    return ahead


def _factor(number: float | Tensor, tensors: Sequence[Tensor]) -> Any:
    """What multiplies all tensors by a number, or by a tensor of one element."""
    if not isinstance(number, Tensor):
        return number
    if tensors[0].dtype in (torch.float32, torch.float64):
        return number.to(tensors[0].dtype)
    return [number] * len(tensors)  # in 16 bits the number itself would have too few digits
