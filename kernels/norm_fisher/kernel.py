"""Triton kernels of the Fisher diagonals of norm layers: all layers of a kind in one launch, without atomic operations.

First, programs sum over their share of a layer, examples and positions, and write partial sums to slots of a workspace. Then
`fisher_kernel` adds the slots in a fixed order, squares where one example was shared out, and blends. LayerNorm and RMSNorm
normalize a position by its own statistics, which a program has as soon as it has read the row. A channel's statistics need
other programs' positions: partial sums are taken about the mean of the share, from which `channel_statistics_kernel` makes the
statistics, and `fisher_kernel` the sums about the true mean.
"""

from __future__ import annotations

from ..runtime import tl, triton

# Columns of the layer table, int64.
INDEX, WIDTH, EXAMPLES, POSITIONS = range(4)  # place in the caller's lists; entries of scale
X_EXAMPLE, X_POSITION, X_CHANNEL, G_EXAMPLE, G_POSITION, G_CHANNEL = range(4, 10)  # strides, in elements
# A layer has BLOCKS stretches of columns, each examples in parts of TAKEN, each positions in SHARES parts of LENGTH.
PROGRAMS, BLOCKS, TAKEN, SHARES, LENGTH = range(10, 15)
SLOTS, PARTIALS = 15, 16  # slots of partial sums, and the place of the first in the workspace, in elements
EPSILON = 17  # the bits of a float32
CENTERED = 18  # 1 if the mean is subtracted
SQUARE_FIRST, SQUARE_LAST = 19, 20  # 1 if sums over positions are squared by the programs; if by `fisher_kernel`
HAS_SHIFT = 21
STATISTICS = 22  # place of the layer's means in the statistics, in elements; reciprocal deviations follow
# Each example, or all of them together if EXAMPLE_UNITS is 0, has WIDTH / GROUP units of GROUP channels with common statistics.
UNITS, EXAMPLE_UNITS, GROUP, RUNNING = range(23, 27)
LAYER_FIELDS = 32
# Columns of the table of addresses.
X, G, TOTAL, RUNNING_MEAN, RUNNING_VARIANCE = range(5)
ADDRESS_FIELDS = 6
# The partial sums: of LayerNorm and RMSNorm those of gradients; of a channel norm the mean and the sum of squared deviations of
# the share, and the sums of w, of w times the deviation, and of w times its square, with w = g, or g^2 if positions are terms.
SCALE, SHIFT = range(2)
MEAN, DEVIATION, ZEROTH, FIRST, SECOND = range(5)


@triton.jit
def _share(layer, program):
    """(stretch of columns, examples from and to, positions from and to, slot) of one program of a layer."""
    blocks, shares = tl.load(layer + 11).to(tl.int32), tl.load(layer + 13).to(tl.int32)
    taken, length = tl.load(layer + 12).to(tl.int32), tl.load(layer + 14).to(tl.int32)
    slot = program // blocks
    example, position = slot // shares * taken, slot % shares * length
    last_example = tl.minimum(example + taken, tl.load(layer + 2).to(tl.int32))
    last_position = tl.minimum(position + length, tl.load(layer + 3).to(tl.int32))
    return program % blocks, example, last_example, position, last_position, slot


@triton.jit
def _epsilon(layer):
    return tl.load(layer + 17).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def row_statistics_kernel(
    addresses,  # int64 (layers, ADDRESS_FIELDS)
    layers,  # int64 (layers, LAYER_FIELDS)
    statistics,  # float32
    X_TYPE: tl.constexpr, COLUMNS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Mean and reciprocal deviation of one position of LayerNorm or RMSNorm that is too wide for a program to hold."""
    layer = layers + tl.program_id(1) * 32
    row, positions = tl.program_id(0), tl.load(layer + 3).to(tl.int32)
    rows = tl.load(layer + 2).to(tl.int32) * positions
    if row >= rows:
        return
    n, epsilon, centered = tl.load(layer + 1).to(tl.int32), _epsilon(layer), tl.load(layer + 18).to(tl.float32)
    x = tl.load(addresses + tl.program_id(1) * 6).to(tl.pointer_type(X_TYPE))
    example_stride, position_stride = tl.load(layer + 4), tl.load(layer + 5)
    if ALIGNED:
        x, n = tl.multiple_of(x, 16), tl.multiple_of(n, 8)
        example_stride, position_stride = tl.multiple_of(example_stride, 8), tl.multiple_of(position_stride, 8)
    x += row // positions * example_stride + row % positions * position_stride
    columns = tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, n, COLUMNS):
        total += tl.load(x + start + columns, mask=start + columns < n, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / n * centered
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, n, COLUMNS):
        inside = start + columns < n
        away = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, away * away, 0.0)
    place = statistics + tl.load(layer + 22) + row
    tl.store(place, mean)
    tl.store(place + rows, tl.rsqrt(tl.sum(squares, 0) / n + epsilon))


@triton.jit
def row_sums_kernel(
    addresses,  # int64 (layers, ADDRESS_FIELDS)
    layers,  # int64 (layers, LAYER_FIELDS)
    statistics,  # float32: of every position of a layer with WIDE; not read otherwise
    workspace,  # float32
    X_TYPE: tl.constexpr, G_TYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    BY_POSITION: tl.constexpr, ALIGNED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Partial sums of one program of LayerNorm or RMSNorm: of gradients, or of their squares."""
    layer = layers + tl.program_id(1) * 32
    if tl.program_id(0) >= tl.load(layer + 10):
        return
    block, example, last_example, position, last_position, slot = _share(layer, tl.program_id(0))
    address = addresses + tl.program_id(1) * 6
    x, g = tl.load(address).to(tl.pointer_type(X_TYPE)), tl.load(address + 1).to(tl.pointer_type(G_TYPE))
    n, epsilon, centered = tl.load(layer + 1).to(tl.int32), _epsilon(layer), tl.load(layer + 18).to(tl.float32)
    x_example, x_position = tl.load(layer + 4), tl.load(layer + 5)
    g_example, g_position = tl.load(layer + 7), tl.load(layer + 8)
    if ALIGNED:  # with these hints, loads are 16 bytes wide
        x, g, n = tl.multiple_of(x, 16), tl.multiple_of(g, 16), tl.multiple_of(n, 8)
        x_example, x_position = tl.multiple_of(x_example, 8), tl.multiple_of(x_position, 8)
        g_example, g_position = tl.multiple_of(g_example, 8), tl.multiple_of(g_position, 8)
    squares = tl.load(layer + 19) != 0
    columns = block * COLUMNS + tl.arange(0, COLUMNS)
    total_scale, total_shift = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    for e in range(example, last_example):
        scale, shift = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
        for first in range(position, last_position, ROWS):
            rows = first + tl.arange(0, ROWS)
            inside = (rows < last_position)[:, None] & (columns < n)[None, :]
            x_rows, g_rows = e * x_example + rows * x_position, e * g_example + rows * g_position
            away = tl.load(x + x_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            gradient = tl.load(g + g_rows[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if WIDE:
                positions = tl.load(layer + 3)
                place = statistics + tl.load(layer + 22) + e * positions + rows
                mean = tl.load(place, mask=rows < last_position, other=0.0)
                factor = tl.load(place + tl.load(layer + 2) * positions, mask=rows < last_position, other=0.0)
                away = away - mean[:, None]
            else:
                mean = tl.sum(away, 1) / n * centered
                away = tl.where(inside, away - mean[:, None], 0.0)
                factor = tl.rsqrt(tl.sum(away * away, 1) / n + epsilon)
            # Where there is no row, the reciprocal may be infinite: without epsilon.
            product = tl.where(inside, gradient * (away * factor[:, None]), 0.0)
            if BY_POSITION:
                scale += product * product
                shift += gradient * gradient
            else:
                scale += product
                shift += gradient
        of_scale, of_shift = tl.sum(scale, 0), tl.sum(shift, 0)
        total_scale += tl.where(squares, of_scale * of_scale, of_scale)
        total_shift += tl.where(squares, of_shift * of_shift, of_shift)
    partial = workspace + tl.load(layer + 16) + slot.to(tl.int64) * n + columns
    tl.store(partial, total_scale, mask=columns < n)
    tl.store(partial + tl.load(layer + 15) * n, total_shift, mask=columns < n)


@triton.jit
def _channel_tile(
    source, channels, position, last, n, channel_stride, position_stride,
    POSITIONS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """(values [channels, POSITIONS] of one example in float32, which of them are there)."""
    positions = position + tl.arange(0, POSITIONS)
    inside = (channels < n)[:, None] & (positions < last)[None, :]
    if CHANNELS_LAST:
        offsets = channels[:, None] + (positions * position_stride)[None, :]
    else:
        offsets = (channels * channel_stride)[:, None] + positions[None, :]
    return tl.load(source + offsets, mask=inside, other=0.0).to(tl.float32), inside


@triton.jit
def channel_sums_kernel(
    addresses,  # int64 (layers, ADDRESS_FIELDS)
    layers,  # int64 (layers, LAYER_FIELDS)
    workspace,  # float32
    X_TYPE: tl.constexpr, G_TYPE: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
    BY_POSITION: tl.constexpr, ALIGNED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Partial sums of one program of a norm with a scale per channel; the second read of the input comes from a cache."""
    layer = layers + tl.program_id(1) * 32
    if tl.program_id(0) >= tl.load(layer + 10):
        return
    block, example, last_example, position, last_position, share = _share(layer, tl.program_id(0))
    address = addresses + tl.program_id(1) * 6
    x, g = tl.load(address).to(tl.pointer_type(X_TYPE)), tl.load(address + 1).to(tl.pointer_type(G_TYPE))
    n, shares, slots = tl.load(layer + 1).to(tl.int32), tl.load(layer + 13), tl.load(layer + 15)
    x_example, x_position, x_channel = tl.load(layer + 4), tl.load(layer + 5), tl.load(layer + 6)
    g_example, g_position, g_channel = tl.load(layer + 7), tl.load(layer + 8), tl.load(layer + 9)
    if ALIGNED:
        x, g, n = tl.multiple_of(x, 16), tl.multiple_of(g, 16), tl.multiple_of(n, 8)
        x_example, g_example = tl.multiple_of(x_example, 8), tl.multiple_of(g_example, 8)
        if CHANNELS_LAST:
            x_position, g_position = tl.multiple_of(x_position, 8), tl.multiple_of(g_position, 8)
        else:
            x_channel, g_channel = tl.multiple_of(x_channel, 8), tl.multiple_of(g_channel, 8)
            # They are multiples of 8. The compiler sees that only in a product, as hints are lost where a function returns.
            position, last_position = position // 8 * 8, last_position // 8 * 8
    channels = block * CHANNELS + tl.arange(0, CHANNELS)
    partials = workspace + tl.load(layer + 16) + channels
    each = 1.0 / (last_position - position)
    for e in range(example, last_example):
        x_of, g_of = x + e * x_example, g + e * g_example
        total = tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for p in range(position, last_position, POSITIONS):
            values, inside = _channel_tile(x_of, channels, p, last_position, n, x_channel, x_position, POSITIONS, CHANNELS_LAST)
            total += values
        mean = tl.sum(total, 1) * each
        deviation, zeroth = tl.zeros((CHANNELS, POSITIONS), tl.float32), tl.zeros((CHANNELS, POSITIONS), tl.float32)
        first, second = tl.zeros((CHANNELS, POSITIONS), tl.float32), tl.zeros((CHANNELS, POSITIONS), tl.float32)
        for p in range(position, last_position, POSITIONS):
            values, inside = _channel_tile(x_of, channels, p, last_position, n, x_channel, x_position, POSITIONS, CHANNELS_LAST)
            weight, inside = _channel_tile(g_of, channels, p, last_position, n, g_channel, g_position, POSITIONS, CHANNELS_LAST)
            away = tl.where(inside, values - mean[:, None], 0.0)
            deviation += away * away
            if BY_POSITION:
                weight = weight * weight
                second += weight * away * away
            zeroth += weight
            first += weight * away
        partial = partials + (e * shares + share % shares) * n
        field = slots * n
        tl.store(partial, mean, mask=channels < n)
        tl.store(partial + field, tl.sum(deviation, 1), mask=channels < n)
        tl.store(partial + 2 * field, tl.sum(zeroth, 1), mask=channels < n)
        tl.store(partial + 3 * field, tl.sum(first, 1), mask=channels < n)
        if BY_POSITION:
            tl.store(partial + 4 * field, tl.sum(second, 1), mask=channels < n)


@triton.jit
def _share_statistics(layer, workspace, units, start, items, ITEMS: tl.constexpr):
    """(means, sums of squared deviations, numbers of positions, which are there) of the shares that make up some units."""
    n, shares, group = tl.load(layer + 1), tl.load(layer + 13), tl.load(layer + 25)
    length, positions = tl.load(layer + 14), tl.load(layer + 3)
    item = start + tl.arange(0, ITEMS)
    place = (units // (n // group) * (shares * n) + units % (n // group) * group)[:, None]
    place += (item // group * n + item % group)[None, :]
    count = tl.minimum(length, positions - item // group % shares * length).to(tl.float32)
    inside = (units < tl.load(layer + 23))[:, None] & (item < items)[None, :]
    partial = workspace + tl.load(layer + 16) + place
    mean = tl.load(partial, mask=inside, other=0.0)
    deviation = tl.load(partial + tl.load(layer + 15) * n, mask=inside, other=0.0)
    return mean, deviation, count[None, :], inside


@triton.jit
def channel_statistics_kernel(
    addresses,  # int64 (layers, ADDRESS_FIELDS)
    layers,  # int64 (layers, LAYER_FIELDS)
    workspace,  # float32
    statistics,  # float32
    UNITS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Means and reciprocal deviations of some units of one layer: channels of a batch, or groups of channels of an example."""
    layer = layers + tl.program_id(1) * 32
    count = tl.load(layer + 23)
    if tl.program_id(0) * UNITS >= count:
        return
    units = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = units < count
    place = statistics + tl.load(layer + 22) + units
    epsilon = _epsilon(layer)
    if tl.load(layer + 26) != 0:
        address = addresses + tl.program_id(1) * 6
        running_mean = tl.load(address + 3).to(tl.pointer_type(tl.float32))
        running_variance = tl.load(address + 4).to(tl.pointer_type(tl.float32))
        tl.store(place, tl.load(running_mean + units, mask=inside), mask=inside)
        variance = tl.load(running_variance + units, mask=inside, other=1.0)
        tl.store(place + count, tl.rsqrt(variance + epsilon), mask=inside)
    else:
        examples = tl.load(layer + 2)
        joined = tl.where(tl.load(layer + 24) == 0, examples, 1)  # examples that have their statistics in common
        elements = tl.maximum(joined * tl.load(layer + 25) * tl.load(layer + 3), 1).to(tl.float32)
        items = (joined * tl.load(layer + 25) * tl.load(layer + 13)).to(tl.int32)
        # About the mean of a part, so that the sum is not large against what it is to tell.
        part = _share_statistics(layer, workspace, units, 0, items, 1)
        pivot = tl.sum(part[0], 1)
        total = tl.zeros((UNITS, ITEMS), tl.float32)
        for start in range(0, items, ITEMS):
            mean, deviation, positions, there = _share_statistics(layer, workspace, units, start, items, ITEMS)
            total += tl.where(there, positions * (mean - pivot[:, None]), 0.0)
        center = pivot + tl.sum(total, 1) / elements
        total = tl.zeros((UNITS, ITEMS), tl.float32)
        for start in range(0, items, ITEMS):
            mean, deviation, positions, there = _share_statistics(layer, workspace, units, start, items, ITEMS)
            away = mean - center[:, None]
            total += tl.where(there, deviation + positions * (away * away), 0.0)
        tl.store(place, center, mask=inside)
        tl.store(place + count, tl.rsqrt(tl.sum(total, 1) / elements + epsilon), mask=inside)


@triton.jit
def fisher_kernel(
    addresses,  # int64 (layers, ADDRESS_FIELDS)
    layers,  # int64 (layers, LAYER_FIELDS)
    workspace, statistics,  # float32
    alphas, betas,  # float (the caller's layers,)
    EXAMPLES: tl.constexpr, COLUMNS: tl.constexpr, HAS_CHANNELS: tl.constexpr, BY_POSITION: tl.constexpr,
):  # fmt: skip
    """Total <- beta total + alpha (sum of squared gradients), for some columns of scale or shift of one layer."""
    layer = layers + tl.program_id(1) * 32
    n, shares, slots = tl.load(layer + 1).to(tl.int32), tl.load(layer + 13).to(tl.int32), tl.load(layer + 15)
    blocks = tl.cdiv(n, COLUMNS)
    part = tl.program_id(0) // blocks  # 0 for the scale
    if part > tl.load(layer + 21):
        return
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    examples = (slots // shares).to(tl.int32)
    square = tl.load(layer + 20) != 0
    field = slots * n
    base = workspace + tl.load(layer + 16) + columns[None, :]
    total = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
    for first in range(0, examples, EXAMPLES):
        e = first + tl.arange(0, EXAMPLES)
        inside = (e < examples)[:, None] & (columns < n)[None, :]
        sums = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
        factor = tl.full((EXAMPLES, COLUMNS), 1.0, tl.float32)
        center = tl.zeros((EXAMPLES, COLUMNS), tl.float32)
        if HAS_CHANNELS:
            if part == 0:
                unit = (e * tl.load(layer + 24))[:, None] + (columns // tl.load(layer + 25))[None, :]
                place = statistics + tl.load(layer + 22) + unit
                center = tl.load(place, mask=inside, other=0.0)
                factor = tl.load(place + tl.load(layer + 23), mask=inside, other=0.0)
                if BY_POSITION:
                    factor = factor * factor
        for share in range(shares):
            at = base + ((e * shares + share).to(tl.int64) * n)[:, None]
            if HAS_CHANNELS:
                zeroth = tl.load(at + 2 * field, mask=inside, other=0.0)
                if part == 0:
                    away = tl.load(at, mask=inside, other=0.0) - center
                    mixed = tl.load(at + 3 * field, mask=inside, other=0.0)
                    if BY_POSITION:
                        sums += tl.load(at + 4 * field, mask=inside, other=0.0) + away * (2.0 * mixed + away * zeroth)
                    else:
                        sums += mixed + away * zeroth
                else:
                    sums += zeroth
            else:
                sums += tl.load(at + part * field, mask=inside, other=0.0)
        # Where there is nothing, the reciprocal that was stored is not used either.
        sums = tl.where(inside, sums * factor, 0.0)
        total += tl.where(square, sums * sums, sums)
    index = tl.load(layer)
    alpha, beta = tl.load(alphas + index).to(tl.float32), tl.load(betas + index).to(tl.float32)
    target = tl.load(addresses + tl.program_id(1) * 6 + 2).to(tl.pointer_type(tl.float32)) + part * n + columns
    known = tl.where(beta == 0.0, 0, n)  # columns whose old values count
    new = beta * tl.load(target, mask=columns < known, other=0.0) + alpha * tl.sum(total, 0)
    tl.store(target, new, mask=columns < n)
