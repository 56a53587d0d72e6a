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
_COMPILED: set[tuple[object, ...]] = set()  # kinds of `move_kernel` that have run, on each device


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


class Launch:
    """A step of the Triton implementation of `move_reference`, with its arguments, in two parts.

    The constructor does all that can fail: it makes tables, computes what depends on the counters, and compiles kernels. No
    parameter, state or counter changes before `run`, which only launches.
    """

    def __init__(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        moments: list[list[Tensor]],
        steps: list[Tensor],
        rate: Tensor,
        finite: Tensor,
        rule: Rule,
    ) -> None:
        device = finite.device
        counters = tuple(step.data_ptr() for step in steps)
        constants = device_vector((*rule.betas, rule.weight_decay), device, torch.float64)
        self._rule, self._finite = rule, finite.view(torch.uint8)
        self._read = gradients  # tables have only addresses, and nobody else may keep a gradient of another type until `run`
        self._factors = torch.empty(len(steps), 4, dtype=torch.float32, device=device)
        kernel.factors_kernel[(count(len(steps), 128),)](
            device_vector(counters, device), rate, constants, self._factors, len(steps),
            ADAM=rule.adam, BLOCK=128, num_warps=4,
        )  # fmt: skip
        first, second = [*moments, parameters, parameters][:2]  # of a state that has no tensors nothing is read
        rows: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = defaultdict(list)
        for i, tensors in enumerate(zip(parameters, gradients, first, second, strict=True)):
            addresses = [x.data_ptr() for x in tensors]
            kind = parameters[i].dtype, not any(address % 16 for address in addresses)
            rows[kind].append((*addresses, counters[i], parameters[i].numel(), i))
        self._parts: list[tuple[tuple[int, int], Tensor, torch.dtype, bool]] = []
        for (dtype, aligned), some in rows.items():
            shares = shares_of_each(count(max(row[5] for row in some), block_of(dtype)), len(some))
            self._parts.append(((len(some), shares), device_table(tuple(some), device), dtype, aligned))
            self._compile(dtype, aligned)

    def _compile(self, dtype: torch.dtype, aligned: bool) -> None:
        """Launches a kernel that has not run yet for a parameter without elements: if it fails, then before any has moved.

        The counter that it writes is a number of `factors`, which gets the value that it has.
        """
        kind = self._factors.device, dtype, aligned, self._rule.kind, self._finite.data_ptr() % 16 == 0
        if kind not in _COMPILED:
            nothing = (0, 0, 0, 0, self._factors.data_ptr(), 0, 0)
            self._launch((1, 1), device_table((nothing,), self._factors.device), dtype, aligned)
            _COMPILED.add(kind)

    def run(self) -> None:
        """Moves the parameters: one launch for those of a type."""
        for part in self._parts:
            self._launch(*part)

    def _launch(self, grid: tuple[int, int], table: Tensor, dtype: torch.dtype, aligned: bool) -> None:
        rule, (beta1, beta2) = self._rule, self._rule.betas
        # As floats: a whole number would be compiled in.
        numbers = (beta1, 1 - beta1, beta2, 1 - beta2, rule.eps) if rule.adam else (rule.momentum, 1, 0, 0, 0)
        adam, momentum, nesterov, maximize = rule.kind
        kernel.move_kernel[grid](
            table, self._factors, self._finite, *[float(number) for number in numbers],
            ADAM=adam, MOMENTUM=momentum, NESTEROV=nesterov, MAXIMIZE=maximize, BLOCK=block_of(dtype),
            DTYPE=runtime.TYPES[dtype], ALIGNED=aligned, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
