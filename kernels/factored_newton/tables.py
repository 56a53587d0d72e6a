"""Tables from which the kernels of the warm refresh know what to do: made on the host, read on the device.

The table of stacks has a row for each stack: addresses, strides, sizes, and where its parts of the scratch memory start. A
table of programs has a row for each program of a launch: the stack, the matrix in it, and a tile of that matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table
from ..runtime import tl, triton
from ..tiles import ALIGNMENT, count, padded, tile_order

# Columns of the table of stacks, int64. Strides and places in the scratch memory are in elements.
FACTOR, FACTOR_BATCH, FACTOR_STRIDE, ROOT, ROOT_BATCH, ROOT_STRIDE, DAMPING, RESIDUAL = range(8)
N, SIDE, FIRST, TILES, BLOCKS_OF_ROWS, PROBES, USED, FALLBACKS, REFUSED = range(8, 17)
TRANSPOSED, PRODUCT, ENERGY, ROUNDED, BACKUP, DIAGONAL, PARTIALS, VECTORS, GROWTH = range(17, 26)
ACTIVE = 26
STACK_FIELDS = 32
# State of a matrix, float32: whether it is still running, whether it takes the planned step, whether that step waits for the
# power iteration, its scale, and the bound on the error so far.
STATE = 8
# Partial sums, one row per tile: rounding estimate, largest off-diagonal entry, the off-diagonal squares in units of it, and
# the absolute values of T.
PARTIAL = 4
PROBE_COUNT = 16  # vectors of the power iteration
_KEPT = 64  # cached tables; a training loop repeats a handful

Shapes = tuple[tuple[int, int], ...]  # of each stack, the number of matrices and their side


@dataclass(frozen=True)
class Layout:
    """Parts of the scratch memory, in elements: of each stack from TRANSPOSED to GROWTH, and the size of all."""

    places: tuple[tuple[int, ...], ...]
    size: int


@functools.lru_cache(maxsize=_KEPT)
def layout(shapes: Shapes, block: int, block_of_rows: int, products: int, rounds: bool, keeps: bool) -> Layout:
    """One allocation for all stacks. It begins with the states of all matrices.

    Args:
        shapes: of the stacks.
        block: side of a tile.
        block_of_rows: rows of a matrix that a program of the power iteration takes.
        products: of the power iteration.
        rounds: whether there is a copy of T rounded for the tensor cores.
        keeps: whether there is one of the T that came in.
    """
    end = STATE * sum(batch for batch, _ in shapes)
    places = []
    for batch, n in shapes:
        side, tiles, blocks = padded(n), count(n, block) * (count(n, block) + 1) // 2, count(n, block_of_rows)
        matrix = n * side
        sizes = (
            matrix, matrix, matrix, rounds * matrix, keeps * matrix, side, tiles * PARTIAL,
            2 * PROBE_COUNT * side, products * PROBE_COUNT * blocks,
        )  # fmt: skip
        starts = []
        for size in sizes:
            end = padded(end)
            starts.append(end)
            end += batch * size
        places.append(tuple(starts))
    return Layout(tuple(places), end)


@functools.lru_cache(maxsize=_KEPT)
def _rows(shapes: Shapes, block: int, order: str) -> tuple[tuple[int, ...], ...]:
    """Rows of a table of programs, those with the longest sums first, so that no long one starts last.

    In T A ("factor") the sum of tile (i, j) has i + 1 terms, in M ("energy") j + 1, in Phi T ("update") i - j + 1. With "rows"
    a program has a block of rows of M. With "square" there is a program for each tile of a whole matrix, as for X T^T, whose
    sums have j + 1 terms.
    """
    rows = []
    for stack, (batch, n) in enumerate(shapes):
        blocks = count(n, block)
        if order == "rows":
            tiles = [(i, 0) for i in range(blocks)]
        elif order == "square":
            tiles = [(i, j) for j in range(blocks) for i in range(blocks)]
        else:
            tiles = tile_order(blocks)
        rows += [(stack, matrix, *tile) for matrix in range(batch) for tile in tiles]
    lengths: dict[str, Callable[[tuple[int, ...]], int]] = {
        "factor": lambda row: row[2], "energy": lambda row: row[3], "update": lambda row: row[2] - row[3],
        "rows": lambda row: shapes[row[0]][1], "square": lambda row: row[3],
    }  # fmt: skip
    length = lengths[order]
    return tuple(sorted(rows, key=lambda row: -length(row)))


@functools.lru_cache(maxsize=_KEPT)
def _cached_programs(shapes: Shapes, block: int, order: str, device: torch.device) -> Tensor:
    return device_table(_rows(shapes, block, order), device, torch.int32)


def programs(shapes: Shapes, block: int, order: str, device: torch.device) -> Tensor:
    """The table of a launch, int32 (programs, 4): stack, matrix, tile row i (or block of rows), tile column j.

    Cached by what it is made of, because its rows would be too many to compare in every step. A recorded graph gets a table of
    its own, see `device_table`.

    Args:
        shapes: of the stacks.
        block: side of a tile, or rows of a block.
        order: which sums the programs compute: "factor", "energy", "update", "rows" or "square".
        device: of the table.
    """
    if runtime.is_recording():
        return device_table(_rows(shapes, block, order), device, torch.int32)
    return _cached_programs(shapes, block, order, device)


def shapes_of(stacks: Sequence[Tensor]) -> Shapes:
    """The number of matrices and their side, of each stack."""
    return tuple((stack.shape[0], stack.shape[1]) for stack in stacks)


def is_aligned(factor: Tensor, root: Tensor) -> bool:
    """Whether rows of both can be copied 16 bytes at a time, and tiles are full."""
    return factor.shape[1] % ALIGNMENT == 0 and all(
        x.data_ptr() % 16 == x.stride(0) % ALIGNMENT == x.stride(1) % ALIGNMENT == 0 for x in (factor, root)
    )


def why_not(name: str, stack: Tensor) -> str | None:
    """Why the kernels cannot read or write a stack of matrices; None if they can."""
    n = stack.shape[1]
    if stack.dtype != torch.float32:
        return f"{name} is {stack.dtype}, and the kernel needs float32"
    if n == 0:
        return f"the matrices of {name} are empty"
    if n > 1 and stack.stride(2) != 1:
        return f"{name} has columns {stack.stride(2)} elements apart, and the kernel needs adjacent ones"
    if n * max(stack.stride(1), n + ALIGNMENT) >= 2**31:
        return f"{name} has matrices with more elements than 32 bits can count"
    return None


@triton.jit
def locate(stacks, programs, ALIGNED: tl.constexpr):
    """What this program does: row of the stack, matrix, tile (i, j), side n of the matrix, stride of its scratch memory."""
    program = programs + tl.program_id(0).to(tl.int64) * 4
    row = stacks + tl.load(program) * 32
    n, side = tl.load(row + 8).to(tl.int32), tl.multiple_of(tl.load(row + 9).to(tl.int32), 16)
    if ALIGNED:
        n = tl.multiple_of(n, 16)
    return row, tl.load(program + 1).to(tl.int64), tl.load(program + 2), tl.load(program + 3), n, side


@triton.jit
def state_of(row, matrix, scratch):
    """The state of a matrix."""
    return scratch + (tl.load(row + 10) + matrix) * 8


@triton.jit
def matrix_of(row, FIELD: tl.constexpr, matrix, ALIGNED: tl.constexpr):
    """A matrix of the caller, A or T, and the stride of its rows. FIELD: that of its address, which the strides follow."""
    address, batch = tl.load(row + FIELD).to(tl.pointer_type(tl.float32)), tl.load(row + FIELD + 1)
    stride = tl.load(row + FIELD + 2).to(tl.int32)
    if ALIGNED:  # with these hints, copies are 16 bytes wide and asynchronous
        address, batch, stride = tl.multiple_of(address, 16), tl.multiple_of(batch, 16), tl.multiple_of(stride, 16)
    return address + matrix * batch, stride


@triton.jit
def scratch_matrix(row, field, matrix, scratch, n, side):
    """A matrix in the scratch memory."""
    return scratch + tl.multiple_of(tl.load(row + field), 16) + matrix * n * side


@triton.jit
def number_of(row, FIELD: tl.constexpr, matrix, DTYPE: tl.constexpr):
    """The address of a number that the caller keeps for each matrix."""
    return tl.load(row + FIELD).to(tl.pointer_type(DTYPE)) + matrix
