"""The Triton kernels of the cold inverse: one fused kernel for small matrices, and for larger ones a kernel for each stage.

Every matrix that occurs is exactly symmetric: only tiles on and below the diagonal are computed, then mirrored, and large
matrices are read by rows as right operands too. X and M = X B alternate between two buffers; a matrix with `remaining` steps
to go lies in buffer `remaining % 2`, so that every matrix ends in buffer 0, whenever it ends.

Large matrices work in a stack (2 buffers, X and M, B, side, side), the side a multiple of 16 with zeros on the pad: copies are
then 16 bytes wide for any size. The schedule is a stack (steps + 1, B, 4) of rows (h0, h1, remaining, ready): coefficients,
steps to go with this one, and which product (0: X, 1: M, -1: neither) the preparation has computed already.
"""

from __future__ import annotations

from ..runtime import tl, triton
from ..tiles import store_mirrored

ROW = 4  # numbers in a row of the schedule
# Triton compiles anew for integers that are 1 or that 16 divides. Sides and strides need it, because it makes copies wide; of
# batch, count and max_steps it would only cost compilations.


@triton.jit
def _load(pointer, stride, rows, columns, n):
    """A tile, zero outside."""
    inside = (rows < n)[:, None] & (columns < n)[None, :]
    return tl.load(pointer + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _load_damped(pointer, stride, rows, columns, n, damping):
    """A tile of A + damping I, zero outside."""
    diagonal = (rows[:, None] == columns[None, :]) & (rows < n)[:, None]
    values = _load(pointer, stride, rows, columns, n)
    return tl.where(diagonal, values + damping, values)


@triton.jit
def _square_sum(values):
    """In float64, where the square of a float32 number neither overflows nor vanishes."""
    wide = values.to(tl.float64)
    return tl.sum(wide * wide)


@triton.jit
def _upper_bound(square_sum):
    """The Frobenius norm; NaN, for which no step is taken, where it is not a float32 number."""
    norm = tl.sqrt(square_sum).to(tl.float32)
    return tl.where(norm < float("inf"), norm, float("nan"))


@triton.jit
def _lower_bound(damping, upper, LEAST: tl.constexpr):
    """Of the spectrum of B / upper, in [LEAST, 1]; NaN stays NaN."""
    share = damping.to(tl.float64) / upper.to(tl.float64)
    share = tl.where(share < LEAST, tl.full((), LEAST, tl.float64), share)
    return tl.where(share > 1.0, tl.full((), 1.0, tl.float64), share)


@triton.jit
def _chebyshev_step(lower, EDGE: tl.constexpr, MOST: tl.constexpr):
    """`newton_schulz.chebyshev_step` of one matrix. Constants enter as float64: a bare one would be rounded to float32."""
    lower = tl.minimum(lower, tl.full((), MOST, tl.float64))
    edge = tl.maximum(lower, tl.full((), EDGE, tl.float64))
    z = (1 + edge) / (1 - edge)
    t2 = 2 * z * z - 1
    scale = (1 + 1 / t2) * t2 * ((1 - edge) * (1 - edge))
    h0, h1 = 8 * (1 + edge) / scale, -8 / scale
    after = tl.minimum(h0 * lower + h1 * (lower * lower), (1 - 1 / t2) / (1 + 1 / t2))
    return h0, h1, after


@triton.jit
def _certificate(trace, rounding):
    """Truncation plus rounding, infinite where either is not a number (a maximum would lose it)."""
    bound = tl.sqrt(tl.where(trace < 0.0, 0.0, trace)) + rounding
    return tl.where(bound < float("inf"), bound, float("inf"))


@triton.jit
def _symmetric_product(left, right, PRECISION: tl.constexpr, SIDE: tl.constexpr):
    """The product, known to be symmetric, mirrored from its lower triangle."""
    product = tl.dot(left, right, input_precision=PRECISION)
    at = tl.arange(0, SIDE)
    return tl.where(at[:, None] >= at[None, :], product, tl.trans(product))


@triton.jit(do_not_specialize=["max_steps"])
def fused_kernel(
    factor, factor_batch, factor_stride,  # float32 (B, n, n), elements between matrices and between rows; columns side by side
    dampings,  # float32 (B,)
    inverse, inverse_batch, inverse_stride,  # float32 (B, n, n), strides as for factor
    residual,  # float32 (B,)
    n, max_steps,
    TOLERANCE: tl.constexpr, EDGE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, ROUNDING: tl.constexpr,
    SIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The whole inverse of one small matrix in registers."""
    matrix = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, SIDE)
    diagonal = (at[:, None] == at[None, :]) & (at < n)[:, None]
    source, damping = factor + matrix * factor_batch, tl.load(dampings + matrix)
    target = _load_damped(source, factor_stride, at, at, n, damping)
    upper = _upper_bound(_square_sum(target))
    m = tl.div_rn(target, tl.zeros_like(target) + upper)
    x = tl.where(diagonal, tl.div_rn(1.0, upper), 0.0)
    lower = _lower_bound(damping, upper, LEAST)
    remaining = tl.where(1 - lower > TOLERANCE, max_steps, 0)
    while remaining > 0:
        h0, h1, lower = _chebyshev_step(lower, EDGE, MOST)
        h0, h1 = h0.to(tl.float32), h1.to(tl.float32)
        x = h0 * x + h1 * _symmetric_product(x, m, PRECISION, SIDE)
        m = h0 * m + h1 * _symmetric_product(m, m, PRECISION, SIDE)
        remaining = tl.where(1 - lower > TOLERANCE, remaining - 1, 0)
    # `remaining` is 0 now: adding it makes the compiler compute addresses and B again. Kept alive, they would take registers
    # from the loop.
    at += remaining
    diagonal = (at[:, None] == at[None, :]) & (at < n)[:, None]
    store_mirrored(inverse + matrix * inverse_batch, inverse_stride, at, at, x, n)
    target = _load_damped(source, factor_stride, at, at, n, damping)
    error = tl.where(diagonal, 1.0, 0.0) - tl.dot(x, target, input_precision=PRECISION)  # R^T: tr(R R) is the same
    rounding = ROUNDING * tl.sum(tl.where(diagonal, target * tl.abs(x), 0.0))
    tl.store(residual + matrix, _certificate(tl.sum(error * tl.trans(error)), rounding))


@triton.jit(do_not_specialize=["count"])
def norm_kernel(
    factor, factor_batch, factor_stride,  # float32 (B, n, n), elements between matrices and between rows; columns side by side
    dampings,  # float32 (B,)
    squares,  # float64 (B, count)
    tiles,  # int32 (count, 2): (i, j) of the tiles on and below the diagonal
    count, n,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Square sum of one tile of A + damping I; a tile below the diagonal also counts for its mirror image."""
    program = tl.program_id(0)
    tile, matrix = program % count, (program // count).to(tl.int64)
    i, j = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    damping = tl.load(dampings + matrix)
    values = _load_damped(factor + matrix * factor_batch, factor_stride, rows, columns, n, damping)
    tl.store(squares + matrix * count + tile, tl.where(i == j, 1, 2) * _square_sum(values))


@triton.jit(do_not_specialize=["batch", "count", "max_steps"])
def schedule_kernel(
    squares,  # float64 (B, count)
    dampings, uppers,  # float32 (B,)
    schedule,  # float32 (max_steps + 1, B, ROW)
    batch, count, max_steps,
    TOLERANCE: tl.constexpr, EDGE: tl.constexpr, LEAST: tl.constexpr, MOST: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Upper bound and schedule of one matrix. Rows after the first with nothing remaining are not written nor read."""
    matrix = tl.program_id(0).to(tl.int64)
    sums = tl.zeros((CHUNK,), tl.float64)
    for first in range(0, count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        sums += tl.load(squares + matrix * count + at, mask=at < count, other=0.0)
    upper = _upper_bound(tl.sum(sums))
    tl.store(uppers + matrix, upper)
    lower = _lower_bound(tl.load(dampings + matrix), upper, LEAST)
    start, pitch = schedule + matrix * 4, batch * 4
    row, steps = start, tl.full((), 0, tl.int32)
    remaining = tl.where(1 - lower > TOLERANCE, max_steps, 0)
    while remaining > 0:
        h0, h1, lower = _chebyshev_step(lower, EDGE, MOST)
        tl.store(row, h0.to(tl.float32))
        tl.store(row + 1, h1.to(tl.float32))
        remaining = tl.where(1 - lower > TOLERANCE, remaining - 1, 0)
        row, steps = row + pitch, steps + 1
    tl.store(row, 1.0)
    tl.store(row + 1, 0.0)
    row = start
    for step in range(max_steps + 1):
        tl.store(row + 2, tl.maximum(steps - step, 0).to(tl.float32))
        tl.store(row + 3, -1.0)
        row += pitch
    tl.store(start + 3, 0.0)


@triton.jit(do_not_specialize=["batch", "count"])
def prepare_kernel(
    factor, factor_batch, factor_stride,  # float32 (B, n, n), elements between matrices and between rows; columns side by side
    dampings,  # float32 (B,)
    uppers,  # float32 (B,)
    schedule,  # float32 (max_steps + 1, B, ROW), of which the first row is read
    work,  # float32 (2 buffers, X and M, B, side, side)
    tiles,  # int32 (count, 2)
    batch, count, n, side,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of M_0 = B / upper and of X_1 = (h0 I + h1 M_0) / upper, or of X_0 = I / upper where no step is taken."""
    program = tl.program_id(0)
    tile, matrix = program % count, (program // count).to(tl.int64)
    i, j = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    row, upper = schedule + matrix * 4, tl.load(uppers + matrix)
    h0, h1, remaining = tl.load(row), tl.load(row + 1), tl.load(row + 2).to(tl.int32)
    values = _load_damped(factor + matrix * factor_batch, factor_stride, rows, columns, n, tl.load(dampings + matrix))
    m = tl.div_rn(values, tl.zeros_like(values) + upper)
    identity = tl.where((rows[:, None] == columns[None, :]) & (rows < n)[:, None], 1.0, 0.0)
    scale = tl.div_rn(1.0, upper)
    x = h0 * (scale * identity) + h1 * (scale * m)
    area = side.to(tl.int64) * side
    now, then = remaining % 2, tl.where(remaining > 0, remaining - 1, 0) % 2
    store_mirrored(work + ((now * 2 + 1) * batch + matrix) * area, side, rows, columns, m, side)
    store_mirrored(work + (then * 2 * batch + matrix) * area, side, rows, columns, x, side)


@triton.jit(do_not_specialize=["batch", "count"])
def step_kernel(
    work,  # float32 (2 buffers, X and M, B, side, side)
    schedule,  # float32 (B, ROW): the row of this step
    tiles,  # int32 (count, 2)
    batch, count, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of X <- h0 X + h1 X M (product 0) or of M <- h0 M + h1 M M (product 1)."""
    program = tl.program_id(0)
    product, tile, matrix = program % 2, program // 2 % count, (program // (2 * count)).to(tl.int64)
    row = schedule + matrix * 4
    remaining, ready = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    if remaining <= product:  # done; or the last step, whose M nobody reads
        return
    if ready == product:
        return
    i, j = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    area = side.to(tl.int64) * side
    now, then = remaining % 2, (remaining - 1) % 2
    source = work + ((now * 2 + product) * batch + matrix) * area
    m = work + ((now * 2 + 1) * batch + matrix) * area
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, side, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        left, right = _load(source, side, rows, inner, side), _load(m, side, columns, inner, side)
        sums = tl.dot(left, tl.trans(right), sums, input_precision=PRECISION)
    # The linear term in float32, after the sum: it keeps the error of M relative to M.
    values = tl.load(row) * _load(source, side, rows, columns, side) + tl.load(row + 1) * sums
    store_mirrored(work + ((then * 2 + product) * batch + matrix) * area, side, rows, columns, values, side)


@triton.jit(do_not_specialize=["batch", "count"])
def residual_kernel(
    factor, factor_batch, factor_stride,  # float32 (B, n, n), elements between matrices and between rows; columns side by side
    dampings,  # float32 (B,)
    work,  # float32 (2 buffers, X and M, B, side, side), of which X of buffer 0 is read
    inverse, inverse_batch, inverse_stride,  # float32 (B, n, n), strides as for factor
    partials,  # float32 (2, B, count): shares of tr(R R), then of sum_k B_kk |X_kk|
    tiles,  # int32 (count, 2)
    batch, count, n, side,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the inverse, and its shares of tr(R R), R = I - B X, and of sum_k B_kk |X_kk|.

    R is not symmetric: tr(R R) needs the tile and the one opposite it, and both are computed here.
    """
    program = tl.program_id(0)
    tile, matrix = program % count, (program // count).to(tl.int64)
    i, j = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    source, damping = factor + matrix * factor_batch, tl.load(dampings + matrix)
    x = work + matrix * (side.to(tl.int64) * side)
    below, above = tl.zeros((BLOCK, BLOCK), tl.float32), tl.zeros((BLOCK, BLOCK), tl.float32)
    for first in range(0, side, BLOCK_K):
        inner = first + tl.arange(0, BLOCK_K)
        left, right = _load_damped(source, factor_stride, rows, inner, n, damping), _load(x, side, columns, inner, side)
        below = tl.dot(left, tl.trans(right), below, input_precision=PRECISION)
        left, right = _load_damped(source, factor_stride, columns, inner, n, damping), _load(x, side, rows, inner, side)
        above = tl.dot(left, tl.trans(right), above, input_precision=PRECISION)
    diagonal = (rows[:, None] == columns[None, :]) & (rows < n)[:, None]
    identity = tl.where(diagonal, 1.0, 0.0)
    trace = tl.where(i == j, 1.0, 2.0) * tl.sum((identity - below) * tl.trans(identity - above))
    values = _load(x, side, rows, columns, side)
    store_mirrored(inverse + matrix * inverse_batch, inverse_stride, rows, columns, values, n)
    target = _load_damped(source, factor_stride, rows, columns, n, damping)
    tl.store(partials + matrix * count + tile, trace)
    tl.store(partials + (batch + matrix) * count + tile, tl.sum(tl.where(diagonal, target * tl.abs(values), 0.0)))


@triton.jit(do_not_specialize=["batch", "count"])
def certificate_kernel(
    partials,  # float32 (2, B, count), as `residual_kernel` leaves them
    residual,  # float32 (B,)
    batch, count,
    ROUNDING: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Certificate of one matrix from the shares of its tiles, in a fixed order."""
    matrix = tl.program_id(0).to(tl.int64)
    traces, sizes = partials + matrix * count, partials + (batch + matrix) * count
    trace, size = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for first in range(0, count, CHUNK):
        at = first + tl.arange(0, CHUNK)
        trace += tl.load(traces + at, mask=at < count, other=0.0)
        size += tl.load(sizes + at, mask=at < count, other=0.0)
    tl.store(residual + matrix, _certificate(tl.sum(trace), ROUNDING * tl.sum(size)))
