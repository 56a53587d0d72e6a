"""The Triton kernels of orthogonal iteration: products of rows with rows over tiles, and what decides on the device.

    prepare    Q^T, and whether A is finite
    start      1 / mean diagonal of A, and which matrices there is anything to do for
    turn       Y = A Q / mean + shift Q
    gram       the products X^T X or Q^T Y; for a Newton launch also its first root, otherwise the distance from I
    apply      X T^T, with the root T that Newton's method has found
    judge      whether a basis is orthonormal enough, is to be corrected, or is given up
    correct    X (I + Phi(I - X^T X))^T
    commit     the accepted bases

Each is launched once for all matrices of all stacks, see `tables`. Every product sums rows times rows, L R^T, because Hopper
reads TF32 operands along the summed index alone: therefore X is stored together with X^T, as a pair. Pairs alternate.
Programs of a matrix whose flag is zero return at once.
"""

from __future__ import annotations

from ..factored_newton.tables import locate, matrix_of, number_of, scratch_matrix
from ..runtime import tl, triton
from ..tiles import load_tile, multiply, store_mirrored, store_tile


@triton.jit
def _number(row, field, matrix, scratch):
    """The address of number `field` of a matrix in the scratch memory: flags and the like, see `tables`."""
    return scratch + field * tl.load(row + 12) + tl.load(row + 10) + matrix


@triton.jit
def _pair(row, pair, matrix, scratch, n, side):
    """X and X^T of a pair."""
    return (
        scratch_matrix(row, 18 + 2 * pair, matrix, scratch, n, side),
        scratch_matrix(row, 19 + 2 * pair, matrix, scratch, n, side),
    )  # fmt: skip


@triton.jit
def _partials(row, matrix, scratch):
    """Two sums for each tile of a matrix, by its place: the order of programs makes no difference."""
    return scratch + tl.load(row + 24) + matrix * tl.load(row + 11) * 2


@triton.jit
def _totals(partials, count, CHUNK: tl.constexpr):
    """Both sums over the tiles."""
    first, second = tl.zeros((CHUNK,), tl.float32), tl.zeros((CHUNK,), tl.float32)
    for start in range(0, count, CHUNK):
        at = start + tl.arange(0, CHUNK)
        first += tl.load(partials + at * 2, mask=at < count, other=0.0)
        second += tl.load(partials + at * 2 + 1, mask=at < count, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@triton.jit
def prepare_kernel(stacks, programs, scratch, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    """One tile of Q^T, and of A its share of the mean diagonal and how many of its entries are not finite."""
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    factor, factor_stride = matrix_of(row, 0, matrix, ALIGNED)
    basis, basis_stride = matrix_of(row, 3, matrix, ALIGNED)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    q = load_tile(basis, basis_stride, rows, columns, n)
    store_tile(scratch_matrix(row, 17, matrix, scratch, n, side), side, columns, rows, tl.trans(q), n)
    a = load_tile(factor, factor_stride, rows, columns, n)
    partial = _partials(row, matrix, scratch) + (i * tl.cdiv(n, BLOCK) + j) * 2
    # Each entry is divided first: the sum may be beyond float32.
    tl.store(partial, tl.sum(tl.where(rows[:, None] == columns[None, :], a / n, 0.0)))
    tl.store(partial + 1, tl.sum(tl.where(tl.abs(a) < float("inf"), 0.0, 1.0)))


@triton.jit
def start_kernel(stacks, matrices, scratch, least, CHUNK: tl.constexpr):
    """The flags of one matrix: active if its factor is finite and not zero, kept until a new basis is accepted."""
    row, matrix, _, _, _, _ = locate(stacks, matrices, False)
    mean, bad = _totals(_partials(row, matrix, scratch), tl.load(row + 11).to(tl.int32), CHUNK)
    active = (bad == 0.0) & (mean >= least) & (mean < float("inf"))
    tl.store(_number(row, 0, matrix, scratch), tl.where(active, 1.0, 0.0))
    tl.store(_number(row, 1, matrix, scratch), 0.0)
    tl.store(_number(row, 2, matrix, scratch), 1.0)
    tl.store(_number(row, 5, matrix, scratch), tl.where(active, 1.0 / mean, 0.0))
    tl.store(_number(row, 6, matrix, scratch), 0.0)


@triton.jit
def turn_kernel(
    stacks, programs, scratch, shift,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of Y = A Q / mean + shift Q, into the first pair."""
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    if tl.load(_number(row, 0, matrix, scratch)) == 0.0:
        return
    if (i == 0) & (j == 0):
        tl.store(_number(row, 1, matrix, scratch), 1.0)
    factor, factor_stride = matrix_of(row, 0, matrix, ALIGNED)
    transposed = scratch_matrix(row, 17, matrix, scratch, n, side)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a = load_tile(factor, factor_stride, rows, inner, n)
        sums = multiply(a, load_tile(transposed, side, columns, inner, n), sums, False, PRECISION)
    basis, basis_stride = matrix_of(row, 3, matrix, ALIGNED)
    inverse_mean = tl.load(_number(row, 5, matrix, scratch))
    y = sums * inverse_mean + shift * load_tile(basis, basis_stride, rows, columns, n)
    straight, across = _pair(row, 0, matrix, scratch, n, side)
    store_tile(straight, side, rows, columns, y, n)
    store_tile(across, side, columns, rows, tl.trans(y), n)


@triton.jit(do_not_specialize=["flag", "left", "right"])
def gram_kernel(
    stacks, programs, scratch, flag, left, right,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, START: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of S = L R^T and its mirror image, for matrices whose flag is set. S is symmetric but for rounding.

    With START, the same tile of diag(S)^-1/2, from which Newton's method starts; without, its share of ||S - I||_F^2.
    left, right: which matrices of the scratch memory L and R are, as columns of the table of stacks.
    """
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    one_if_set = tl.load(_number(row, flag, matrix, scratch))
    if one_if_set == 0.0:
        return
    one, other = scratch_matrix(row, left, matrix, scratch, n, side), scratch_matrix(row, right, matrix, scratch, n, side)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, n, BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        x, y = load_tile(one, side, rows, inner, n), load_tile(other, side, columns, inner, n)
        if START:
            sums = multiply(x, y, sums, False, PRECISION)
        else:
            # A tensor core cuts its sums off: those of X^T X would be too small by n / 8 roundings, each of them in the same
            # direction, and the basis too long. It sums a few terms therefore, and the rest is rounded to nearest. The factor,
            # of which the compiler does not know that it is one, keeps it from adding to the tensor core's sums after all.
            sums += one_if_set * multiply(x, y, tl.zeros((BLOCK, BLOCK), tl.float32), False, PRECISION)
    store_mirrored(scratch_matrix(row, 22, matrix, scratch, n, side), side, rows, columns, sums, n)
    on_diagonal = rows[:, None] == columns[None, :]
    if START:
        # What is zero or negative is rounding alone: a basis made of it is refused, but nothing may become infinite.
        root = tl.where(on_diagonal, 1.0 / tl.sqrt(tl.maximum(sums, 1e-30)), 0.0)
        store_tile(scratch_matrix(row, 23, matrix, scratch, n, side), side, rows, columns, root, n)
    else:
        inside = (rows < n)[:, None] & (columns < n)[None, :]
        gap = tl.where(inside, tl.where(on_diagonal, 1.0 - sums, sums), 0.0)
        partial = _partials(row, matrix, scratch) + (i * (i + 1) // 2 + j) * 2
        tl.store(partial, tl.sum(gap * gap) * tl.where(i == j, 1.0, 2.0))
        tl.store(partial + 1, 0.0)


@triton.jit(do_not_specialize=["source"])
def apply_kernel(
    stacks, programs, scratch, source,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of X T^T, X from pair `source`, into the other pair. T is lower triangular: zero beyond the diagonal tile."""
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    if tl.load(_number(row, 0, matrix, scratch)) == 0.0:
        return
    x, _ = _pair(row, source, matrix, scratch, n, side)
    root = scratch_matrix(row, 23, matrix, scratch, n, side)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, tl.minimum((j + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        left = load_tile(x, side, rows, inner, n)
        sums = multiply(left, load_tile(root, side, columns, inner, n), sums, False, PRECISION)
    straight, across = _pair(row, 1 - source, matrix, scratch, n, side)
    store_tile(straight, side, rows, columns, sums, n)
    store_tile(across, side, columns, rows, tl.trans(sums), n)


@triton.jit(do_not_specialize=["source", "is_last"])
def judge_kernel(stacks, matrices, scratch, source, is_last, accept, enough, most, CHUNK: tl.constexpr):
    """What becomes of the basis of one matrix, in pair `source`.

    One nearer to orthonormal than `enough` is accepted, and after the last correction also up to `most`. One that is farther
    than `accept` before a correction, or than `most` after the last one, is given up: it stays active for another attempt.
    """
    row, matrix, _, _, _, _ = locate(stacks, matrices, False)
    running = _number(row, 1, matrix, scratch)
    active = _number(row, 0, matrix, scratch)
    if (tl.load(active) == 0.0) | (tl.load(running) == 0.0):
        return
    count = tl.load(row + 13).to(tl.int32)
    squares, _ = _totals(_partials(row, matrix, scratch), count, CHUNK)
    distance = tl.sqrt(squares)
    accepted = (distance <= enough) | ((is_last != 0) & (distance <= most))
    tl.store(running, tl.where(accepted | (is_last != 0) | ((distance <= accept) == 0), 0.0, 1.0))
    if accepted:
        tl.store(active, 0.0)
        tl.store(_number(row, 2, matrix, scratch), 0.0)
        tl.store(_number(row, 3, matrix, scratch), source.to(tl.float32))
        tl.store(_number(row, 4, matrix, scratch), distance)


@triton.jit(do_not_specialize=["source"])
def correct_kernel(
    stacks, programs, scratch, source,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of X + X Phi(I - S)^T, X from pair `source`, into the other pair; Phi = strictly lower part + half the diagonal.

    It squares the distance from orthonormal, and leaves what X spans column by column as it was.
    """
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    if (tl.load(_number(row, 0, matrix, scratch)) == 0.0) | (tl.load(_number(row, 1, matrix, scratch)) == 0.0):
        return
    x, _ = _pair(row, source, matrix, scratch, n, side)
    gram = scratch_matrix(row, 22, matrix, scratch, n, side)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)  # transposed: Phi is the operand that is made after loading
    for k in range(0, tl.minimum((j + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        s = load_tile(gram, side, columns, inner, n)
        on_diagonal = columns[:, None] == inner[None, :]
        phi = tl.where(columns[:, None] > inner[None, :], -s, tl.where(on_diagonal, 0.5 - 0.5 * s, 0.0))
        sums = multiply(phi, load_tile(x, side, rows, inner, n), sums, False, PRECISION)
    values = load_tile(x, side, rows, columns, n) + tl.trans(sums)
    straight, across = _pair(row, 1 - source, matrix, scratch, n, side)
    store_tile(straight, side, rows, columns, values, n)
    store_tile(across, side, columns, rows, tl.trans(values), n)


@triton.jit
def commit_kernel(stacks, programs, scratch, BLOCK: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """One tile of an accepted basis to its place, and once for each matrix its residual and whether it was refused.

    A coordinate whose variance is zero and that was an axis of the basis remains it exactly: such is the padding, of which
    rounding would otherwise leave a number next to one.
    """
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    kept = tl.load(_number(row, 2, matrix, scratch)) != 0.0
    if (i == 0) & (j == 0):
        residual = tl.load(_number(row, 4, matrix, scratch))
        if kept:
            squares, _ = _totals(_partials(row, matrix, scratch), tl.load(row + 13).to(tl.int32), CHUNK)
            residual = tl.where(squares < float("inf"), tl.sqrt(squares), float("inf"))
        tl.store(number_of(row, 6, matrix, tl.float32), residual)
        refused = tl.load(_number(row, 0, matrix, scratch)) != 0.0
        tl.store(number_of(row, 7, matrix, tl.uint8), tl.where(refused, 1, 0).to(tl.uint8))
    if kept:
        return
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    pair = tl.load(_number(row, 3, matrix, scratch)).to(tl.int32)
    x, _ = _pair(row, pair, matrix, scratch, n, side)
    values = load_tile(x, side, rows, columns, n)
    basis, basis_stride = matrix_of(row, 3, matrix, ALIGNED)
    if i == j:
        factor, factor_stride = matrix_of(row, 0, matrix, ALIGNED)
        variance = tl.load(factor + rows * (factor_stride + 1), mask=rows < n, other=1.0)
        before = tl.load(basis + rows * (basis_stride + 1), mask=rows < n, other=0.0)
        is_axis = (variance == 0.0) & (before == 1.0)
        values = tl.where((rows[:, None] == columns[None, :]) & is_axis[:, None], 1.0, values)
    store_tile(basis, basis_stride, rows, columns, values, n)
