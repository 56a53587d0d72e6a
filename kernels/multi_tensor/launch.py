"""Operations over many tensors, one launch each: squares, gradients into a stack, sums into averages, copies put back."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import Table, device_table
from ..strides import is_dense
from ..tiles import count, shares_of_each
from . import kernel
from .diagonals import runs_of

_WORDS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}  # what elements of so many bytes are copied as
_SHARES = 16  # programs for each tensor that might be restored; all but those of bad gradients end at once
_SQUARES_BLOCK = 1024 if runtime.INTERPRETED else 4096


def can_use_squares(inputs: list[Tensor], out: Tensor) -> str | None:
    """Why the kernel cannot serve these inputs; None if it can."""
    for i, source in enumerate(inputs):
        if source.dtype not in runtime.TYPES:
            return runtime.unreadable(f"inputs[{i}]", source)
        if not (source.is_contiguous() or is_dense(source)):
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
    factors: list[Tensor],
    sums: list[Tensor],
    keep: Tensor,
    gain: Tensor,
    accept: Tensor,
    summed: Tensor,
    old: Tensor,
    sizes: Sequence[int] = (),
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


def _places(stacks: list[Tensor]) -> tuple[tuple[int, torch.Size], ...]:
    """Where stacks are: what the tables below are made of and remembered by."""
    return tuple([(stack.data_ptr(), stack.shape) for stack in stacks])


Places = tuple[tuple[int, tuple[int, ...]], ...]


def _matrices(stacks: Places, sizes: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """Address and side of every matrix, and whether only its diagonal is there."""
    runs = iter(runs_of(sizes, tuple(shape[0] for _, shape in stacks if len(shape) == 1)) or ())
    found = []
    for address, shape in stacks:
        if len(shape) > 1:
            found += [(address + 4 * shape[1] * shape[2] * i, shape[1], False) for i in range(shape[0])]
            continue
        run = next(runs)
        starts = itertools.accumulate(run, initial=0)
        found += [(address + 4 * start, size, True) for start, size in zip(starts, run, strict=False)]
    return found


@functools.lru_cache(maxsize=64)
def _pairs(factors: Places, sums: Places, sizes: tuple[int, ...]) -> list[Table]:
    """Rows for `blend_kernel`, those whose addresses and sizes allow wide copies first, and then the others."""
    rows: list[list[tuple[int, ...]]] = [[], []]
    pairs = zip(_matrices(factors, sizes), _matrices(sums, sizes), strict=True)
    for place, ((factor, side, is_diagonal), (total, *_)) in enumerate(pairs):
        size = side if is_diagonal else side * side
        rows[bool(factor % 16 or total % 16 or size % 4)].append((factor, total, size, place))
    return [Table(some) for some in rows]


def launch_blend(
    factors: list[Tensor],
    sums: list[Tensor],
    keep: Tensor,
    gain: Tensor,
    accept: Tensor,
    summed: Tensor,
    old: Tensor,
    sizes: Sequence[int] = (),
) -> None:
    """The Triton implementation of `blend_reference`."""
    block = 1024
    for rows, aligned in zip(_pairs(_places(factors), _places(sums), tuple(sizes)), (True, False), strict=True):
        if rows:
            shares = shares_of_each(count(max([row[2] for row in rows]), block), len(rows))
            kernel.blend_kernel[(len(rows), shares)](
                device_table(rows, keep.device), keep, gain, accept.view(torch.uint8), summed.view(torch.uint8),
                old.view(torch.uint8), BLOCK=block, ALIGNED=aligned, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def can_use_traces(stacks: list[Tensor], out: Tensor, sizes: Sequence[int] = ()) -> str | None:
    """Why the kernel cannot serve these stacks; None if it can."""
    return _unusable("stacks", stacks) or (None if out.dtype == torch.float32 else f"out is {out.dtype}")


def launch_traces(stacks: list[Tensor], out: Tensor, sizes: Sequence[int] = ()) -> None:
    """The Triton implementation of `traces_reference`."""
    rows = _diagonals(_places(stacks), tuple(sizes))
    kernel.traces_kernel[(len(rows),)](device_table(rows, out.device), out, BLOCK=1024, num_warps=4)


@functools.lru_cache(maxsize=64)
def _diagonals(stacks: Places, sizes: tuple[int, ...]) -> Table:
    """Rows for `traces_kernel`."""
    return Table(
        (address, side, 1 if is_diagonal else side + 1, place)
        for place, (address, side, is_diagonal) in enumerate(_matrices(stacks, sizes))
    )


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
