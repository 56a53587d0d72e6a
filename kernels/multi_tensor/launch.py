"""Operations over many tensors, one launch each: squares, gradients into a stack, sums into averages, copies put back."""

from __future__ import annotations

import functools
from collections import defaultdict

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table
from ..strides import is_dense
from ..tiles import count, shares_of_each
from . import kernel

_WORDS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}  # what elements of so many bytes are copied as
_SHARES = 16  # programs for each tensor that might be restored; all but those of bad gradients end at once
_SQUARES_BLOCK = 1024 if runtime.INTERPRETED else 4096


def can_use_squares(inputs: list[Tensor], out: Tensor) -> str | None:
    """Why the kernel cannot serve these inputs; None if it can."""
    for i, source in enumerate(inputs):
        if reason := runtime.unreadable(f"inputs[{i}]", source):
            return reason
        if not is_dense(source):
            return f"inputs[{i}] of shape {tuple(source.shape)} and strides {source.stride()} has gaps"
    return None if out.dtype == torch.float32 else f"out is {out.dtype}, and the kernel sums in float32"


def launch_squares(inputs: list[Tensor], out: Tensor) -> None:
    """The Triton implementation of `squares_reference`. Shares are added in the same order every time."""
    rows: dict[tuple[torch.dtype, bool], list[tuple[int, ...]]] = defaultdict(list)
    for i, source in enumerate(inputs):
        address = source.data_ptr()
        rows[source.dtype, address % 16 == 0].append((address, source.numel(), i))
    block = _SQUARES_BLOCK
    shares = shares_of_each(count(max(source.numel() for source in inputs), block), len(inputs))
    partials = out if shares == 1 else out.new_empty(len(inputs), shares)
    for (dtype, aligned), some in rows.items():
        kernel.squares_kernel[(len(some), shares)](
            device_table(tuple(some), out.device), partials, DTYPE=runtime.TYPES[dtype], BLOCK=block, ALIGNED=aligned,
            num_warps=4,
        )  # fmt: skip
    if shares > 1:
        torch.sum(partials, 1, out=out)


def can_use_blend(
    factors: list[Tensor], sums: list[Tensor], keep: Tensor, gain: Tensor, accept: Tensor, summed: Tensor, old: Tensor
) -> str | None:
    """Why the kernel cannot serve these factors; None if it can."""
    return _unusable("factors", factors) or _unusable("sums", sums)


def _unusable(name: str, stacks: list[Tensor]) -> str | None:
    """Why kernels cannot read these stacks of matrices, or vectors, from tables of addresses."""
    for i, stack in enumerate(stacks):
        if stack.dtype != torch.float32:
            return f"{name}[{i}] is {stack.dtype}, and the kernel needs float32"
        if not stack.is_contiguous():
            return f"{name}[{i}] is not contiguous"
        if stack.shape[-1] * (stack.shape[-2] if stack.dim() > 1 else 1) >= 2**31:
            return f"{name}[{i}] has more elements than 32 bits can count"
    return None


@functools.lru_cache(maxsize=64)
def _pieces(stacks: tuple[tuple[int, ...], ...]) -> list[tuple[tuple[int, ...], ...]]:
    """Rows for `blend_kernel`, those whose addresses and sizes allow wide copies first, and then the others.

    Args:
        stacks: for each stack its address, that of its sums, the number of matrices, and that of the elements of one.
    """
    rows: list[list[tuple[int, ...]]] = [[], []]
    place = 0
    for factor, total, matrices, size in stacks:
        for i in range(matrices):
            row = (factor + 4 * size * i, total + 4 * size * i, size, place)
            rows[bool(row[0] % 16 or row[1] % 16 or size % 4)].append(row)
            place += 1
    return [tuple(some) for some in rows]


def launch_blend(
    factors: list[Tensor], sums: list[Tensor], keep: Tensor, gain: Tensor, accept: Tensor, summed: Tensor, old: Tensor
) -> None:
    """The Triton implementation of `blend_reference`."""
    stacks = tuple(
        (f.data_ptr(), s.data_ptr(), len(f) if f.dim() > 1 else 1, f[0].numel() if f.dim() > 1 else len(f))
        for f, s in zip(factors, sums, strict=True)
    )
    block = 1024
    for rows, aligned in zip(_pieces(stacks), (True, False), strict=True):
        if rows:
            shares = shares_of_each(count(max(row[2] for row in rows), block), len(rows))
            kernel.blend_kernel[(len(rows), shares)](
                device_table(rows, keep.device), keep, gain, accept.view(torch.uint8), summed.view(torch.uint8),
                old.view(torch.uint8), BLOCK=block, ALIGNED=aligned, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def can_use_traces(stacks: list[Tensor], out: Tensor) -> str | None:
    """Why the kernel cannot serve these stacks; None if it can."""
    return _unusable("stacks", stacks) or (None if out.dtype == torch.float32 else f"out is {out.dtype}")


def launch_traces(stacks: list[Tensor], out: Tensor) -> None:
    """The Triton implementation of `traces_reference`."""
    rows = _diagonals(tuple((x.data_ptr(), tuple(x.shape)) for x in stacks))
    kernel.traces_kernel[(len(rows),)](device_table(rows, out.device), out, BLOCK=1024, num_warps=4)


@functools.lru_cache(maxsize=64)
def _diagonals(stacks: tuple[tuple[int, tuple[int, ...]], ...]) -> tuple[tuple[int, ...], ...]:
    """Rows for `traces_kernel`, from addresses and shapes."""
    rows: list[tuple[int, ...]] = []
    for address, shape in stacks:
        side, matrices = shape[-1], shape[0] if len(shape) > 1 else 1
        for i in range(matrices):
            rows.append((address + 4 * side * side * i, side, side + 1 if len(shape) > 1 else 1, len(rows)))
    return tuple(rows)


def can_use_restore(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> str | None:
    """Why the kernel cannot serve these tensors; None if it can."""
    for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True)):
        if tensor.element_size() not in _WORDS:
            return f"tensors[{i}] is {tensor.dtype}, and the kernel copies elements of up to 8 bytes"
        if not is_dense(tensor) or tensor.stride() != copy.stride():
            return f"tensors[{i}] has gaps, or other strides than its copy"
    return None


def launch_restore(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> None:
    """The Triton implementation of `restore_reference`."""
    for size in sorted({tensor.element_size() for tensor in tensors}):
        rows = [
            (tensor.data_ptr(), copy.data_ptr(), tensor.numel(), i % len(finite))
            for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True))
            if tensor.element_size() == size
        ]
        kernel.restore_kernel[(len(rows), _SHARES)](
            device_table(tuple(rows), finite.device),
            finite.view(torch.uint8),
            DTYPE=getattr(runtime.tl, _WORDS[size]),
            BLOCK=1024,
            num_warps=4,
        )
