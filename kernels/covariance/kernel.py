"""The Triton kernel of the factor statistics: all layers of a list in one launch, and one reduction where rows are split.

A program owns one square tile of one factor, on or below the diagonal, or a stretch of the border that a bias adds; it sums
over its share of the rows, then blends the sum into the moving average and mirrors it. The tiles are square because with any
other shape programs race: one would read what the mirrored store of another has written.
"""

from __future__ import annotations

from ..runtime import tl, triton

# Columns of the host's tables. LAYER_*: int64, one row per layer. TILE_*: int32, one row per program. Where rows are images and
# positions that lie side by side, ROW_STRIDE is the distance of two images.
ROWS, COLUMNS, ROW_STRIDE, COLUMN_STRIDE, FACTOR_STRIDE, POSITIONS = range(6)
KERNEL, OUTPUT, STRIDE, PADDING, DILATION, INPUT, INPUT_STRIDE = 6, 9, 12, 15, 18, 21, 24  # three spatial dimensions each
IMAGE_STRIDE, CHANNEL_STRIDE = 27, 28
LAYER_FIELDS = 32
TILE_LAYER, TILE_I, TILE_J, TILE_FIRST, TILE_LAST, TILE_SLOT = range(6)
TILE_FIELDS = 8
BORDER = -1  # in TILE_J: not a tile but the column sums of tile column i
DIRECT = -1  # in TILE_SLOT: all rows in this program; it blends by itself


@triton.jit
def _load_rows(
    source, row_stride, column_stride, first, last, columns, n,
    BLOCK_K: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
):  # fmt: skip
    """Rows first to last (exclusive) and these columns of X, zero outside; see `_load`.

    If ALIGNED, each operand of a product is loaded in the orientation in which it is used: with a transposition afterwards, one
    of the two would not be copied asynchronously. Otherwise columns, which usually lie side by side, must come last, so that
    neighbouring threads load them.
    """
    rows = first + tl.arange(0, BLOCK_K)
    if ALIGNED and COLUMNS_FIRST:
        offsets = columns[:, None] + rows[None, :] * row_stride
        values = tl.load(source + offsets, mask=(columns < n)[:, None] & (rows < last)[None, :], other=0.0)
    else:
        if ALIGNED:
            offsets = rows[:, None] * row_stride + columns[None, :]
        else:
            offsets = rows[:, None] * row_stride + columns[None, :] * column_stride
        values = tl.load(source + offsets, mask=(rows < last)[:, None] & (columns < n)[None, :], other=0.0)
        if COLUMNS_FIRST:
            values = tl.trans(values)
    return values


@triton.jit
def _load_positions(
    source, image_stride, positions, column_stride, first, last, columns, n,
    BLOCK_K: tl.constexpr, WIDTH: tl.constexpr, COLUMNS_FIRST: tl.constexpr,
):  # fmt: skip
    """The same for images (N, C, positions) whose positions lie side by side; a row is an image and a position.

    The rows of all images follow one another, so that a block of them may end one image and begin the next: with a block that
    ends with its image, 25 % of the products would be of zeros at 14 x 14 positions. WIDTH positions are of one image and are
    copied at once, so that a thread divides once for each copy.
    """
    rows = (first + tl.arange(0, BLOCK_K)).to(tl.uint32, bitcast=True)  # to divide without regard to signs is shorter
    image = rows // positions.to(tl.uint32, bitcast=True)
    memory = image.to(tl.int64) * image_stride + (rows - image * positions)
    memory = source + tl.max_contiguous(tl.multiple_of(memory, WIDTH), WIDTH)
    beside = columns * column_stride
    if COLUMNS_FIRST or WIDTH == 1:
        places = memory[None, :] + beside[:, None]
        if WIDTH == 1:
            # Neighbouring threads are to take neighbouring rows. Where it knows nothing, Triton 3.6 gives them neighbouring
            # columns, each in a cache line of its own. That two rows are adjacent does not hold between images; it may be said
            # because nothing is said of alignment, without which nothing is loaded in pairs (the codegen gate looks).
            places = tl.max_contiguous(places, (1, 2))
        values = tl.load(places, mask=(columns < n)[:, None] & (rows < last)[None, :], other=0.0)
        if not COLUMNS_FIRST:
            values = tl.trans(values)
    else:
        values = tl.load(memory[:, None] + beside[None, :], mask=(rows < last)[:, None] & (columns < n)[None, :], other=0.0)
    return values


@triton.jit
def _column_axis(layer, axis: tl.constexpr, rest, memory):
    """Offset of a column along one axis of the window, the rest of its number, and its distance in memory so far."""
    kernel = tl.load(layer + 6 + axis).to(tl.int32)
    offset = (rest % kernel) * tl.load(layer + 18 + axis).to(tl.int32)
    return offset, rest // kernel, memory + offset * tl.load(layer + 24 + axis).to(tl.int32)


@triton.jit
def _row_axis(layer, axis: tl.constexpr, rest, memory):
    """The same for a row: the start of its window along one axis."""
    output = tl.load(layer + 9 + axis).to(tl.int32)
    start = (rest % output) * tl.load(layer + 12 + axis).to(tl.int32) - tl.load(layer + 15 + axis).to(tl.int32)
    return start, rest // output, memory + start * tl.load(layer + 24 + axis)


@triton.jit
def _place_columns(layer, columns, SPATIAL: tl.constexpr):
    """(depth, height, width, memory): a column of the patch matrix is a channel and an offset in the window.

    Divisions are expensive: this is called before the loop over rows. The offsets within one image are 32 bits wide.
    """
    depth = tl.zeros_like(columns)
    height = tl.zeros_like(columns)
    width, rest, memory = _column_axis(layer, 2, columns, depth)  # the last dimension varies fastest
    if SPATIAL > 1:
        height, rest, memory = _column_axis(layer, 1, rest, memory)
    if SPATIAL > 2:
        depth, rest, memory = _column_axis(layer, 0, rest, memory)
    return depth, height, width, memory + rest * tl.load(layer + 28).to(tl.int32)


@triton.jit
def _within(layer, axis: tl.constexpr, offset, start):
    """Whether a place lies in the image. As unsigned numbers, places before it lie far behind it: one comparison."""
    at = offset[:, None] + start[None, :]
    return at.to(tl.uint32, bitcast=True) < tl.load(layer + 21 + axis).to(tl.uint32)


@triton.jit
def _load_patches(source, layer, first, last, columns, place, n, BLOCK_K: tl.constexpr, SPATIAL: tl.constexpr):
    """The same for patches of images (N, C, *spatial), columns first; a row is an image and a position.

    The threads of a warp then take neighbouring positions, which lie side by side in memory, and each divides few rows.
    """
    depth, height, width, memory = place
    rows = first + tl.arange(0, BLOCK_K)
    positions = tl.load(layer + 5).to(tl.int32)
    inside = (columns < n)[:, None] & (rows < last)[None, :]
    image = (rows // positions).to(tl.int64) * tl.load(layer + 27)
    start, rest, row = _row_axis(layer, 2, rows % positions, image)
    inside = inside & _within(layer, 2, width, start)
    if SPATIAL > 1:
        start, rest, row = _row_axis(layer, 1, rest, row)
        inside = inside & _within(layer, 1, height, start)
    if SPATIAL > 2:
        start, rest, row = _row_axis(layer, 0, rest, row)
        inside = inside & _within(layer, 0, depth, start)
    places = tl.max_contiguous(source + row[None, :] + memory[:, None], (1, 2))  # see _load_positions
    return tl.load(places, mask=inside, other=0.0)


@triton.jit
def _load(
    source, layer, row_stride, column_stride, positions, first, last, columns, place, n,
    BLOCK_K: tl.constexpr, IMAGES: tl.constexpr, WIDTH: tl.constexpr, SPATIAL: tl.constexpr, UPCAST: tl.constexpr,
    COLUMNS_FIRST: tl.constexpr,
):  # fmt: skip
    """An operand: X^T, [BLOCK, BLOCK_K], or X, [BLOCK_K, BLOCK]."""
    if IMAGES:
        values = _load_positions(
            source, row_stride, positions, column_stride, first, last, columns, n, BLOCK_K, WIDTH, COLUMNS_FIRST
        )
    elif SPATIAL:
        values = _load_patches(source, layer, first, last, columns, place, n, BLOCK_K, SPATIAL)
        if not COLUMNS_FIRST:
            values = tl.trans(values)
    else:
        values = _load_rows(source, row_stride, column_stride, first, last, columns, n, BLOCK_K, WIDTH > 1, COLUMNS_FIRST)
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
def _halves(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Left and right half of a tile."""
    return tl.split(tl.permute(tl.reshape(values, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _blend_tile(pointer, stride, i, j, sums, n, alpha, beta, BLOCK: tl.constexpr):
    """In quarters, by columns: only one at a time takes registers, so that two programs fit a multiprocessor."""
    quarter: tl.constexpr = BLOCK // 4
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, quarter)
    left, right = _halves(sums, BLOCK, BLOCK)
    first, second = _halves(left, BLOCK, BLOCK // 2)
    third, fourth = _halves(right, BLOCK, BLOCK // 2)
    _blend(pointer, stride, rows, columns, first, n, alpha, beta)
    _blend(pointer, stride, rows, columns + quarter, second, n, alpha, beta)
    _blend(pointer, stride, rows, columns + 2 * quarter, third, n, alpha, beta)
    _blend(pointer, stride, rows, columns + 3 * quarter, fourth, n, alpha, beta)


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
    addresses,  # int64 (layers, 2): of the input, X (rows, n) or images (N, C, *spatial), of type DTYPE; and of the factor A,
    # float32 (n, n), one wider with a bias, columns side by side
    layers,  # int64 (layers, LAYER_FIELDS)
    tiles,  # int32 (programs, TILE_FIELDS)
    alphas, betas,  # float (layers,)
    accept,  # uint8 (layers,): where 0 the factor stays as it is; without HAS_ACCEPT it is not read
    workspace,  # float32 (slots, BLOCK, BLOCK): partial sums of tiles whose rows several programs share
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    IMAGES: tl.constexpr, WIDTH: tl.constexpr, SPATIAL: tl.constexpr, UPCAST: tl.constexpr, HAS_ACCEPT: tl.constexpr,
):  # fmt: skip
    """One tile, or border stretch, of one layer over one share of its rows; see the tables above."""
    tile = tiles + tl.program_id(0) * 8
    index = tl.load(tile)
    if HAS_ACCEPT:
        if tl.load(accept + index) == 0:
            return
    i, j = tl.load(tile + 1), tl.load(tile + 2)
    first, last, slot = tl.load(tile + 3), tl.load(tile + 4), tl.load(tile + 5)
    layer = layers + index * 32
    source = tl.load(addresses + 2 * index).to(tl.pointer_type(DTYPE))
    factor = tl.load(addresses + 2 * index + 1).to(tl.pointer_type(tl.float32))
    n, stride = tl.load(layer + 1).to(tl.int32), tl.load(layer + 4)
    row_stride, column_stride = tl.load(layer + 2), tl.load(layer + 3)
    positions = tl.load(layer + 5).to(tl.int32)
    if IMAGES:  # a launcher sees to it that places in one image are 32 bits apart at most
        column_stride = column_stride.to(tl.int32)
    if WIDTH > 1:  # with these hints, copies are wide and asynchronous, and the factor is blended in fewer registers
        factor, stride, n = tl.multiple_of(factor, 16), tl.multiple_of(stride, 8), tl.multiple_of(n, 8)
        source = tl.multiple_of(source, WIDTH * (DTYPE.primitive_bitwidth // 8) if IMAGES else 16)
        row_stride = tl.multiple_of(row_stride, WIDTH)
        if IMAGES:
            positions, column_stride = tl.multiple_of(positions, WIDTH), tl.multiple_of(column_stride, WIDTH)
            first, last = tl.multiple_of(first, WIDTH), tl.multiple_of(last, WIDTH)
    alpha, beta = tl.load(alphas + index).to(tl.float32), tl.load(betas + index).to(tl.float32)
    partial = workspace + slot.to(tl.int64) * (BLOCK * BLOCK)
    left, right = i * BLOCK + tl.arange(0, BLOCK), j * BLOCK + tl.arange(0, BLOCK)
    left_place, right_place = left, right
    if SPATIAL:
        left_place, right_place = _place_columns(layer, left, SPATIAL), _place_columns(layer, right, SPATIAL)
    if j == -1:
        # Summed across threads once, after the loop. A sum inside the loop that both branches below use would also crash the
        # compiler for AMD (Triton 3.7).
        total = tl.zeros((BLOCK, BLOCK_K), tl.float32)
        for row in range(first, last, BLOCK_K):
            values = _load(
                source, layer, row_stride, column_stride, positions, row, last, left, left_place, n,
                BLOCK_K, IMAGES, WIDTH, SPATIAL, UPCAST, COLUMNS_FIRST=True,
            )  # fmt: skip
            total += values.to(tl.float32)
        total = tl.sum(total, 1)
        if slot == -1:
            _blend_border(factor, stride, i, total, n, last - first, alpha, beta, BLOCK)
        else:
            tl.store(partial + tl.arange(0, BLOCK), total)
    else:
        sums = tl.zeros((BLOCK, BLOCK), tl.float32)
        for row in range(first, last, BLOCK_K):
            a = _load(
                source, layer, row_stride, column_stride, positions, row, last, left, left_place, n,
                BLOCK_K, IMAGES, WIDTH, SPATIAL, UPCAST, COLUMNS_FIRST=True,
            )  # fmt: skip
            b = _load(
                source, layer, row_stride, column_stride, positions, row, last, right, right_place, n,
                BLOCK_K, IMAGES, WIDTH, SPATIAL, UPCAST, COLUMNS_FIRST=False,
            )  # fmt: skip
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        if slot == -1:
            _blend_tile(factor, stride, i, j, sums, n, alpha, beta, BLOCK)
        else:
            at = tl.arange(0, BLOCK)
            tl.store(partial + at[:, None] * BLOCK + at[None, :], sums)


@triton.jit
def covariance_reduce_kernel(
    addresses,  # int64 (layers, 2), as above
    layers,  # int64 (layers, LAYER_FIELDS)
    tiles,  # int32 (programs along the first axis of the grid, TILE_FIELDS)
    alphas, betas,  # float (layers,)
    accept,  # uint8 (layers,); without HAS_ACCEPT it is not read
    workspace,  # float32 (slots, BLOCK, BLOCK)
    BLOCK: tl.constexpr, PART: tl.constexpr, HAS_ACCEPT: tl.constexpr,
):  # fmt: skip
    """Sums the shares of one tile in a fixed order and blends it. Here a tile's first and last are slots of the workspace.

    A program takes a square part of the tile, or a stretch of a border: a kernel that only adds needs many small programs.
    """
    tile = tiles + tl.program_id(0) * 8
    index = tl.load(tile)
    if HAS_ACCEPT:
        if tl.load(accept + index) == 0:
            return
    i, j = tl.load(tile + 1), tl.load(tile + 2)
    first, last = tl.load(tile + 3), tl.load(tile + 4)
    layer = layers + index * 32
    factor = tl.load(addresses + 2 * index + 1).to(tl.pointer_type(tl.float32))
    stride, n = tl.load(layer + 4), tl.load(layer + 1).to(tl.int32)
    alpha, beta = tl.load(alphas + index).to(tl.float32), tl.load(betas + index).to(tl.float32)
    parts: tl.constexpr = BLOCK // PART
    down, across = tl.program_id(1) // parts, tl.program_id(1) % parts
    partial = workspace + first.to(tl.int64) * (BLOCK * BLOCK)
    rows, columns = down * PART + tl.arange(0, PART), across * PART + tl.arange(0, PART)
    if j == -1:
        if across == 0:
            total = tl.zeros((PART,), tl.float32)
            for _ in range(first, last):
                total += tl.load(partial + rows)
                partial += BLOCK * BLOCK
            _blend_border(factor, stride, i * parts + down, total, n, tl.load(layer).to(tl.int32), alpha, beta, PART)
    else:
        sums = tl.zeros((PART, PART), tl.float32)
        for _ in range(first, last):
            sums += tl.load(partial + rows[:, None] * BLOCK + columns[None, :])
            partial += BLOCK * BLOCK
        _blend_tile(factor, stride, i * parts + down, j * parts + across, sums, n, alpha, beta, PART)
