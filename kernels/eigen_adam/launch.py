"""Launches Adam in the eigenbasis: three launches for the directions of all tiles, one for their moments."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..device_tables import Table, device_table
from ..tiles import count, shares_of_each
from . import kernel
from .reference import Size

_BLOCK_M, _BLOCK_N = 32, 64
_SPAN, _DEPTH = 64, 32  # means at a time, and sums that are added for each of them at a time
_ADDED = 1024  # sums of blocks at a time
_BLOCK = 1024
_COMPILED: set[tuple[object, ...]] = set()  # kinds of `moments_kernel` that have run, on each device
Places = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]  # of stacks of one shape: their addresses, and that shape


def can_use_direction(
    rotated: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    out: list[Tensor],
    steps: Tensor,
    noise: Tensor,
    options: Tensor,
    sizes: Sequence[Size],
) -> str | None:
    """Why the kernels cannot serve these tiles; None if they can."""
    if noise.dtype != torch.float32:
        return f"noise is {noise.dtype}, and the kernel needs float32"
    return _scattered(steps=steps, noise=noise, options=options) or _unreadable(rotated, means, squares, out)


def can_use_moments(
    rotated: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: Tensor, accept: Tensor, options: Tensor
) -> str | None:
    """Why the kernel cannot serve these tiles; None if it can."""
    return _scattered(steps=steps, accept=accept, options=options) or _unreadable(rotated, means, squares)


def _scattered(**numbers: Tensor) -> str | None:
    return next((f"{name} is not contiguous" for name, x in numbers.items() if not x.is_contiguous()), None)


def _unreadable(*lists: list[Tensor]) -> str | None:
    """Why kernels cannot read these stacks from tables of addresses."""
    for stacks in lists:
        for i, stack in enumerate(stacks):
            if stack.dtype != torch.float32 or not stack.is_contiguous():
                return f"stacks[{i}] is not a contiguous float32 stack"
            if stack.shape[1] * stack.shape[2] >= 2**31:
                return f"the tiles of stacks[{i}] have more elements than 32 bits can count"
    return None


def _places(*lists: list[Tensor]) -> Places:
    """Where stacks are: what the tables below are made of and remembered by."""
    return tuple([(tuple([x.data_ptr() for x in stacks]), stacks[0].shape) for stacks in zip(*lists, strict=True)])


def _is_aligned(stacks: Places) -> bool:
    """Whether all tiles can be copied 16 bytes at a time."""
    return not any(shape[2] % 4 or any(address % 16 for address in addresses) for addresses, shape in stacks)


@functools.lru_cache(maxsize=64)
def _tiles(stacks: Places, sizes: tuple[Size, ...], block: Size) -> tuple[Table, int, int, int]:
    """Rows for the first three kernels, the length of `sums`, and the most blocks and parts of means that a tile has."""
    rows: list[tuple[int, ...]] = []
    length, blocks, parts = 0, 1, 1
    for addresses, (matrices, height, width) in stacks:
        down, across = count(height, block[0]), count(width, block[1])
        blocks, parts = max(blocks, down * across), max(parts, count(height, _SPAN) + count(width, _SPAN))
        for i in range(matrices):
            own = [address + 4 * height * width * i for address in addresses]
            rows.append((*own, *sizes[len(rows)], height, width, length))
            length += across * height + down * width + down * across + height + width
    return Table(rows), length, blocks, parts


@functools.lru_cache(maxsize=64)
def _matrices(stacks: Places) -> tuple[Table, int]:
    """Rows for `moments_kernel`, and the most elements that a tile has."""
    rows = [
        (*[address + 4 * height * width * i for address in addresses], height * width)
        for addresses, (matrices, height, width) in stacks
        for i in range(matrices)
    ]
    return Table(rows), max(row[-1] for row in rows)


def launch_direction(
    rotated: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    out: list[Tensor],
    steps: Tensor,
    noise: Tensor,
    options: Tensor,
    sizes: Sequence[Size],
) -> None:
    """The Triton implementation of `adam_direction_reference`.

    It compiles the kernel of `launch_moments`, too: that must not fail in the middle of a step.
    """
    stacks, device = _places(rotated, means, squares, out), steps.device
    aligned = _is_aligned(stacks)
    rows, length, blocks, parts = _tiles(stacks, tuple(sizes), (_BLOCK_M, _BLOCK_N))
    table = device_table(rows, device)
    sums, factors = steps.new_empty(length), steps.new_empty(len(rows), 4)
    _compile_moments(device, _is_aligned(_places(rotated, means, squares)), options)
    tile = {"BLOCK_M": _BLOCK_M, "BLOCK_N": _BLOCK_N, "num_warps": 4, "enable_fp_fusion": True}
    grid = len(rows), shares_of_each(blocks, len(rows))
    kernel.sums_kernel[grid](table, options, sums, ALIGNED=aligned, **tile)
    kernel.means_kernel[len(rows), shares_of_each(parts, len(rows))](
        table, options, noise, steps, sums, factors, SPAN=_SPAN, DEPTH=_DEPTH, ADDED=_ADDED, **tile
    )
    kernel.direction_kernel[grid](table, options, sums, factors, ALIGNED=aligned, **tile)


def _compile_moments(device: torch.device, aligned: bool, options: Tensor) -> None:
    """Launches a kernel that has not run yet for a tile that is not accepted."""
    if (device, aligned) not in _COMPILED:
        table, accept = device_table(((0, 0, 0, 0),), device), device_table((0,), device, torch.uint8)
        _launch_moments((1, 1), table, options, options.new_zeros(1, dtype=torch.float32), accept, aligned)
        _COMPILED.add((device, aligned))


def launch_moments(
    rotated: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: Tensor, accept: Tensor, options: Tensor
) -> None:
    """The Triton implementation of `adam_moments_reference`."""
    stacks = _places(rotated, means, squares)
    rows, most = _matrices(stacks)
    grid = len(rows), shares_of_each(count(most, _BLOCK), len(rows))
    table = device_table(rows, steps.device)
    _launch_moments(grid, table, options, steps, accept.view(torch.uint8), _is_aligned(stacks))


def _launch_moments(
    grid: tuple[int, int], table: Tensor, options: Tensor, steps: Tensor, accept: Tensor, aligned: bool
) -> None:
    kernel.moments_kernel[grid](
        table, options, steps, accept, BLOCK=_BLOCK, ALIGNED=aligned, num_warps=4, enable_fp_fusion=True
    )
