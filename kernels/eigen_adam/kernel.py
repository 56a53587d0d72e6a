"""Adam in the eigenbasis of K-FAC's factors: directions of all tiles in three launches, their moments in one."""

from __future__ import annotations

from ..runtime import tl, triton

# The entry of a tile in the table of the first three kernels, int64 (tiles, 9): addresses of R, M, V and U, all float32; true
# rows m and columns n; the rows and columns that are stored; and where its sums begin in `sums`.
#
# A tile is divided into blocks of BLOCK_M x BLOCK_N. `sums` has of each tile, one after the other: sums of the rows of each
# block, (blocks across, rows); sums of the columns, (blocks down, columns); sums of blocks; weighted means of rows and columns.


@triton.jit
def _shape(entry, ALIGNED: tl.constexpr):
    """True rows and columns, and stored ones. ALIGNED: stored columns are multiples of 4.

    With this hint, copies are 16 bytes wide. It has to be given where the number is read: on the result of a call it is lost.
    """
    width = tl.load(entry + 7).to(tl.int32)
    if ALIGNED:
        width = tl.multiple_of(width, 4)
    return tl.load(entry + 4).to(tl.int32), tl.load(entry + 5).to(tl.int32), tl.load(entry + 6).to(tl.int32), width


@triton.jit
def _address(entry, ALIGNED: tl.constexpr):
    """That of a matrix. ALIGNED: it is a multiple of 16."""
    pointer = tl.load(entry).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _parts(entry, height, width, down, across):
    """Where the sums of rows, of columns and of blocks begin, and the means of rows and of columns."""
    rows = tl.load(entry + 8)
    columns = rows + across * height
    blocks = columns + down * width
    row_means = blocks + down * across
    return rows, columns, blocks, row_means, row_means + height


@triton.jit
def _places(block, m, n, width, across, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows and columns of a block, places of its elements in the tile, which are read, and which belong to the matrix.

    What is read goes to the end of stored rows, so that copies are wide for any n. What is read beyond n is not used.
    """
    rows = block // across * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = block % across * BLOCK_N + tl.arange(0, BLOCK_N)
    at = rows[:, None] * width + columns[None, :]
    read = (rows < m)[:, None] & (columns < width)[None, :]
    return rows, columns, at, read, (rows < m)[:, None] & (columns < n)[None, :]


@triton.jit
def _load(matrix, at, read, own):
    """Zero outside of the matrix."""
    return tl.where(own, tl.load(matrix + at, mask=read, other=0.0), 0.0)


@triton.jit
def _weights(rules):
    """b2 and 1 - b2."""
    keep = tl.load(rules + 1)
    return keep.to(tl.float32), (1.0 - keep).to(tl.float32)


@triton.jit
def sums_kernel(
    table,  # see above
    rules,  # float64 (tiles, 4): b1, b2, eps, Nesterov's momentum 0 or 1
    sums,  # float32, written but for the means
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Some blocks of a tile: sums of V' over rows and columns of the block, and over all of it.

    They are NaN if the gradient or V' is not finite, or so large that the sum over the tile, or what damping makes of an
    element, at most four times its size, might overflow. ALIGNED: addresses are multiples of 16, and stored columns of 4.
    """
    entry, rules = table + tl.program_id(0) * 9, rules + tl.program_id(0) * 4
    m, n, height, width = _shape(entry, ALIGNED)
    gradient, square = _address(entry, ALIGNED), _address(entry + 2, ALIGNED)
    keep, gain = _weights(rules)
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    of_rows, of_columns, of_blocks, _of_row_means, _of_column_means = _parts(entry, height, width, down, across)
    most = 3.4028234663852886e38 / (4.0 * m.to(tl.float32) * n.to(tl.float32))
    for block in range(tl.program_id(1), down * across, tl.num_programs(1)):
        rows, columns, at, read, own = _places(block, m, n, width, across, BLOCK_M, BLOCK_N)
        r = _load(gradient, at, read, own)
        new = keep * _load(square, at, read, own) + gain * (r * r)
        new = tl.where(new <= most, new, float("nan"))
        row_sums = tl.sum(new, 1)
        tl.store(sums + of_rows + block % across * height + rows, row_sums, mask=rows < height)
        tl.store(sums + of_columns + block // across * width + columns, tl.sum(new, 0), mask=columns < width)
        tl.store(sums + of_blocks + block, tl.sum(row_sums, 0))


@triton.jit
def means_kernel(
    table,  # see above
    rules,  # float64 (tiles, 4): b1, b2, eps, Nesterov's momentum 0 or 1
    noise,  # float32 (tiles, 2): alpha, beta
    steps,  # float32 (tiles,), before this one
    sums,  # float32, the means are written
    factors,  # float32 (tiles, 4), written: of M and R in N, of the root of V' in that of D, alpha beta mean(V')
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, DEPTH: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """Weighted means of the rows and columns of V' of a tile, and what depends on its number of steps.

    In double precision: one minus a power near one would lose digits in single.
    """
    entry, rules, noise = table + tl.program_id(0) * 9, rules + tl.program_id(0) * 4, noise + tl.program_id(0) * 2
    m, n, height, width = _shape(entry, False)
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    of_rows, of_columns, of_blocks, row_means, column_means = _parts(entry, height, width, down, across)
    alpha, beta = tl.load(noise), tl.load(noise + 1)
    parts = tl.cdiv(height, SPAN)
    for part in range(tl.program_id(1), parts + tl.cdiv(width, SPAN), tl.num_programs(1)):
        is_rows = part < parts
        count, length = tl.where(is_rows, across, down), tl.where(is_rows, height, width)
        source, target = tl.where(is_rows, of_rows, of_columns), tl.where(is_rows, row_means, column_means)
        weight, size = tl.where(is_rows, alpha, beta), tl.where(is_rows, n, m)
        at = tl.where(is_rows, part, part - parts) * SPAN + tl.arange(0, SPAN)
        total = tl.zeros((DEPTH, SPAN), tl.float32)
        for first in range(0, count, DEPTH):
            k = first + tl.arange(0, DEPTH)
            inside = (k < count)[:, None] & (at < length)[None, :]
            total += tl.load(sums + source + k[:, None] * length + at[None, :], mask=inside, other=0.0)
        tl.store(sums + target + at, tl.sum(total, 0) * weight / size.to(tl.float32), mask=at < length)
    if tl.program_id(1) == 0:
        whole = tl.zeros((ADDED,), tl.float32)
        for first in range(0, down * across, ADDED):
            k = first + tl.arange(0, ADDED)
            whole += tl.load(sums + of_blocks + k, mask=k < down * across, other=0.0)
        mean = tl.sum(whole, 0) / (m.to(tl.float32) * n.to(tl.float32))
        t = (tl.load(steps + tl.program_id(0)) + 1.0).to(tl.float64)
        beta1, beta2 = tl.load(rules), tl.load(rules + 1)
        ahead, beside = 1.0 / (1.0 - tl.exp2(t * tl.log2(beta1))), beta1 * 0.0
        if tl.load(rules + 3) != 0.0:
            ahead, beside = ahead * beta1, 1.0 - beta1
        own = factors + tl.program_id(0) * 4
        tl.store(own, (ahead * beta1).to(tl.float32))
        tl.store(own + 1, (ahead * (1.0 - beta1) + beside).to(tl.float32))
        tl.store(own + 2, (1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.log2(beta2)))).to(tl.float32))
        tl.store(own + 3, alpha * beta * mean)


@triton.jit
def direction_kernel(
    table,  # see above; U is written, wherever it is stored
    rules,  # float64 (tiles, 4): b1, b2, eps, Nesterov's momentum 0 or 1
    sums,  # float32, the means are read
    factors,  # float32 (tiles, 4), see `means_kernel`
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Some blocks of U = N / (sqrt(D) + eps), zero where N is zero and in the padding.

    All of the matrix is NaN where sums are: the mean over the matrix is in every element of D. ALIGNED: see `sums_kernel`.
    """
    entry, rules, own_factors = table + tl.program_id(0) * 9, rules + tl.program_id(0) * 4, factors + tl.program_id(0) * 4
    m, n, height, width = _shape(entry, ALIGNED)
    gradient, mean = _address(entry, ALIGNED), _address(entry + 1, ALIGNED)
    square, out = _address(entry + 2, ALIGNED), _address(entry + 3, ALIGNED)
    keep, gain = _weights(rules)
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N)
    _of_rows, _of_columns, _of_blocks, row_means, column_means = _parts(entry, height, width, down, across)
    of_mean, of_gradient, of_root = tl.load(own_factors), tl.load(own_factors + 1), tl.load(own_factors + 2)
    shift, eps = tl.load(own_factors + 3), tl.load(rules + 2).to(tl.float32)
    for block in range(tl.program_id(1), down * across, tl.num_programs(1)):
        rows, columns, at, read, own = _places(block, m, n, width, across, BLOCK_M, BLOCK_N)
        r = _load(gradient, at, read, own)
        new = keep * _load(square, at, read, own) + gain * (r * r)
        along = of_mean * _load(mean, at, read, own) + of_gradient * r
        by_row = tl.load(sums + row_means + rows, mask=rows < height, other=0.0)
        by_column = tl.load(sums + column_means + columns, mask=columns < width, other=0.0) + shift
        # The exact root: the fast one takes squares below the smallest normal number for zero.
        root = tl.sqrt_rn(new + by_row[:, None] + by_column[None, :]) * of_root
        u = tl.where((along == 0.0) & (by_column == by_column)[None, :], 0.0, along / (root + eps))
        tl.store(out + at, tl.where(own, u, 0.0), mask=(rows < height)[:, None] & (columns < width)[None, :])


# Flags and numbers of tiles may begin anywhere: they must not make a kernel that has not been compiled yet.
@triton.jit(do_not_specialize_on_alignment=["rules", "steps", "accept"])
def moments_kernel(
    table,  # int64 (tiles, 4): addresses of R, M and V, all float32; number of stored elements
    rules,  # float64 (tiles, 4): b1, b2, eps, Nesterov's momentum 0 or 1
    steps,  # float32 (tiles,), counted up
    accept,  # uint8 (tiles,)
    BLOCK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """A share of M' and V' of one accepted tile, and its counter; of the others nothing is read.

    ALIGNED: addresses are multiples of 16, and numbers of elements of 4.
    """
    tile = tl.program_id(0)
    if tl.load(accept + tile) == 0:
        return
    row = table + tile * 4
    gradient, mean, square = _address(row, ALIGNED), _address(row + 1, ALIGNED), _address(row + 2, ALIGNED)
    size = tl.load(row + 3).to(tl.int32)
    if ALIGNED:
        size = tl.multiple_of(size, 4)
    beta = tl.load(rules + tile * 4)
    keep, gain = beta.to(tl.float32), (1.0 - beta).to(tl.float32)
    keep_square, gain_square = _weights(rules + tile * 4)
    if tl.program_id(1) == 0:
        tl.store(steps + tile, tl.load(steps + tile) + 1.0)
    for start in range(tl.program_id(1) * BLOCK, size, tl.num_programs(1) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        r = tl.load(gradient + at, mask=at < size)
        tl.store(mean + at, keep * tl.load(mean + at, mask=at < size) + gain * r, mask=at < size)
        square_now = tl.load(square + at, mask=at < size)
        tl.store(square + at, keep_square * square_now + gain_square * (r * r), mask=at < size)
