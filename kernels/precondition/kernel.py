"""The Triton kernel of preconditioning: one batched product, of which V = G^-1 W A^-1 takes two and V through roots four.

Hopper multiplies float32 operands that lie along the summed index. The chains below transpose none of the inverses, which are
symmetric, and each root once, as T^T T needs it both ways:

    inverses   P^T = A^-1 W^T,    V = G^-1 P
    roots      P = W T_A^T,       Q^T = T_A^T P^T,       S^T = Q^T T_G^T,       V = T_G^T S

A root that lies across the summed index is the right operand of `tl.dot`, which computes the transposed tile. As the left one,
or if nothing happened to it in registers, Triton would transpose it between global and shared memory, four bytes at a time.
"""

from __future__ import annotations

from ..runtime import tl, triton


@triton.jit
def _load_tile(matrix, stride, rows, columns, height, width):
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    return tl.load(matrix + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def product_kernel(
    left,  # L: float32 (B, m, inner), with LEFT_TRANSPOSED (B, inner, m); columns of every stack lie side by side
    right,  # R: float32 (B, n, inner)
    out,  # C: float32 (B, m, n)
    gradient,  # W: float32 (B, m, n), read with REDUCE only
    partials,  # float32 (B, tiles of C), written with REDUCE only
    m, n, inner,
    left_batch, left_stride, right_batch, right_stride, out_batch, out_stride, gradient_batch, gradient_stride,  # in elements
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    LEFT_TRANSPOSED: tl.constexpr, TRIANGULAR: tl.constexpr, REDUCE: tl.constexpr,
):  # fmt: skip
    """One tile of C (m, n) = op(L) R^T over `inner`, and with REDUCE its share of <C, W>.

    TRIANGULAR: one operand is a lower triangular root, the left one if that is transposed, otherwise the right one; the sum
    skips its zeros.
    """
    batch = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(n, BLOCK_N)
    i, j = tl.program_id(0) // across, tl.program_id(0) % across
    left += batch * left_batch
    right += batch * right_batch
    rows, columns = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    first, last = 0, inner
    if TRIANGULAR:
        if LEFT_TRANSPOSED:
            first = i * BLOCK_M // BLOCK_K * BLOCK_K  # loads stay aligned
        else:
            last = tl.minimum((j + 1) * BLOCK_N, inner)
    sums = tl.zeros((BLOCK_N, BLOCK_M) if LEFT_TRANSPOSED else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(first, last, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        b = _load_tile(right, right_stride, columns, at, n, inner)
        if LEFT_TRANSPOSED:
            a = _load_tile(left, left_stride, at, rows, inner, m)
            if PRECISION == "tf32":
                a += 0.0  # in registers, so that 16 bytes are copied at a time
            sums = tl.dot(b, a, sums, input_precision=PRECISION)
        else:
            a = _load_tile(left, left_stride, rows, at, m, inner)
            sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION)
    if LEFT_TRANSPOSED:
        sums = tl.trans(sums)
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    tl.store(out + batch * out_batch + rows[:, None] * out_stride + columns[None, :], sums, mask=inside)
    if REDUCE:
        w = _load_tile(gradient + batch * gradient_batch, gradient_stride, rows, columns, m, n)
        partial = partials + batch * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial, tl.sum(w * sums))
