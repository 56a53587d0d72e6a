"""Plans a step of the warm refresh: its scale c, the bound on the error after it, and whether to take it.

    plan        all of it, from sums over tiles; where those leave c M far from I, the power iteration as well
    grow        one product of the power iteration, one program per block of rows: one per matrix would take too long
    conclude    what plan does after the power iteration

c = tr M / ||M||_F^2 minimises ||I - c M||_F. Where a few eigenvalues are far above the rest, it leaves those above 2 and the
step would diverge, or the rest near 0: there c is 2 / (lower + upper) of the spectrum.
"""

from __future__ import annotations

from ..runtime import tl, triton
from ..tiles import load_tile, multiply

# Products of the power iteration: four for the upper end of the spectrum, four for the lower one.
PRODUCTS = 8


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
def _largest_growth(
    energy, unit, shift, probes, blocks, n, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Power iteration on shift I - M / unit from 16 probes: the largest factor by which its last product lengthens one.

    blocks: room for two blocks of vectors.
    """
    for first in range(0, n, BLOCK):
        at = first + tl.arange(0, BLOCK)
        _store_vectors(blocks, side, at, _load_vectors(probes, n, at, n), n)
    norms = tl.full((16,), 1.0, tl.float32)
    for step in range(4):
        tl.debug_barrier()  # other threads of this program have written what is read next
        source, target = blocks + (step % 2) * (16 * side), blocks + ((step + 1) % 2) * (16 * side)
        squares = tl.zeros((16,), tl.float32)
        for first in range(0, n, BLOCK):
            rows = first + tl.arange(0, BLOCK)
            squares += _grow(energy, unit, shift, source, side, target, norms, rows, n, side, BLOCK, BLOCK_K, PRECISION)
        norms = tl.maximum(tl.sqrt(squares), 1e-30)
    tl.debug_barrier()
    return tl.max(norms, 0)


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
    """The sum of off-diagonal squares and the rounding estimate, float64."""
    off_diagonal, rounding = tl.zeros((CHUNK,), tl.float64), tl.zeros((CHUNK,), tl.float64)
    for first in range(0, count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        largest = tl.load(partials + at * 4 + 1, mask=at < count, other=0.0).to(tl.float64)
        squares = tl.load(partials + at * 4 + 2, mask=at < count, other=0.0).to(tl.float64)
        off_diagonal += 2.0 * largest * largest * squares
        rounding += tl.load(partials + at * 4, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(off_diagonal, 0), tl.sum(rounding, 0)


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
def _decide(flags, scales, residual, scale, distance, rounding, tolerance):
    """A step whose bound is not finite is not taken, and all that follow would be the same."""
    error = rounding * scale
    after = (1.5 * distance * distance + 0.5 * distance * distance * distance + error).to(tl.float32)
    # A scale below the normal numbers may count as zero where it is used.
    taken = tl.where((after < float("inf")) & (scale > 1.2e-38), 1, 0)
    after = tl.where(taken == 1, after, float("inf"))
    tl.store(scales, scale)
    tl.store(residual, after)
    tl.store(flags + 1, taken)
    # Below twice the rounding there is nothing left to gain.
    tl.store(flags, tl.where(after > tl.maximum(tolerance, 2.0 * error), taken, 0))


@triton.jit
def plan_kernel(
    energy, diagonal, partials, flags, scales, residual, probes, blocks, n, side, count, tolerance, noise, iterate_above,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, SPREAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one matrix does next: c, whether it takes the step, whether it goes on after it, and the residual it then has.

    noise: what the rounding estimate is to be multiplied by. Scalars in float64: squares of what float32 holds are beyond
    float32. SPREAD: leave the power iteration, and all that follows from it, to the other two kernels.
    """
    batch = tl.program_id(0).to(tl.int64)
    flags += batch * 3
    if tl.load(flags) == 0:
        tl.store(flags + 1, 0)
        return
    diagonal += batch * side
    off_diagonal, rounding = _tile_sums(partials + batch * count * 4, count, CHUNK)
    trace, squares, unit = _diagonal_sums(diagonal, n, CHUNK)
    scale = (trace / (off_diagonal + squares)).to(tl.float32)
    distance = _distance(diagonal, n, off_diagonal, scale.to(tl.float64), CHUNK)
    if SPREAD:
        waits = distance > iterate_above
        tl.store(flags + 2, tl.where(waits, 1, 0))
        if waits:
            tl.store(scales + batch, unit)
            return
    elif distance > iterate_above:
        energy += batch * n * side
        blocks += batch * (2 * 16) * side
        upper = 1.05 * _largest_growth(energy, unit, 0.0, probes, blocks, n, side, BLOCK, BLOCK_K, PRECISION)
        below = _largest_growth(energy, unit, upper, probes, blocks, n, side, BLOCK, BLOCK_K, PRECISION)
        scale = _middle_scale(upper, below, unit)
        distance = _distance(diagonal, n, off_diagonal, scale.to(tl.float64), CHUNK)
    _decide(flags, scales + batch, residual + batch, scale, distance, rounding * noise, tolerance)


@triton.jit(do_not_specialize=["step"])
def grow_kernel(
    energy, scales, flags, probes, blocks, growth, step, n, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of rows of product number `step` (0 to 7) of the power iteration, for matrices that wait for it.

    scales: the largest entry of M. growth: squares of the vectors that come out, (batch, 8, blocks of rows, 16).
    """
    batch = tl.program_id(1).to(tl.int64)
    if tl.load(flags + batch * 3 + 2) == 0:
        return
    blocks += batch * (2 * 16) * side
    blocks_of_rows = tl.num_programs(0)
    growth += batch * (8 * 16) * blocks_of_rows
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.load(scales + batch)
    shift = 0.0
    if step >= 4:
        shift = 1.05 * tl.max(_norms(growth + 3 * 16 * blocks_of_rows, blocks_of_rows), 0)
    source, stride = blocks + (step % 2) * (16 * side), side
    norms = tl.full((16,), 1.0, tl.float32)
    if step % 4 == 0:
        source, stride = probes, n
    else:
        norms = _norms(growth + (step - 1) * 16 * blocks_of_rows, blocks_of_rows)
    target = blocks + ((step + 1) % 2) * (16 * side)
    energy += batch * n * side
    squares = _grow(energy, unit, shift, source, stride, target, norms, rows, n, side, BLOCK, BLOCK_K, PRECISION)
    tl.store(growth + (step * blocks_of_rows + tl.program_id(0)) * 16 + tl.arange(0, 16), squares)


@triton.jit
def conclude_kernel(
    diagonal, partials, flags, scales, residual, growth, n, side, count, blocks_of_rows, tolerance, noise,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """The plan of one matrix that waited for the power iteration."""
    batch = tl.program_id(0).to(tl.int64)
    flags += batch * 3
    if tl.load(flags + 2) == 0:
        return
    tl.store(flags + 2, 0)
    growth += batch * (8 * 16) * blocks_of_rows
    off_diagonal, rounding = _tile_sums(partials + batch * count * 4, count, CHUNK)
    upper = 1.05 * tl.max(_norms(growth + 3 * 16 * blocks_of_rows, blocks_of_rows), 0)
    below = tl.max(_norms(growth + 7 * 16 * blocks_of_rows, blocks_of_rows), 0)
    scale = _middle_scale(upper, below, tl.load(scales + batch))
    distance = _distance(diagonal + batch * side, n, off_diagonal, scale.to(tl.float64), CHUNK)
    _decide(flags, scales + batch, residual + batch, scale, distance, rounding * noise, tolerance)
