"""Launches a step of orthogonal iteration: as many kernels for any number of matrices in stacks of any sizes.

Which matrices are accepted, corrected or tried again is decided on the device, without a host read: for those that are done,
programs return at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..device_tables import device_table
from ..factored_newton import launch as newton
from ..factored_newton import tables as newton_tables
from . import kernel, tables
from .reference import CORRECTIONS, FIRST_TOLERANCE, SECOND_TOLERANCE, enough, least_mean, most

_CHUNK = 128  # sums over tiles


def can_use(
    factors: list[Tensor],
    bases: list[Tensor],
    residuals: list[Tensor],
    refused: list[Tensor],
    shift: float,
    rescue_shift: float,
    max_steps: int,
    accept: float,
) -> str | None:
    """Why the kernels cannot serve these stacks; None if they can."""
    for i, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        reason = newton_tables.why_not(f"factors[{i}]", factor) or newton_tables.why_not(f"bases[{i}]", basis)
        if reason:
            return reason
    for name, vectors in (("residuals", residuals), ("refused", refused)):
        for i, vector in enumerate(vectors):
            if not vector.is_contiguous():
                return f"{name}[{i}] has gaps, and the kernel needs it contiguous"
    return None


def launch(
    factors: list[Tensor],
    bases: list[Tensor],
    residuals: list[Tensor],
    refused: list[Tensor],
    shift: float,
    rescue_shift: float,
    max_steps: int,
    accept: float,
) -> None:
    """The Triton implementation of `orthogonal_iteration_reference`, for a call that `can_use` accepts."""
    # Two kinds of stacks, because the kind decides how the kernels are compiled. Padded stacks are aligned.
    kinds: dict[bool, list[int]] = {}
    for i, (factor, basis) in enumerate(zip(factors, bases, strict=True)):
        if factor.shape[0]:
            kinds.setdefault(newton_tables.is_aligned(factor, basis), []).append(i)
    for aligned, members in kinds.items():
        stacks = [(factors[i], bases[i], residuals[i], refused[i]) for i in members]
        _Launch(stacks, aligned).run((shift, rescue_shift), max_steps, accept)


class _Launch:
    """The launches for stacks of one kind, with their tables and scratch memory."""

    def __init__(self, given: list[tuple[Tensor, Tensor, Tensor, Tensor]], aligned: bool) -> None:
        factors = [stack[0] for stack in given]
        device = factors[0].device
        target = runtime.target(device)
        shapes = newton_tables.shapes_of(factors)
        widest = max(n for _, n in shapes)
        config = dict(tuning.lookup("orthogonal_iteration", widest, target))
        block = config["BLOCK"]
        addresses = tuple([tuple([x.data_ptr() for x in stack]) for stack in given])
        strides = tuple([(*factor.stride()[:2], *basis.stride()[:2]) for factor, basis, _, _ in given])
        stacks = device_table(tables.rows(shapes, addresses, strides, block), device)
        scratch = torch.empty(tables.layout(shapes, block).size, dtype=torch.float32, device=device)
        whole, lower = (newton_tables.programs(shapes, block, order, device) for order in ("square", "energy"))
        self._every = newton_tables.programs(shapes, widest, "rows", device)  # one program for each matrix
        self._tiles, self._lower = (stacks, whole, scratch), (stacks, lower, scratch)
        self._matrices = (stacks, self._every, scratch)
        self._simple: dict[str, Any] = {"BLOCK": block, "ALIGNED": aligned, "num_warps": config.get("num_warps", 4)}
        self._product: dict[str, Any] = {"ALIGNED": aligned, "enable_fp_fusion": True, **config}
        self._exact, self._coarse = (precision.resolve(purpose, target) for purpose in (precision.EXACT, precision.COARSE))
        self._grams, self._roots = (tables.matrices(scratch, shapes, block, field) for field in (tables.GRAM, tables.ROOT))
        self._dampings, self._bounds, self._active = (
            tables.numbers(scratch, shapes, field) for field in (tables.DAMPING, tables.BOUND, tables.ACTIVE)
        )

    def run(self, shifts: tuple[float, ...], max_steps: int, accept: float) -> None:
        """All attempts, then what they leave to the bases."""
        kernel.prepare_kernel[(len(self._tiles[1]),)](*self._tiles, **self._simple)
        kernel.start_kernel[(len(self._every),)](*self._matrices, least_mean(torch.float32), CHUNK=_CHUNK)
        for shift in shifts:
            self._attempt(float(shift), max_steps, float(accept))
        self._gram(tables.KEPT, tables.TRANSPOSED, tables.TRANSPOSED, False)
        kernel.commit_kernel[(len(self._tiles[1]),)](*self._tiles, CHUNK=_CHUNK, **self._simple)

    def _attempt(self, shift: float, max_steps: int, accept: float) -> None:
        """A basis with one shift, for the matrices that are active."""
        whole = (len(self._tiles[1]),)
        kernel.turn_kernel[whole](*self._tiles, shift, PRECISION=self._exact, **self._product)
        self._gram(tables.ACTIVE, tables.TRANSPOSED, tables.PAIR_ACROSS, True)
        self._find_roots(FIRST_TOLERANCE, max_steps)
        kernel.apply_kernel[whole](*self._tiles, 0, PRECISION=self._exact, **self._product)
        self._gram(tables.ACTIVE, tables.OTHER_ACROSS, tables.OTHER_ACROSS, True)
        self._find_roots(SECOND_TOLERANCE, max_steps)
        kernel.apply_kernel[whole](*self._tiles, 1, PRECISION=self._exact, **self._product)
        for number in range(CORRECTIONS + 1):
            across = (tables.PAIR_ACROSS, tables.OTHER_ACROSS)[number % 2]
            self._gram(tables.RUNNING, across, across, False)
            kernel.judge_kernel[(len(self._every),)](
                *self._matrices, number % 2, int(number == CORRECTIONS), accept, enough(torch.float32), most(torch.float32),
                CHUNK=_CHUNK,
            )  # fmt: skip
            if number < CORRECTIONS:
                kernel.correct_kernel[whole](*self._tiles, number % 2, PRECISION=self._coarse, **self._product)

    def _find_roots(self, tolerance: float, max_steps: int) -> None:
        newton.launch(self._grams, self._dampings, self._roots, self._bounds, tolerance, max_steps, active=self._active)

    def _gram(self, flag: int, left: int, right: int, starts: bool) -> None:
        kernel.gram_kernel[(len(self._lower[1]),)](
            *self._lower, flag, left, right, START=starts, PRECISION=self._exact, **self._product
        )  # fmt: skip
