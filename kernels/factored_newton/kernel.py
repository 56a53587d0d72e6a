"""The Triton kernels of the warm refresh: T <- sqrt(c) (I + Phi(I - c M)) T with M = T (A + damping I) T^T, on lower tiles.

    prepare    T rounded for the tensor cores, and U = T^T beside it
    factor     Y = T (A + damping I)
    energy     M = Y T^T, and its diagonal by itself
    plan       c, the bound on the error after the step, and whether to take it: a program per matrix, which reads M only where
               the scale computed from sums leaves c M far from I
    update     T and U of the next step

A TF32 tensor core cuts operands to 11 bits. T is rounded to TF32 first, and multiplied exactly from then on; A and Y are split
into two TF32 numbers each. The root that comes out is not rounded: that would undo most of the step. Every product sums rows
times rows, L R^T, because Hopper reads TF32 operands along the summed index alone; that is what U is for. The left operands are
those that change after loading: they may come from registers, the right ones only from shared memory. Only lower tiles
of Y are needed: row i of T ends at its diagonal, so tile (i, j) of M, j <= i, reads Y up to column tile j.
"""

from __future__ import annotations

from ..runtime import tl, triton
from ..tiles import load_tile, multiply, round_tf32, store_mirrored, store_tile

# Partial sums, one row per tile: rounding estimate, largest off-diagonal entry, the off-diagonal squares in units of it.
PARTIALS = 4
# Flags, one row per matrix: whether it is still running, whether it takes the planned step, whether that step waits for the
# power iteration.
FLAGS = 3


@triton.jit
def prepare_kernel(
    root, rounded, transposed, flags, residual, tiles, n, root_batch, root_stride, side,
    BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix: T rounded to TF32 (with ROUND) and U; the root becomes zero above the diagonal.

    rounded, transposed: scratch with rows side apart; without ROUND, T stays in the root.
    """
    batch = tl.program_id(1).to(tl.int64)
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    root += batch * root_batch
    transposed += batch * n * side
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    below = rows[:, None] >= columns[None, :]
    values = tl.where(below, load_tile(root, root_stride, rows, columns, n), 0.0)
    beyond = tl.trans((rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] > columns[None, :]))
    tl.store(root + columns[:, None] * root_stride + rows[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), mask=beyond)
    if ROUND:
        values = round_tf32(values)
        store_tile(rounded + batch * n * side, side, rows, columns, values, n)
    store_tile(transposed, side, columns, rows, tl.trans(values), n)
    if tl.program_id(0) == 0:
        tl.store(flags + batch * 3, 1)
        tl.store(flags + batch * 3 + 1, 0)
        tl.store(flags + batch * 3 + 2, 0)
        tl.store(residual + batch, float("inf"))


@triton.jit
def factor_kernel(
    factor, damping, root, product, partials, flags, tiles, n, factor_batch, factor_stride, root_batch, root_stride, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of Y = T A + damping T, and its share of the rounding estimate, sum_ik B_kk T_ik^2."""
    tl.static_assert(BLOCK % BLOCK_K == 0, "sums must end at the diagonal tile: what lies right of it was never stored")
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 3) == 0:
        return
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    factor += batch * factor_batch
    root += batch * root_batch
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)  # transposed: A is the operand that is split
    for k in range(0, tl.minimum((i + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a = load_tile(factor, factor_stride, columns, inner, n)  # A is symmetric
        sums = multiply(a, load_tile(root, root_stride, rows, inner, n), sums, SPLIT, PRECISION)
    shift = tl.load(damping + batch)
    t = load_tile(root, root_stride, rows, columns, n)
    store_tile(product + batch * n * side, side, rows, columns, tl.trans(sums) + shift * t, n)
    diagonal = tl.load(factor + columns * (factor_stride + 1), mask=columns < n, other=0.0) + shift
    partial = partials + (batch * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(partial, tl.sum(diagonal[None, :] * (t * t)))


@triton.jit
def energy_kernel(
    product, root, energy, diagonal, partials, flags, tiles, n, root_batch, root_stride, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of M = Y T^T and its mirror image, its part of the diagonal, and its share of the off-diagonal norm.

    The share is the largest entry and the sum of squares in units of it, because squares may be beyond float32.
    """
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 3) == 0:
        return
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    product += batch * n * side
    root += batch * root_batch
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, tl.minimum((j + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        y = load_tile(product, side, rows, inner, n)
        sums = multiply(y, load_tile(root, root_stride, columns, inner, n), sums, SPLIT, PRECISION)
    store_mirrored(energy + batch * n * side, side, rows, columns, sums, n)
    if i == j:
        own = tl.sum(tl.where(rows[:, None] == columns[None, :], sums, 0.0), 1)
        tl.store(diagonal + batch * side + rows, own, mask=rows < n)
    below = tl.where(rows[:, None] > columns[None, :], sums, 0.0)  # rows beyond the matrix were loaded as zeros
    largest = tl.max(tl.abs(below))
    shares = below / tl.maximum(largest, 1.2e-38)
    partial = partials + (batch * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(partial + 1, largest)
    tl.store(partial + 2, tl.sum(shares * shares))


@triton.jit
def update_kernel(
    energy, root, rounded, transposed, next_transposed, flags, scales, tiles, n,
    root_batch, root_stride, rounded_batch, rounded_stride, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of sqrt(c) (T + Phi(I - c M) T): as it is to the root, rounded to T and U.

    In place: a program reads only its own tile of T. Phi T is zero between column j's first row and the diagonal's end.
    """
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 3 + 1) == 0:
        return
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    energy += batch * n * side
    root += batch * root_batch
    rounded += batch * rounded_batch
    transposed += batch * n * side
    scale = tl.load(scales + batch)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(j * BLOCK, tl.minimum((i + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        m = scale * load_tile(energy, side, rows, inner, n)
        phi = tl.where(rows[:, None] > inner[None, :], -m, tl.where(rows[:, None] == inner[None, :], 0.5 - 0.5 * m, 0.0))
        sums = multiply(phi, load_tile(transposed, side, columns, inner, n), sums, False, PRECISION)
    t = load_tile(rounded, rounded_stride, rows, columns, n)
    values = tl.where(rows[:, None] >= columns[None, :], tl.sqrt(scale) * (t + sums), 0.0)
    store_tile(root, root_stride, rows, columns, values, n)
    if ROUND:
        values = round_tf32(values)
        store_tile(rounded, rounded_stride, rows, columns, values, n)
    store_tile(next_transposed + batch * n * side, side, columns, rows, tl.trans(values), n)
