"""The Triton kernel of the factor statistics: all layers of a list in one launch, and one reduction where rows are split.

A program owns one square tile of one factor, on or below the diagonal, or a stretch of the border that a bias adds; it sums
over its share of the rows, then blends the sum into the moving average and mirrors it. The tiles are square because any other
shape races: the mirrored store of one tile would feed the read of another.
"""

from __future__ import annotations

from .runtime import tl, triton

# Columns of the host's tables. LAYER_*: int64, one row a layer. TILE_*: int32, one row a program.
ROWS, COLUMNS, ROW_STRIDE, COLUMN_STRIDE, FACTOR_STRIDE, POSITIONS = range(6)
KERNEL, OUTPUT, STRIDE, PADDING, DILATION, INPUT, INPUT_STRIDE = 6, 9, 12, 15, 18, 21, 24  # three spatial dimensions each
IMAGE_STRIDE, CHANNEL_STRIDE = 27, 28
LAYER_FIELDS = 32
TILE_LAYER, TILE_I, TILE_J, TILE_FIRST, TILE_LAST, TILE_SLOT = range(6)
TILE_FIELDS = 8
BORDER = -1  # in TILE_J: not a tile but the column sums of tile column i
DIRECT = -1  # in TILE_SLOT: all rows in this program; it blends by itself


@triton.jit
def _load_rows(source, row_stride, column_stride, first, last, columns, n, BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr):
    """Rows first to last (exclusive) and these columns of X, [BLOCK_K, BLOCK], zero outside."""
    rows = first + tl.arange(0, BLOCK_K)
    if ALIGNED:
        offsets = rows[:, None] * row_stride + columns[None, :]
    else:
        offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(source + offsets, mask=(rows < last)[:, None] & (columns < n)[None, :], other=0.0)


@triton.jit
def _load_patches(source, layer, first, last, columns, n, BLOCK_K: tl.constexpr):
    """The same of patches of images (N, C, *spatial): a row is an image and a position, a column a channel and an offset."""
    rows = first + tl.arange(0, BLOCK_K)
    positions = tl.load(layer + 5).to(tl.int32)
    row_rest, column_rest = rows % positions, columns
    inside = (rows < last)[:, None] & (columns < n)[None, :]
    row_offset = (rows // positions).to(tl.int64) * tl.load(layer + 27)
    column_offset = tl.zeros_like(columns).to(tl.int64)
    for back in tl.static_range(3):  # width, height, depth: the last dimension varies fastest
        axis: tl.constexpr = 2 - back
        kernel = tl.load(layer + 6 + axis).to(tl.int32)
        output = tl.load(layer + 9 + axis).to(tl.int32)
        stride = tl.load(layer + 24 + axis)
        start = (row_rest % output) * tl.load(layer + 12 + axis).to(tl.int32) - tl.load(layer + 15 + axis).to(tl.int32)
        offset = (column_rest % kernel) * tl.load(layer + 18 + axis).to(tl.int32)
        row_rest, column_rest = row_rest // output, column_rest // kernel
        at = start[:, None] + offset[None, :]
        inside = inside & (at >= 0) & (at < tl.load(layer + 21 + axis).to(tl.int32))
        row_offset += start.to(tl.int64) * stride
        column_offset += offset.to(tl.int64) * stride
    column_offset += column_rest.to(tl.int64) * tl.load(layer + 28)
    return tl.load(source + row_offset[:, None] + column_offset[None, :], mask=inside, other=0.0)


@triton.jit
def _load(
    source, layer, row_stride, column_stride, first, last, columns, n,
    BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, PATCHES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    if PATCHES:
        values = _load_patches(source, layer, first, last, columns, n, BLOCK_K)
    else:
        values = _load_rows(source, row_stride, column_stride, first, last, columns, n, BLOCK_K, ALIGNED)
    if UPCAST:  # the interpreter would multiply the bit patterns of bfloat16
        values = values.to(tl.float32)
    return values


@triton.jit
def _blend(pointer, stride, rows, columns, sums, n, alpha, beta):
    """A <- beta A + alpha sums on the lower part of a tile, and its mirror image. With beta = 0 the old values are not read."""
    inside = (rows < n)[:, None] & (columns < n)[None, :] & (rows[:, None] >= columns[None, :])
    lower = pointer + rows[:, None].to(tl.int64) * stride + columns[None, :]
    known = tl.where(beta == 0.0, 0, n)  # rows whose old values count
    new = beta * tl.load(lower, mask=inside & (rows < known)[:, None], other=0.0) + alpha * sums
    tl.store(lower, new, mask=inside)
    upper = pointer + columns[:, None].to(tl.int64) * stride + rows[None, :]
    tl.store(upper, tl.trans(new), mask=tl.trans(inside))


@triton.jit
def _blend_tile(pointer, stride, i, j, sums, n, alpha, beta, BLOCK: tl.constexpr):
    """In two halves of columns: half the registers at a time, and two programs fit a multiprocessor."""
    rows = i * BLOCK + tl.arange(0, BLOCK)
    left, right = tl.split(tl.permute(tl.reshape(sums, (BLOCK, 2, BLOCK // 2)), (0, 2, 1)))
    columns = j * BLOCK + tl.arange(0, BLOCK // 2)
    _blend(pointer, stride, rows, columns, left, n, alpha, beta)
    _blend(pointer, stride, rows, columns + BLOCK // 2, right, n, alpha, beta)


@triton.jit
def _blend_border(pointer, stride, i, sums, n, count, alpha, beta, BLOCK: tl.constexpr):
    """The row and column that a last input of one adds: column sums, and in the corner the number of rows."""
    columns = i * BLOCK + tl.arange(0, BLOCK)
    sums = tl.where(columns == n, count.to(tl.float32), sums)
    inside = columns <= n
    row = pointer + n.to(tl.int64) * stride + columns
    known = tl.where(beta == 0.0, -1, n)
    new = beta * tl.load(row, mask=columns <= known, other=0.0) + alpha * sums
    tl.store(row, new, mask=inside)
    tl.store(pointer + columns.to(tl.int64) * stride + n, new, mask=inside)


@triton.jit
def covariance_kernel(
    sources, factors, layers, tiles, alphas, betas, accept, workspace,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, PATCHES: tl.constexpr, UPCAST: tl.constexpr, HAS_ACCEPT: tl.constexpr,
):  # fmt: skip
    """One tile, or border stretch, of one layer over one share of its rows; see the tables above.

    sources, factors: int64 addresses, one a layer. alphas, betas, accept: one a layer.
    """
    tile = tiles + tl.program_id(0) * 8
    index = tl.load(tile)
    if HAS_ACCEPT:
        if tl.load(accept + index) == 0:
            return
    i, j = tl.load(tile + 1), tl.load(tile + 2)
    first, last, slot = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    layer = layers + index * 32
    source = tl.load(sources + index).to(tl.pointer_type(DTYPE))
    factor = tl.load(factors + index).to(tl.pointer_type(tl.float32))
    n, stride = tl.load(layer + 1).to(tl.int32), tl.load(layer + 4)
    row_stride, column_stride = tl.load(layer + 2), tl.load(layer + 3)
    if ALIGNED:  # the hints are what makes copies 16 bytes wide, and asynchronous
        source, factor = tl.multiple_of(source, 16), tl.multiple_of(factor, 16)
        row_stride, stride, n = tl.multiple_of(row_stride, 8), tl.multiple_of(stride, 8), tl.multiple_of(n, 8)
    alpha, beta = tl.load(alphas + index).to(tl.float32), tl.load(betas + index).to(tl.float32)
    partial = workspace + slot.to(tl.int64) * (BLOCK * BLOCK)
    if j == -1:
        columns = i * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK,), tl.float32)
        for row in range(first, last, BLOCK_K):
            values = _load(source, layer, row_stride, column_stride, row, last, columns, n, BLOCK_K, ALIGNED, PATCHES, UPCAST)
            total += tl.sum(values.to(tl.float32), 0)
        if slot == -1:
            _blend_border(factor, stride, i, total, n, last - first, alpha, beta, BLOCK)
        else:
            tl.store(partial + tl.arange(0, BLOCK), total)
    else:
        left, right = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in range(first, last, BLOCK_K):
            a = _load(source, layer, row_stride, column_stride, row, last, left, n, BLOCK_K, ALIGNED, PATCHES, UPCAST)
            b = _load(source, layer, row_stride, column_stride, row, last, right, n, BLOCK_K, ALIGNED, PATCHES, UPCAST)
            sums = tl.dot(tl.trans(a), b, sums, input_precision=PRECISION)
        if slot == -1:
            _blend_tile(factor, stride, i, j, sums, n, alpha, beta, BLOCK)
        else:
            at = tl.arange(0, BLOCK)
            tl.store(partial + at[:, None] * BLOCK + at[None, :], sums)


@triton.jit
def covariance_reduce_kernel(
    factors, layers, tiles, alphas, betas, accept, workspace, BLOCK: tl.constexpr, HAS_ACCEPT: tl.constexpr
):  # fmt: skip
    """Sums the shares of one tile in a fixed order and blends it. Here a tile's first and last are slots of the workspace."""
    tile = tiles + tl.program_id(0) * 8
    index = tl.load(tile)
    if HAS_ACCEPT:
        if tl.load(accept + index) == 0:
            return
    i, j = tl.load(tile + 1), tl.load(tile + 2)
    first, last = tl.load(tile + 3), tl.load(tile + 4)
    layer = layers + index * 32
    factor = tl.load(factors + index).to(tl.pointer_type(tl.float32))
    stride, n = tl.load(layer + 4), tl.load(layer + 1).to(tl.int32)
    alpha, beta = tl.load(alphas + index).to(tl.float32), tl.load(betas + index).to(tl.float32)
    at, partial = tl.arange(0, BLOCK), workspace + first.to(tl.int64) * (BLOCK * BLOCK)
    if j == -1:
        total = tl.zeros((BLOCK,), tl.float32)
        for _ in range(first, last):
            total += tl.load(partial + at)
            partial += BLOCK * BLOCK
        _blend_border(factor, stride, i, total, n, tl.load(layer).to(tl.int32), alpha, beta, BLOCK)
    else:
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
        for _ in range(first, last):
            sums += tl.load(partial + at[:, None] * BLOCK + at[None, :])
            partial += BLOCK * BLOCK
        _blend_tile(factor, stride, i, j, sums, n, alpha, beta, BLOCK)
