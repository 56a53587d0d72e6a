"""The Triton kernels of the warm refresh: T <- sqrt(c) (I + Phi(I - c M)) T with M = T (A + damping I) T^T, on lower tiles.

    prepare    T rounded for the tensor cores, and U = T^T beside it
    factor     Y = T (A + damping I)
    energy     M = Y T^T
    plan       c, the bound on the error after the step, and whether to take it: one program a matrix
    update     T and U of the next step

A TF32 tensor core cuts operands to 11 bits. T is rounded to TF32 first, and multiplied exactly from then on; A and Y are split
into two TF32 numbers each. The root that comes out is not rounded: that would undo most of the step. Every product sums rows
times rows, L R^T, because Hopper reads TF32 operands along the summed index alone; that is what U is for. The left operands are
those that are worked on after loading: they may come from registers, the right ones only from shared memory. Only lower tiles
of Y are needed: row i of T ends at its diagonal, so tile (i, j) of M, j <= i, reads Y up to column tile j.
"""

from __future__ import annotations

from ..runtime import tl, triton
from ..tiles import round_tf32, store_mirrored

# Partial sums, one row a tile: the rounding estimate, the largest off-diagonal entry, the off-diagonal squares in units of it.
PARTIALS = 4
# Flags, one row a matrix: whether it is still running, whether it takes the step that was planned.
FLAGS = 2


@triton.jit
def _load_tile(matrix, stride, rows, columns, n):
    """Zero outside of the matrix."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store_tile(matrix, stride, rows, columns, values, n):
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    tl.store(matrix + rows[:, None] * stride + columns[None, :], values, mask=inside)


@triton.jit
def _multiply(left, right, sums, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Sums + left right^T, left in two parts where the tensor core would cut it; right is a TF32 number then."""
    if SPLIT:
        high = round_tf32(left)
        sums = tl.dot(high, tl.trans(right), sums, input_precision=PRECISION)
        left = left - high
    return tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)


@triton.jit
def prepare_kernel(
    root, rounded, transposed, flags, residual, tiles, n, root_batch, root_stride, side,
    BLOCK: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix: T to TF32 (where the precision is), U; what lies above the diagonal of the root becomes zero.

    rounded, transposed: scratch with rows side apart; without ROUND, T stays in the root.
    """
    batch = tl.program_id(1).to(tl.int64)
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    root += batch * root_batch
    transposed += batch * n * side
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    below = rows[:, None] >= columns[None, :]
    values = tl.where(below, _load_tile(root, root_stride, rows, columns, n), 0.0)
    beyond = tl.trans((rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] > columns[None, :]))
    tl.store(root + columns[:, None] * root_stride + rows[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), mask=beyond)
    if ROUND:
        values = round_tf32(values)
        _store_tile(rounded + batch * n * side, side, rows, columns, values, n)
    _store_tile(transposed, side, columns, rows, tl.trans(values), n)
    if tl.program_id(0) == 0:
        tl.store(flags + batch * 2, 1)
        tl.store(flags + batch * 2 + 1, 0)
        tl.store(residual + batch, float("inf"))


@triton.jit
def factor_kernel(
    factor, damping, root, product, partials, flags, tiles, n, factor_batch, factor_stride, root_batch, root_stride, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of Y = T A + damping T, and its share of the rounding estimate, sum_ik B_kk T_ik^2."""
    tl.static_assert(BLOCK % BLOCK_K == 0, "sums must end at the diagonal tile: what lies right of it was never stored")
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 2) == 0:
        return
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    factor += batch * factor_batch
    root += batch * root_batch
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)  # transposed: A is the operand that is split
    for k in range(0, tl.minimum((i + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a = _load_tile(factor, factor_stride, columns, inner, n)  # A is symmetric
        sums = _multiply(a, _load_tile(root, root_stride, rows, inner, n), sums, SPLIT, PRECISION)
    shift = tl.load(damping + batch)
    t = _load_tile(root, root_stride, rows, columns, n)
    _store_tile(product + batch * n * side, side, rows, columns, tl.trans(sums) + shift * t, n)
    diagonal = tl.load(factor + columns * (factor_stride + 1), mask=columns < n, other=0.0) + shift
    partial = partials + (batch * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(partial, tl.sum(diagonal[None, :] * (t * t)))


@triton.jit
def energy_kernel(
    product, root, energy, partials, flags, tiles, n, root_batch, root_stride, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of M = Y T^T and its mirror image, and its share of the off-diagonal norm.

    The share is the largest entry and the sum of squares in units of it, because squares may be beyond float32.
    """
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 2) == 0:
        return
    i, j = tl.load(tiles + tl.program_id(0) * 2), tl.load(tiles + tl.program_id(0) * 2 + 1)
    product += batch * n * side
    root += batch * root_batch
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, tl.minimum((j + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        y = _load_tile(product, side, rows, inner, n)
        sums = _multiply(y, _load_tile(root, root_stride, columns, inner, n), sums, SPLIT, PRECISION)
    store_mirrored(energy + batch * n * side, side, rows, columns, sums, n)
    below = tl.where(rows[:, None] > columns[None, :], sums, 0.0)  # rows beyond the matrix were loaded as zeros
    largest = tl.max(tl.abs(below))
    shares = below / tl.maximum(largest, 1.2e-38)
    partial = partials + (batch * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(partial + 1, largest)
    tl.store(partial + 2, tl.sum(shares * shares))


@triton.jit
def _load_vectors(block, side, at, n):
    """Columns of a block of 16 vectors that are kept as rows, [16, at], zero beyond their length n."""
    return tl.load(block + tl.arange(0, 16)[:, None] * side + at[None, :], mask=(at < n)[None, :], other=0.0)


@triton.jit
def _store_vectors(block, side, at, values, n):
    tl.store(block + tl.arange(0, 16)[:, None] * side + at[None, :], values, mask=(at < n)[None, :])


@triton.jit
def _largest_growth(
    energy, unit, shift, probes, blocks, n, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Power iteration on shift I - M / unit from 16 probes: the largest factor by which its last product lengthens one.

    blocks: room for two blocks of vectors. They are stored as they come and normalised when they are read.
    """
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        _store_vectors(blocks, side, at, _load_vectors(probes, n, at, n), n)
    norms = tl.full((16,), 1.0, tl.float32)
    for step in range(4):
        tl.debug_barrier()  # what is read next, other threads of this program have written
        source, target = blocks + (step % 2) * (16 * side), blocks + ((step + 1) % 2) * (16 * side)
        squares = tl.zeros((16,), tl.float32)
        for first in range(0, n, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            sums = tl.zeros((BLOCK, 16), tl.float32)
            for k in range(0, n, BLOCK_K):
                inner = k + tl.arange(0, BLOCK_K)
                m = _load_tile(energy, side, rows, inner, n) / unit
                sums = _multiply(m, _load_vectors(source, side, inner, n), sums, False, PRECISION)
            grown = (shift * tl.trans(_load_vectors(source, side, rows, n)) - sums) / norms[None, :]
            squares += tl.sum(grown * grown, 0)
            _store_vectors(target, side, rows, tl.trans(grown), n)
        norms = tl.maximum(tl.sqrt(squares), 1e-30)
    tl.debug_barrier()
    return tl.max(norms, 0)


@triton.jit
def _diagonal_gap(energy, side, n, scale, BLOCK: tl.constexpr):
    """The sum of (1 - c M_ii)^2."""
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        gap = 1.0 - scale * tl.load(energy + at * (side + 1), mask=at < n, other=0.0).to(tl.float64)
        total += tl.where(at < n, gap * gap, 0.0)
    return tl.sum(total, 0)


@triton.jit
def _largest_entry(energy, side, n, BLOCK: tl.constexpr):
    """Of a positive semidefinite matrix: it is on the diagonal."""
    largest = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(energy + at * (side + 1), mask=at < n, other=0.0))
    return tl.max(largest, 0)


@triton.jit
def plan_kernel(
    energy, partials, flags, scales, residual, probes, blocks, n, side, count, tolerance, noise, scale_above,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one matrix does next: c, whether it takes the step, whether it goes on after it, and the residual it then has.

    A step whose bound is not finite is not taken, and all that follow would be the same. noise: what the rounding estimate is
    to be multiplied by. Scalars in float64: squares of what float32 holds are beyond float32.
    """
    batch = tl.program_id(0).to(tl.int64)
    if tl.load(flags + batch * 2) == 0:
        tl.store(flags + batch * 2 + 1, 0)
        return
    energy += batch * n * side
    partials += batch * count * 4
    off_diagonal, rounding = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        largest = tl.load(partials + at * 4 + 1, mask=at < count, other=0.0).to(tl.float64)
        squares = tl.load(partials + at * 4 + 2, mask=at < count, other=0.0).to(tl.float64)
        off_diagonal += 2.0 * largest * largest * squares
        rounding += tl.load(partials + at * 4, mask=at < count, other=0.0).to(tl.float64)
    apart = tl.sum(off_diagonal, 0)
    distance = tl.sqrt(apart + _diagonal_gap(energy, side, n, 1.0, BLOCK))
    scale = tl.full((), 1.0, tl.float32)
    if distance > scale_above:
        unit = _largest_entry(energy, side, n, BLOCK)
        own = blocks + batch * (2 * 16) * side
        upper = 1.05 * _largest_growth(energy, unit, 0.0, probes, own, n, side, BLOCK, BLOCK_K, PRECISION)
        below = 1.05 * _largest_growth(energy, unit, upper, probes, own, n, side, BLOCK, BLOCK_K, PRECISION)
        lower = tl.maximum(upper - below, 1e-3 * upper)
        scale = (2.0 / ((lower + upper).to(tl.float64) * unit.to(tl.float64))).to(tl.float32)
        exact = scale.to(tl.float64)
        distance = tl.sqrt(exact * exact * apart + _diagonal_gap(energy, side, n, exact, BLOCK))
    error = tl.sum(rounding, 0) * noise * scale
    after = (1.5 * distance * distance + 0.5 * distance * distance * distance + error).to(tl.float32)
    # A scale below the normal numbers may count as zero where it is used.
    taken = tl.where((after < float("inf")) & (scale > 1.2e-38), 1, 0)
    after = tl.where(taken == 1, after, float("inf"))
    tl.store(scales + batch, scale)
    tl.store(residual + batch, after)
    tl.store(flags + batch * 2 + 1, taken)
    # Below twice the rounding there is nothing left to gain.
    tl.store(flags + batch * 2, tl.where(after > tl.maximum(tolerance, 2.0 * error), taken, 0))


@triton.jit
def update_kernel(
    energy, root, rounded, transposed, next_transposed, flags, scales, tiles, n,
    root_batch, root_stride, rounded_batch, rounded_stride, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of sqrt(c) (T + Phi(I - c M) T): as it is to the root, rounded to T and U.

    In place: of T, a program reads its own tile alone. Phi T is zero between column j's first row and the diagonal's end.
    """
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 2 + 1) == 0:
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
        m = scale * _load_tile(energy, side, rows, inner, n)
        phi = tl.where(rows[:, None] > inner[None, :], -m, tl.where(rows[:, None] == inner[None, :], 0.5 - 0.5 * m, 0.0))
        sums = _multiply(phi, _load_tile(transposed, side, columns, inner, n), sums, False, PRECISION)
    t = _load_tile(rounded, rounded_stride, rows, columns, n)
    values = tl.where(rows[:, None] >= columns[None, :], tl.sqrt(scale) * (t + sums), 0.0)
    _store_tile(root, root_stride, rows, columns, values, n)
    if ROUND:
        values = round_tf32(values)
        _store_tile(rounded, rounded_stride, rows, columns, values, n)
    _store_tile(next_transposed + batch * n * side, side, columns, rows, tl.trans(values), n)
