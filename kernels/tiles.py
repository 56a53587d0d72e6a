"""Tiles of symmetric matrices, shared by the kernels: tables made on the host, loads and stores on the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .runtime import tl, triton

ALIGNMENT = 16  # in elements: rows of scratch start a multiple of 64 bytes apart
_ENOUGH_PROGRAMS, _LEAST_SHARES = 4096, 16  # of a launch, about; and of one tensor, if there are many
MOST_MATRICES = 65535  # a grid has no more programs along its second axis


def tile_order(tiles: int) -> list[tuple[int, int]]:
    """(i, j) of every tile on and below the diagonal of a matrix of tiles x tiles.

    In bands of columns: neighbours in the list share operands, which are then loaded into a cache only once.
    """
    band = 8
    starts = range(0, tiles, band)
    return [(i, j) for start in starts for i in range(start, tiles) for j in range(start, min(i + 1, start + band))]


@functools.cache  # for good: a CUDA graph goes on reading them
def lower_tiles(tiles: int, device: torch.device) -> Tensor:
    """`tile_order` as int32 (count, 2)."""
    return torch.tensor(tile_order(tiles), dtype=torch.int32, device=device).reshape(-1, 2)


def count(size: int, block: int) -> int:
    """Tiles of this block that cover a side."""
    return -(-size // block)


def shares_of_each(blocks: int, tensors: int) -> int:
    """Programs for each of some tensors of which the largest has so many blocks, in one launch for all of them.

    One for each block, unless the launch would have many more programs than any GPU runs at a time.
    """
    return max(1, min(blocks, max(_LEAST_SHARES, count(_ENOUGH_PROGRAMS, tensors))))


def padded(size: int) -> int:
    """The distance between rows of scratch that have this many columns."""
    return count(size, ALIGNMENT) * ALIGNMENT


@triton.jit
def store_mirrored(pointer, stride, rows, columns, values, n):
    """Stores the part of a tile that lies on or below the diagonal, and its mirror image: bitwise symmetric.

    Tiles must be square: then only this program reads or writes either place.
    """
    inside = (rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] >= columns[None, :])
    tl.store(pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], values, mask=inside)
    tl.store(pointer + columns[:, None].to(tl.int64) * stride + rows[None, :], tl.trans(values), mask=tl.trans(inside))


@triton.jit
def round_tf32(values):
    """Nearest TF32 number, ties to even. The tensor core multiplies it exactly; of other numbers it would cut bits off.

    NaN stays NaN: rounding the bits of some NaNs would carry over into those of zero.
    """
    bits = values.to(tl.int32, bitcast=True)
    bits = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)


@triton.jit
def load_tile(matrix, stride, rows, columns, n):
    """Zero outside of the matrix."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def store_tile(matrix, stride, rows, columns, values, n):
    """The part that is inside of the matrix."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(matrix + rows[:, None] * stride + columns[None, :], values, mask=inside)


@triton.jit
def multiply(left, right, sums, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums + left right^T. With SPLIT, right is a TF32 number, and left, which the tensor core would cut, is split in two."""
    if SPLIT:
        high = round_tf32(left)
        sums = tl.dot(high, tl.trans(right), sums, input_precision=PRECISION)
        left = left - high
    return tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)
