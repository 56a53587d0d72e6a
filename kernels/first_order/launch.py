"""Launches a step of SGD or AdamW: one launch for what depends on the counters, one that moves all parameters of a type."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table, device_vector
from ..operators import on_device
from ..strides import span
from ..tiles import count, shares_of_each
from . import kernel
from .rule import Rule

_BLOCK = 1024  # elements of 4 bytes
_COMPILED: set[tuple[object, ...]] = set()  # kinds of `move_kernel` that have run, on each device


def block_of(dtype: torch.dtype) -> int:
    """Elements at a time, so that every thread has 16 bytes of each tensor."""
    return _BLOCK * 4 // dtype.itemsize


def movable(
    parameters: list[Tensor], gradients: list[Tensor], moments: list[list[Tensor]], steps: list[Tensor]
) -> tuple[bool, ...]:
    """Whether the kernel can move each parameter: the elements of all its tensors are in the same order in memory."""
    tensors = [*parameters, *gradients, *itertools.chain.from_iterable(moments)]
    # One property of all tensors after the other, which is fastest; a step has thousands of them.
    return _movable(
        tuple([x.shape for x in parameters]),
        tuple([x.dtype for x in tensors]),
        tuple(map(Tensor.stride, tensors)),
        tuple(map(Tensor.is_neg, tensors)),
        tuple([step.dtype for step in steps]),
    )


@functools.lru_cache(maxsize=64)
def _movable(
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    strides: tuple[tuple[int, ...], ...],
    negative: tuple[bool, ...],
    counters: tuple[torch.dtype, ...],
) -> tuple[bool, ...]:
    """`movable`; dtypes, strides and negative are those of all parameters, then of all gradients, and so on."""
    count, result = len(shapes), []
    for i, shape in enumerate(shapes):
        size, own = math.prod(shape), slice(i, None, count)
        # The stride of a dimension with one element means nothing.
        orders = {tuple(step for n, step in zip(shape, order, strict=True) if n != 1) for order in strides[own]}
        result.append(
            dtypes[i] in runtime.TYPES
            and set(dtypes[own]) == {dtypes[i]}
            and not any(negative[own])
            and counters[i] == torch.float32
            and 0 < size < 2**31
            and len(orders) == 1
            and size == span(shape, strides[i])
        )
    return tuple(result)


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
    flags = movable(parameters, gradients, moments, steps)
    if all(flags):
        return None
    i = flags.index(False)
    p = parameters[i]
    return f"parameters[{i}] is {p.dtype} with strides {p.stride()}, and its gradient or state has others, or gaps"


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
        self._device, self._rule, self._finite = finite.device, rule, finite.view(torch.uint8)
        self._read = gradients  # tables have only addresses, and nobody else may keep a gradient of another type until `run`
        self._parts: list[tuple[tuple[int, int], Tensor, torch.dtype, bool]] = []
        with on_device(self._device):
            counters = list(map(Tensor.data_ptr, steps))
            self._compute_factors(counters, rate)
            # Of a state that has no tensors nothing is read.
            addresses = [list(map(Tensor.data_ptr, x)) for x in (parameters, gradients, *moments)]
            columns = [*addresses, *[addresses[0]] * (2 - len(moments)), counters, [x.numel() for x in parameters]]
            rows: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = defaultdict(list)
            for i, row in enumerate(zip(*columns, strict=True)):
                kind = parameters[i].dtype, not (row[0] | row[1] | row[2] | row[3]) % 16
                rows[kind].append((*row, i))
            for (dtype, aligned), some in rows.items():
                shares = shares_of_each(count(max([row[5] for row in some]), block_of(dtype)), len(some))
                self._parts.append(((len(some), shares), device_table(tuple(some), self._device), dtype, aligned))
                self._compile(dtype, aligned)

    def _compute_factors(self, counters: list[int], rate: Tensor) -> None:
        rule = self._rule
        constants = device_vector((*rule.betas, rule.weight_decay), self._device, torch.float64)
        ahead = rule.adam and rule.nesterov
        self._factors = torch.empty(len(counters), 5 if ahead else 4, dtype=torch.float32, device=self._device)
        kernel.factors_kernel[(count(len(counters), 128),)](
            device_vector(counters, self._device), rate, constants, self._factors, len(counters),
            ADAM=rule.adam, NESTEROV=ahead, BLOCK=128, num_warps=4,
        )  # fmt: skip

    def _compile(self, dtype: torch.dtype, aligned: bool) -> None:
        """Launches a kernel that has not run yet for a parameter without elements: if it fails, then before any has moved.

        The counter that it writes is a number of `factors`, which gets the value that it has.
        """
        kind = self._device, dtype, aligned, self._rule.kind, self._finite.data_ptr() % 16 == 0
        if kind not in _COMPILED:
            nothing = (0, 0, 0, 0, self._factors.data_ptr(), 0, 0)
            self._launch((1, 1), device_table((nothing,), self._device), dtype, aligned)
            _COMPILED.add(kind)

    def run(self) -> None:
        """Moves the parameters: one launch for those of a type."""
        with on_device(self._device):
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
