"""The Triton kernels of the warm refresh: T <- sqrt(c) (I + Phi(I - c M)) T with M = T (A + damping I) T^T, on lower tiles.

    prepare    T rounded for the tensor cores, and U = T^T beside it
    factor     Y = T (A + damping I)
    energy     M = Y T^T, and its diagonal by itself
    plan       c, the bound on the error after the step, and whether to take it (see `plan_kernel`)
    update     T and U of the next step; after the last step, the T that came in where the new one is refused

Each is launched once for all matrices of all stacks; `tables` describes how a program finds its own.

A TF32 tensor core cuts operands to 11 bits. T is rounded to TF32 first, and multiplied exactly from then on; A and Y are split
into two TF32 numbers each. The root that comes out is not rounded: that would undo most of the step. Every product sums rows
times rows, L R^T, because Hopper reads TF32 operands along the summed index alone; that is what U is for. The left operands are
those that change after loading: they may come from registers, the right ones only from shared memory. Only lower tiles
of Y are needed: row i of T ends at its diagonal, so tile (i, j) of M, j <= i, reads Y up to column tile j.

U and Y change places after each step: Y is no longer needed then, and U of the next step overwrites it. `step` says which is
which.
"""

from __future__ import annotations

from ..runtime import tl, triton
from ..tiles import load_tile, multiply, round_tf32, store_mirrored, store_tile
from .tables import locate, matrix_of, number_of, scratch_matrix, state_of


@triton.jit
def _rounded_root(row, matrix, scratch, n, side, ROUND: tl.constexpr, ALIGNED: tl.constexpr):
    """T as it is multiplied, and the stride of its rows: rounded to TF32, or the root itself."""
    if ROUND:
        pointer, stride = scratch_matrix(row, 20, matrix, scratch, n, side), side
    else:
        pointer, stride = matrix_of(row, 3, matrix, ALIGNED)
    return pointer, stride


@triton.jit
def _partial_sums(row, matrix, scratch, i, j):
    """Where a tile writes its sums: by its place in the matrix, so that the order of programs makes no difference."""
    tile = i * (i + 1) // 2 + j
    return scratch + tl.load(row + 23) + (matrix * tl.load(row + 11) + tile) * 4


@triton.jit
def prepare_kernel(
    stacks, programs, scratch,
    BLOCK: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, SOME: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One tile of one matrix: T rounded to TF32 (with ROUND), U, and a copy of T (with KEEP).

    The root becomes zero above the diagonal. Without KEEP, the residual is infinite until a step has been taken. With SOME, a
    matrix whose flag is zero is finished before it begins.
    """
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    if SOME:
        if tl.load(number_of(row, 26, matrix, tl.float32)) == 0.0:
            if (i == 0) & (j == 0):
                state = state_of(row, matrix, scratch)
                tl.store(state, 0.0)
                tl.store(state + 2, 0.0)
                tl.store(state + 4, float("inf"))
            return
    root, stride = matrix_of(row, 3, matrix, ALIGNED)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    below = rows[:, None] >= columns[None, :]
    values = tl.where(below, load_tile(root, stride, rows, columns, n), 0.0)
    beyond = tl.trans((rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] > columns[None, :]))
    tl.store(root + columns[:, None] * stride + rows[None, :], tl.zeros((BLOCK, BLOCK), tl.float32), mask=beyond)
    if KEEP:
        store_tile(scratch_matrix(row, 21, matrix, scratch, n, side), side, rows, columns, values, n)
    if ROUND:
        values = round_tf32(values)
        store_tile(scratch_matrix(row, 20, matrix, scratch, n, side), side, rows, columns, values, n)
    store_tile(scratch_matrix(row, 17, matrix, scratch, n, side), side, columns, rows, tl.trans(values), n)
    if (i == 0) & (j == 0):
        state = state_of(row, matrix, scratch)
        tl.store(state, 1.0)
        tl.store(state + 2, 0.0)  # the others are not read before the plan has written them
        if not KEEP:
            tl.store(number_of(row, 7, matrix, tl.float32), float("inf"))


@triton.jit(do_not_specialize=["step"])
def factor_kernel(
    stacks, programs, scratch, step,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of Y = T A + damping T, and its shares of the rounding estimate, sum_ik B_kk T_ik^2 and sum_ik |T_ik|."""
    tl.static_assert(BLOCK % BLOCK_K == 0, "sums must end at the diagonal tile: what lies right of it was never stored")
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    if tl.load(state_of(row, matrix, scratch)) == 0.0:
        return
    factor, factor_stride = matrix_of(row, 0, matrix, ALIGNED)
    root, root_stride = _rounded_root(row, matrix, scratch, n, side, ROUND, ALIGNED)
    product = scratch_matrix(row, 18 - step % 2, matrix, scratch, n, side)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)  # transposed: A is the operand that is split
    for k in range(0, tl.minimum((i + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        a = load_tile(factor, factor_stride, columns, inner, n)  # A is symmetric
        sums = multiply(a, load_tile(root, root_stride, rows, inner, n), sums, ROUND, PRECISION)
    shift = tl.load(number_of(row, 6, matrix, tl.float32))
    t = load_tile(root, root_stride, rows, columns, n)
    store_tile(product, side, rows, columns, tl.trans(sums) + shift * t, n)
    diagonal = tl.load(factor + columns * (factor_stride + 1), mask=columns < n, other=0.0) + shift
    partial = _partial_sums(row, matrix, scratch, i, j)
    tl.store(partial, tl.sum(diagonal[None, :] * (t * t)))
    tl.store(partial + 3, tl.sum(tl.abs(t)))


@triton.jit(do_not_specialize=["step"])
def energy_kernel(
    stacks, programs, scratch, step,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of M = Y T^T and its mirror image, its part of the diagonal, and its share of the off-diagonal norm.

    The share is the largest entry and the sum of squares in units of it, because squares may be beyond float32.
    """
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    if tl.load(state_of(row, matrix, scratch)) == 0.0:
        return
    root, root_stride = _rounded_root(row, matrix, scratch, n, side, ROUND, ALIGNED)
    product = scratch_matrix(row, 18 - step % 2, matrix, scratch, n, side)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, tl.minimum((j + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        y = load_tile(product, side, rows, inner, n)
        sums = multiply(y, load_tile(root, root_stride, columns, inner, n), sums, ROUND, PRECISION)
    store_mirrored(scratch_matrix(row, 19, matrix, scratch, n, side), side, rows, columns, sums, n)
    if i == j:
        own = tl.sum(tl.where(rows[:, None] == columns[None, :], sums, 0.0), 1)
        tl.store(scratch + tl.load(row + 22) + matrix * side + rows, own, mask=rows < n)
    below = tl.where(rows[:, None] > columns[None, :], sums, 0.0)  # rows beyond the matrix were loaded as zeros
    largest = tl.max(tl.abs(below))
    shares = below / tl.maximum(largest, 1.2e-38)
    partial = _partial_sums(row, matrix, scratch, i, j)
    tl.store(partial + 1, largest)
    tl.store(partial + 2, tl.sum(shares * shares))


@triton.jit
def _settle(row, matrix, bound, is_refused, KEEP: tl.constexpr):
    """Writes the residual of a matrix. With KEEP, that of a refused one stays, as its damping does, and the refusal counts."""
    residual = number_of(row, 7, matrix, tl.float32)
    if KEEP:
        used, refused = number_of(row, 14, matrix, tl.float32), number_of(row, 16, matrix, tl.uint8)
        fallbacks = number_of(row, 15, matrix, tl.int64)
        tl.store(residual, tl.where(is_refused, tl.load(residual), bound))
        tl.store(used, tl.where(is_refused, tl.load(used), tl.load(number_of(row, 6, matrix, tl.float32))))
        tl.store(fallbacks, tl.load(fallbacks) + tl.where(is_refused, 1, 0))
        tl.store(refused, tl.where(is_refused, 1, 0).to(tl.uint8))
    else:
        tl.store(residual, bound)


@triton.jit(do_not_specialize=["step", "is_last"])
def update_kernel(
    stacks, programs, scratch, step, is_last, accept,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, ROUND: tl.constexpr, KEEP: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One lower tile of sqrt(c) (T + Phi(I - c M) T): as it is to the root, and rounded to T and U if the matrix goes on.

    In place: a program reads only its own tile of T. Phi T is zero between column j's first row and the diagonal's end.
    With KEEP, the last step writes the tile that came in where the bound on the error is above `accept`.
    """
    row, matrix, i, j, n, side = locate(stacks, programs, ALIGNED)
    state = state_of(row, matrix, scratch)
    root, root_stride = matrix_of(row, 3, matrix, ALIGNED)
    rows, columns = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    below = rows[:, None] >= columns[None, :]
    bound = tl.load(state + 4)
    is_refused = (is_last != 0) & ((bound <= accept) == 0)
    if (is_last != 0) & (i == 0) & (j == 0):
        _settle(row, matrix, bound, is_refused, KEEP)
    if KEEP:
        if is_refused:
            before = load_tile(scratch_matrix(row, 21, matrix, scratch, n, side), side, rows, columns, n)
            store_tile(root, root_stride, rows, columns, before, n)
            return
    if tl.load(state + 1) == 0.0:
        return
    energy = scratch_matrix(row, 19, matrix, scratch, n, side)
    transposed = scratch_matrix(row, 17 + step % 2, matrix, scratch, n, side)
    rounded, rounded_stride = _rounded_root(row, matrix, scratch, n, side, ROUND, ALIGNED)
    scale = tl.load(state + 3)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(j * BLOCK, tl.minimum((i + 1) * BLOCK, n), BLOCK_K):
        inner = k + tl.arange(0, BLOCK_K)
        m = scale * load_tile(energy, side, rows, inner, n)
        phi = tl.where(rows[:, None] > inner[None, :], -m, tl.where(rows[:, None] == inner[None, :], 0.5 - 0.5 * m, 0.0))
        sums = multiply(phi, load_tile(transposed, side, columns, inner, n), sums, False, PRECISION)
    t = load_tile(rounded, rounded_stride, rows, columns, n)
    values = tl.where(below, tl.sqrt(scale) * (t + sums), 0.0)
    store_tile(root, root_stride, rows, columns, values, n)
    if (is_last == 0) & (tl.load(state) != 0.0):  # after the last step of a matrix nothing reads them
        if ROUND:
            values = round_tf32(values)
            store_tile(rounded, rounded_stride, rows, columns, values, n)
        following = scratch_matrix(row, 18 - step % 2, matrix, scratch, n, side)
        store_tile(following, side, columns, rows, tl.trans(values), n)
