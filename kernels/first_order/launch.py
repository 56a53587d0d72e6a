"""Launches a step of SGD or AdamW: one launch for what depends on the counters, one that moves all parameters of a type."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table, device_vector
from ..strides import is_dense
from ..tiles import count, shares_of_each
from . import kernel
from .rule import Rule

_BLOCK = 1024  # elements of 4 bytes


def block_of(dtype: torch.dtype) -> int:
    """Elements at a time, so that every thread has 16 bytes of each tensor."""
    return _BLOCK * 4 // dtype.itemsize


def can_move(parameter: Tensor, gradient: Tensor, moments: tuple[Tensor, ...], step: Tensor) -> bool:
    """Whether the kernel can move this parameter: the elements of all tensors are in the same order in memory."""
    dtype, others = parameter.dtype, (gradient, *moments)
    if dtype not in runtime.TYPES or any(x.dtype != dtype or x.is_neg() for x in others) or parameter.is_neg():
        return False
    if not (parameter.is_contiguous() and all(x.is_contiguous() for x in others)):
        strides = parameter.stride()
        if not is_dense(parameter) or any(x.stride() != strides for x in others):
            return False
    return step.dtype == torch.float32 and 0 < parameter.numel() < 2**31


def can_use(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    rate: Tensor,
    finite: Tensor,
    rule: Rule,
) -> str | None:
    """Why the kernel cannot move these parameters; None if it can."""
    for i, (p, gradient, step, *own) in enumerate(zip(parameters, gradients, steps, *moments, strict=True)):
        if not can_move(p, gradient, tuple(own), step):
            return f"parameters[{i}] is {p.dtype} with strides {p.stride()}, and its gradient or state has others, or gaps"
    return None


def launch(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    rate: Tensor,
    finite: Tensor,
    rule: Rule,
) -> None:
    """The Triton implementation of `move_reference`. Nothing that it changes changes before the last launch for a type."""
    device = finite.device
    counters = tuple(step.data_ptr() for step in steps)
    constants = device_vector((*rule.betas, rule.weight_decay), device, torch.float64)
    factors = torch.empty(len(steps), 4, dtype=torch.float32, device=device)
    kernel.factors_kernel[(count(len(steps), 128),)](
        device_vector(counters, device), rate, constants, factors, len(steps), ADAM=rule.adam, BLOCK=128, num_warps=4
    )
    first, second = [*moments, parameters, parameters][:2]  # of a state that has no tensors nothing is read
    rows: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = defaultdict(list)
    for i, tensors in enumerate(zip(parameters, gradients, first, second, strict=True)):
        addresses = [x.data_ptr() for x in tensors]
        kind = parameters[i].dtype, not any(address % 16 for address in addresses)
        rows[kind].append((*addresses, counters[i], parameters[i].numel(), i))
    beta1, beta2 = rule.betas
    # As floats: a whole number would be compiled in.
    numbers = (beta1, 1 - beta1, beta2, 1 - beta2, rule.eps) if rule.adam else (rule.momentum, 1, 0, 0, 0)
    weights = [float(number) for number in numbers]
    for (dtype, aligned), some in rows.items():
        block = block_of(dtype)
        shares = shares_of_each(count(max(row[5] for row in some), block), len(some))
        kernel.move_kernel[(len(some), shares)](
            device_table(tuple(some), device), factors, finite.view(torch.uint8), *weights,
            ADAM=rule.adam, MOMENTUM=rule.momentum > 0, NESTEROV=rule.nesterov, MAXIMIZE=rule.maximize, BLOCK=block,
            DTYPE=runtime.TYPES[dtype], ALIGNED=aligned, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
