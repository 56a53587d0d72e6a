"""Plans a step of the warm refresh: its scale c, the bound on the error after it, and whether to take it.

    plan        all of it, from sums over tiles; in the first step a matrix whose c M they leave far from I waits
    grow        one product of the power iteration for it, a program per block of rows: one per matrix would take too long
    conclude    what plan does, after the power iteration

c = tr M / ||M||_F^2 minimises ||I - c M||_F. Where a few eigenvalues are far above the rest, it leaves those above 2 and the
step would diverge, or the rest near 0: there c is 2 / (lower + upper) of the spectrum. After such a step no eigenvalue is far
above 1, so that in later steps an upper bound on c is enough.
"""

from __future__ import annotations

from ..runtime import tl, triton
from ..tiles import load_tile, multiply
from .tables import locate, scratch_matrix, state_of


@triton.jit
def _load_vectors(block, stride, at, n):
    """Columns of a block of 16 vectors that are kept as rows, [16, at], zero beyond their length n."""
    return tl.load(block + tl.arange(0, 16)[:, None] * stride + at[None, :], mask=(at < n)[None, :], other=0.0)


@triton.jit
def _store_vectors(block, stride, at, values, n):
    tl.store(block + tl.arange(0, 16)[:, None] * stride + at[None, :], values, mask=(at < n)[None, :])


@triton.jit
def _grow(
    energy, unit, shift, source, stride, target, norms, rows, n, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of the product of shift I - M / unit and vectors that are normalised as they are read; their squares, summed."""
    sums = tl.zeros((BLOCK, 16), tl.float32)
    for k in range(0, n, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        m = load_tile(energy, side, rows, inner, n) / unit
        sums = multiply(m, _load_vectors(source, stride, inner, n), sums, False, PRECISION)
    grown = (shift * tl.trans(_load_vectors(source, stride, rows, n)) - sums) / norms[None, :]
    _store_vectors(target, side, rows, tl.trans(grown), n)
    return tl.sum(grown * grown, 0)


@triton.jit
def _norms(growth, blocks_of_rows):
    """Norms of 16 vectors, from their squares over blocks of rows."""
    squares = tl.zeros((16,), tl.float32)
    for block in range(blocks_of_rows):
        squares += tl.load(growth + block * 16 + tl.arange(0, 16))
    return tl.maximum(tl.sqrt(squares), 1e-30)


@triton.jit
def _middle_scale(upper, below, unit):
    """2 / (lower + upper) of the spectrum, from how M / unit and upper I - M / unit lengthen vectors."""
    lower = tl.maximum(upper - 1.05 * below, 1e-3 * upper)
    return (2.0 / ((lower + upper).to(tl.float64) * unit.to(tl.float64))).to(tl.float32)


@triton.jit
def _tile_sums(partials, count, CHUNK: tl.constexpr):
    """The sum of off-diagonal squares, the rounding estimate and the sum of |T|, float64."""
    off_diagonal, rounding = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float64)
    absolute = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        largest = tl.load(partials + at * 4 + 1, mask=at < count, other=0.0).to(tl.float64)
        squares = tl.load(partials + at * 4 + 2, mask=at < count, other=0.0).to(tl.float64)
        off_diagonal += 2.0 * largest * largest * squares
        rounding += tl.load(partials + at * 4, mask=at < count, other=0.0).to(tl.float64)
        absolute += tl.load(partials + at * 4 + 3, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(off_diagonal, 0), tl.sum(rounding, 0), tl.sum(absolute, 0)


@triton.jit
def _diagonal_sums(diagonal, n, CHUNK: tl.constexpr):
    """The sums of M_ii and of M_ii^2, and the largest M_ii: of a positive semidefinite matrix it is the largest entry."""
    traces, squares = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float64)
    largest = tl.zeros((CHUNK,), tl.float32)
    for first in range(0, n, CHUNK):
        at = first + tl.arange(0, CHUNK)
        values = tl.load(diagonal + at, mask=at < n, other=0.0)
        largest = tl.maximum(largest, values)
        values = values.to(tl.float64)
        traces += values
        squares += values * values
    return tl.sum(traces, 0), tl.sum(squares, 0), tl.max(largest, 0)


@triton.jit
def _distance(diagonal, n, off_diagonal, scale, CHUNK: tl.constexpr):
    """||I - c M||_F, not from traces: they would cancel where it is small."""
    gaps = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, n, CHUNK):
        at = first + tl.arange(0, CHUNK)
        gap = 1.0 - scale * tl.load(diagonal + at, mask=at < n, other=0.0).to(tl.float64)
        gaps += tl.where(at < n, gap * gap, 0.0)
    return tl.sqrt(scale * scale * off_diagonal + tl.sum(gaps, 0))


@triton.jit
def _rounding_error(rounding, absolute, n, noise, FLUSHED: tl.constexpr):
    """Of M, in the energy norm: the estimate, and what is lost below the normal numbers, which is not relative to the result.

    Every product of T A loses half of float32's smallest number at most. A tensor core may lose all that is no normal
    number, of A as well: with FLUSHED, entries of T A T^T lose up to the smallest normal number times the rows' sums of |T|.
    """
    error = rounding * noise + absolute * (n.to(tl.float64) * 1.401298464324817e-45)
    if FLUSHED:
        error += absolute * (absolute + n.to(tl.float64)) * 1.1754943508222875e-38
    return error


@triton.jit
def _decide(state, scale, distance, rounding, tolerance):
    """A step whose bound is not finite is not taken, and all that follow would be the same."""
    error = rounding * scale
    after = (1.5 * distance * distance + 0.5 * distance * distance * distance + error).to(tl.float32)
    # A scale below the normal numbers may count as zero where it is used.
    taken = tl.where((after < float("inf")) & (scale > 1.2e-38), 1.0, 0.0)
    after = tl.where(taken == 1.0, after, float("inf"))
    # Below twice the rounding there is nothing left to gain.
    tl.store(state, tl.where(after > tl.maximum(tolerance, 2.0 * error), taken, 0.0))
    tl.store(state + 1, taken)
    tl.store(state + 3, scale)
    tl.store(state + 4, after)


@triton.jit(do_not_specialize=["iterates"])
def plan_kernel(
    stacks, matrices, scratch, iterates, tolerance, noise, iterate_above, largest_scale,
    CHUNK: tl.constexpr, FLUSHED: tl.constexpr,
):  # fmt: skip
    """What one matrix does next: c, whether it takes the step, whether it goes on after it, and the bound on its error then.

    iterates: whether a matrix that is far from I waits for the power iteration; if not, its c is at most largest_scale.
    noise: what the rounding estimate is to be multiplied by. Scalars in float64: squares of what float32 holds are beyond
    float32.
    """
    row, matrix, _, _, n, side = locate(stacks, matrices, False)
    state = state_of(row, matrix, scratch)
    if tl.load(state) == 0.0:
        tl.store(state + 1, 0.0)
        return
    diagonal = scratch + tl.load(row + 22) + matrix * side
    count = tl.load(row + 11).to(tl.int32)
    off_diagonal, rounding, absolute = _tile_sums(scratch + tl.load(row + 23) + matrix * count * 4, count, CHUNK)
    trace, squares, unit = _diagonal_sums(diagonal, n, CHUNK)
    scale = (trace / (off_diagonal + squares)).to(tl.float32)
    distance = _distance(diagonal, n, off_diagonal, scale.to(tl.float64), CHUNK)
    if distance > iterate_above:
        if iterates != 0:
            tl.store(state + 2, 1.0)
            tl.store(state + 3, unit)
            return
        scale = tl.minimum(scale, largest_scale)
        distance = _distance(diagonal, n, off_diagonal, scale.to(tl.float64), CHUNK)
    _decide(state, scale, distance, _rounding_error(rounding, absolute, n, noise, FLUSHED), tolerance)


@triton.jit(do_not_specialize=["step"])
def grow_kernel(
    stacks, programs, scratch, step,
    HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of product number `step` (0 to 2 HALF - 1) of the power iteration, for matrices that wait for it.

    The first HALF products are those of M / unit, where unit is its largest entry; the others of upper I - M / unit. Squares
    of the vectors that come out are kept for each product and block of rows.
    """
    row, matrix, block, _, n, side = locate(stacks, programs, ALIGNED)
    state = state_of(row, matrix, scratch)
    if tl.load(state + 2) == 0.0:
        return
    vectors = scratch + tl.multiple_of(tl.load(row + 24), 16) + matrix * (2 * 16) * side
    blocks_of_rows = tl.load(row + 12).to(tl.int32)
    growth = scratch + tl.load(row + 25) + matrix * (2 * HALF * 16) * blocks_of_rows
    rows = block * BLOCK + tl.arange(0, BLOCK)
    unit = tl.load(state + 3)
    shift = 0.0
    if step >= HALF:
        shift = 1.05 * tl.max(_norms(growth + (HALF - 1) * 16 * blocks_of_rows, blocks_of_rows), 0)
    source, stride = vectors + (step % 2) * (16 * side), side
    norms = tl.full((16,), 1.0, tl.float32)
    if step % HALF == 0:
        source, stride = tl.multiple_of(tl.load(row + 13).to(tl.pointer_type(tl.float32)), 16), n
    else:
        norms = _norms(growth + (step - 1) * 16 * blocks_of_rows, blocks_of_rows)
    target = vectors + ((step + 1) % 2) * (16 * side)
    energy = scratch_matrix(row, 19, matrix, scratch, n, side)
    squares = _grow(energy, unit, shift, source, stride, target, norms, rows, n, side, BLOCK, BLOCK_K, PRECISION)
    tl.store(growth + (step * blocks_of_rows + block) * 16 + tl.arange(0, 16), squares)


@triton.jit
def conclude_kernel(
    stacks, matrices, scratch, tolerance, noise,
    HALF: tl.constexpr, CHUNK: tl.constexpr, FLUSHED: tl.constexpr,
):  # fmt: skip
    """The plan of one matrix that waited for the power iteration."""
    row, matrix, _, _, n, side = locate(stacks, matrices, False)
    state = state_of(row, matrix, scratch)
    if tl.load(state + 2) == 0.0:
        return
    blocks_of_rows, count = tl.load(row + 12).to(tl.int32), tl.load(row + 11).to(tl.int32)
    growth = scratch + tl.load(row + 25) + matrix * (2 * HALF * 16) * blocks_of_rows
    off_diagonal, rounding, absolute = _tile_sums(scratch + tl.load(row + 23) + matrix * count * 4, count, CHUNK)
    upper = 1.05 * tl.max(_norms(growth + (HALF - 1) * 16 * blocks_of_rows, blocks_of_rows), 0)
    below = tl.max(_norms(growth + (2 * HALF - 1) * 16 * blocks_of_rows, blocks_of_rows), 0)
    scale = _middle_scale(upper, below, tl.load(state + 3))
    diagonal = scratch + tl.load(row + 22) + matrix * side
    distance = _distance(diagonal, n, off_diagonal, scale.to(tl.float64), CHUNK)
    _decide(state, scale, distance, _rounding_error(rounding, absolute, n, noise, FLUSHED), tolerance)
