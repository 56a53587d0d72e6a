"""Norm layers as the kernels read them: examples, positions and columns behind strides, and the split into programs."""

from __future__ import annotations

import functools
import itertools
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..device_tables import Table
from ..strides import collapsed
from ..tiles import count
from . import kernel
from .norm import Norm

_KEPT, _KEPT_LAYERS = 64, 1024  # cached plans and layers; a training loop repeats a handful and some dozens
_LEAST_ELEMENTS = 1 << 14  # of a program: a smaller one ends before it has paid for its start

# A kind of layer is compiled and launched by itself. The tile of a program: rows and columns, or positions and channels.
WIDEST, WIDEST_16_BIT = 4096, 8192  # columns that a program holds; 16-bit numbers, if it can load 16 bytes at a time
WIDE_COLUMNS = 2048  # of a program of a wider layer
_ROW_TILE = 2048  # elements of a tile of rows
CHANNEL_TILE = {True: (16, 64), False: (64, 16)}  # by channels_last: positions, channels


def rows_of(columns: int) -> int:
    """Rows of a tile with so many columns."""
    return max(1, _ROW_TILE // columns)


class View(NamedTuple):
    """A tensor as (examples, positions, columns): its strides, in elements, and whether 16 bytes can be loaded at a time."""

    example: int
    position: int
    column: int
    aligned: bool


@dataclass(frozen=True, eq=False)
class Shape:
    """One layer of a call; layers that differ in `kind` need launches of their own. Equal layers have the same object.

    Attributes:
        norm: the layer.
        width: entries of the scale.
        examples: number of examples, with positions that are the same number for each.
        positions: positions of an example.
        x: how the input lies in memory.
        g: the same for the gradient.
        by_position: whether squares are summed over positions. Examples of one position are positions of one example.
        running: whether running statistics are given.
        types: of input and gradient.
    """

    norm: Norm
    width: int
    examples: int
    positions: int
    x: View
    g: View
    by_position: bool
    running: bool
    types: tuple[torch.dtype, torch.dtype]

    @property
    def channels_last(self) -> bool:
        """Whether channels lie side by side."""
        return self.x.column == 1

    @property
    def aligned(self) -> bool:
        """Whether 16 bytes can be loaded at a time."""
        return self.x.aligned and self.g.aligned

    @property
    def is_wide(self) -> bool:
        """Whether no program holds a whole row."""
        is_short = self.aligned and all(dtype.itemsize == 2 for dtype in self.types)
        return not self.norm.has_channels and self.width > (WIDEST_16_BIT if is_short else WIDEST)

    @functools.cached_property
    def tile(self) -> tuple[int, int]:
        """Positions and columns that a program takes at a time."""
        if self.norm.has_channels:
            return CHANNEL_TILE[self.channels_last]
        columns = WIDE_COLUMNS if self.is_wide else max(16, 1 << (self.width - 1).bit_length())
        return rows_of(columns), columns

    @functools.cached_property
    def kind(self) -> tuple[object, ...]:
        """What decides how the first kernel is compiled; channel norms come last."""
        types = tuple(map(str, self.types))
        return self.norm.has_channels, self.by_position, self.is_wide, self.tile, self.channels_last, self.aligned, types


@functools.lru_cache(maxsize=_KEPT_LAYERS)
def _view(sizes: tuple[int, ...], strides: tuple[int, ...], starts_aligned: bool, norm: Norm) -> View | None:
    """How a tensor lies in memory; None if not as the kernels read it."""
    if not math.prod(sizes):  # whose strides mean nothing
        return View(0, 0, 1, False)
    if norm.has_channels:
        channels, position = sizes[1], collapsed(sizes[2:], strides[2:], 0)
        column = 1 if channels == 1 else strides[1]
        if math.prod(sizes[2:]) == 1 and column != 1:
            position = 1
        if position is None or (column != 1 and position != 1):
            return None
        inner = channels if column == 1 else math.prod(sizes[2:])
        steps = [position, strides[0]] if column == 1 else [column, strides[0]]
    else:
        outer = len(sizes) - norm.dims
        inner = math.prod(sizes[outer:])
        position = collapsed(sizes[1:outer], strides[1:outer], 0)
        if position is None or (collapsed(sizes[outer:], strides[outer:], 0) != 1 and inner != 1):
            return None
        column, steps = 1, [position, strides[0] if outer else 0]
    aligned = starts_aligned and inner % 8 == 0 and all(step % 8 == 0 for step in steps)
    return View(steps[-1], position, column, aligned)


def _readable(source: Tensor, norm: Norm, like: View | None = None) -> tuple[Tensor, View]:
    """The tensor, or a copy of it that lies as the kernels read it; with channels last if `like` does."""
    view = _view(source.shape, source.stride(), source.data_ptr() % 16 == 0, norm)
    if view is not None and (like is None or (view.column == 1) == (like.column == 1)):
        return source, view
    if like is not None and like.column == 1 and norm.has_channels:
        source = source.movedim(1, -1).contiguous().movedim(-1, 1)
    else:
        source = source.contiguous()
    view = _view(source.shape, source.stride(), source.data_ptr() % 16 == 0, norm)
    assert view is not None
    return source, view


def describe(x: Tensor, g: Tensor, norm: Norm, running: bool) -> tuple[Tensor, Tensor, Shape]:
    """Input and gradient as the kernels read them, and their description."""
    x, x_view = _readable(x, norm)
    g, g_view = _readable(g, norm, x_view)
    return x, g, _shape(x.shape, x_view, g_view, norm, running, (x.dtype, g.dtype))


Sizes = tuple[int, ...]


@functools.lru_cache(maxsize=_KEPT)
def shapes_in_place(
    norms: tuple[Norm, ...],
    sizes: tuple[Sizes, ...],
    strides: tuple[tuple[Sizes, ...], tuple[Sizes, ...]],
    types: tuple[tuple[torch.dtype, ...], tuple[torch.dtype, ...]],
    offsets: tuple[int, ...],
    running: tuple[bool, ...],
) -> tuple[Shape | None, ...]:
    """The layers of a call as `describe` would describe them; None for those of which it would copy something.

    Args:
        norms: the layers.
        sizes: of the inputs, and of the gradients.
        strides: of the inputs, and those of the gradients.
        types: likewise.
        offsets: what is missing in the addresses of inputs, then of gradients, to a multiple of 16; empty if nothing is.
        running: whether running statistics are given.
    """
    found: list[Shape | None] = []
    for i, (norm, size) in enumerate(zip(norms, sizes, strict=True)):
        starts = (offsets[i], offsets[i + len(norms)]) if offsets else (0, 0)
        x, g = (_view(size, side[i], start % 16 == 0, norm) for side, start in zip(strides, starts, strict=True))
        if x is None or g is None or (x.column == 1) != (g.column == 1):
            found.append(None)
        else:
            found.append(_shape(size, x, g, norm, running[i], (types[0][i], types[1][i])))
    return tuple(found)


@functools.lru_cache(maxsize=_KEPT_LAYERS)
def _shape(
    sizes: tuple[int, ...], x: View, g: View, norm: Norm, running: bool, types: tuple[torch.dtype, torch.dtype]
) -> Shape:
    examples, positions = norm.counts(sizes)
    by_position = norm.by_position or positions == 1
    adjacent = positions == 1 or (x.example, g.example) == (positions * x.position, positions * g.position)
    # The statistics of a group are those of an example. Otherwise examples only part the sums over positions.
    if by_position and adjacent and norm.kind != "group" and x.column == 1:
        if positions == 1:
            x, g = (view._replace(example=0, position=view.example) for view in (x, g))
        examples, positions = 1, examples * positions
    if examples * positions == 0:
        examples = positions = 0
    return Shape(norm, norm.width(sizes), examples, positions, x, g, by_position, running, types)


def split(shape: Shape, elements: int) -> tuple[int, int, int]:
    """(examples of a program, parts of the positions of an example, positions of a part) for programs of so many elements."""
    rows, columns = shape.tile
    wanted = max(rows, count(elements, min(columns, shape.width)))
    if wanted >= shape.positions:
        return max(1, min(wanted // max(1, shape.positions), shape.examples)), 1, max(1, shape.positions)
    length = count(count(shape.positions, count(shape.positions, wanted)), rows) * rows
    return 1, count(shape.positions, length), length


@dataclass(frozen=True)
class Plan:
    """The layer table of a call, and what its launches need.

    Attributes:
        places: of the layers in the caller's lists, in the order of the table, in which those of one kind are neighbours.
        shapes: of the layers, in this order.
        rows: the layer table.
        programs: of each layer, in the first kernel.
        partials: elements of the workspace.
        statistics: elements of the statistics.
        kinds: which rows the first kernel processes in a launch.
        units: which rows have channels, and the most statistics that one of these has; None without such rows.
        results: which rows the last kernel processes in a launch, and the widest of them.
    """

    places: tuple[int, ...]
    shapes: tuple[Shape, ...]
    rows: Table
    programs: tuple[int, ...]
    partials: int
    statistics: int
    kinds: tuple[slice, ...]
    units: tuple[slice, int] | None
    results: tuple[tuple[slice, int], ...]


@functools.lru_cache(maxsize=_KEPT)
def plan(described: tuple[Shape, ...], programs: int) -> Plan:
    """The table of some layers for launches of so many programs."""
    places = tuple(sorted(range(len(described)), key=lambda i: described[i].kind))
    shapes = tuple(described[i] for i in places)
    total: dict[tuple[object, ...], int] = {}
    for shape in shapes:
        total[shape.kind] = total.get(shape.kind, 0) + shape.width * shape.examples * shape.positions
    table, counts, partials, statistics = [], [], 0, 0
    for shape, place in zip(shapes, places, strict=True):
        norm, examples, positions = shape.norm, shape.examples, shape.positions
        taken, shares, length = split(shape, max(_LEAST_ELEMENTS, count(total[shape.kind], programs)))
        blocks = count(shape.width, shape.tile[1])
        parts = count(examples, taken)  # of the examples
        # Partial sums about a mean must be kept for every example; others that need not be squared are added up.
        slots = (examples if norm.has_channels else parts) * shares
        square = not shape.by_position
        square_first = square and shares == 1 and not norm.has_channels
        group = shape.width // norm.groups if norm.kind == "group" else 1
        units = shape.width // group * (examples if norm.kind == "group" else 1) if norm.has_channels else examples * positions
        fields = [0] * kernel.LAYER_FIELDS
        for at, value in (
            (kernel.INDEX, place),
            (kernel.WIDTH, shape.width),
            (kernel.EXAMPLES, examples),
            (kernel.POSITIONS, positions),
            (kernel.X_EXAMPLE, shape.x.example),
            (kernel.X_POSITION, shape.x.position),
            (kernel.X_CHANNEL, shape.x.column),
            (kernel.G_EXAMPLE, shape.g.example),
            (kernel.G_POSITION, shape.g.position),
            (kernel.G_CHANNEL, shape.g.column),
            (kernel.PROGRAMS, blocks * parts * shares),
            (kernel.BLOCKS, blocks),
            (kernel.TAKEN, taken),
            (kernel.SHARES, shares),
            (kernel.LENGTH, length),
            (kernel.SLOTS, slots),
            (kernel.PARTIALS, partials),
            (kernel.EPSILON, _bits(norm.eps)),
            (kernel.CENTERED, norm.kind != "rms"),
            (kernel.SQUARE_FIRST, square_first),
            (kernel.SQUARE_LAST, square and not square_first),
            (kernel.HAS_SHIFT, norm.has_shift),
            (kernel.STATISTICS, statistics),
            (kernel.UNITS, units),
            (kernel.EXAMPLE_UNITS, norm.groups if norm.kind == "group" else 0),
            (kernel.GROUP, group),
            (kernel.RUNNING, shape.running),
        ):
            fields[at] = int(value)
        table.append(tuple(fields))
        counts.append(blocks * parts * shares)
        partials += slots * shape.width * ((5 if shape.by_position else 4) if norm.has_channels else 2)
        statistics += 2 * units if norm.has_channels or shape.is_wide else 0
    first = sum(not shape.norm.has_channels for shape in shapes)
    most = max((row[kernel.UNITS] for row in table[first:]), default=0)
    channels = (slice(first, len(table)), most) if first < len(table) else None
    runs = _runs([shape.kind for shape in shapes])
    # Only sums about a mean differ if positions are terms.
    results = _runs([(shape.norm.has_channels, shape.norm.has_channels and shape.by_position) for shape in shapes])
    widest = tuple((run, max(shape.width for shape in shapes[run])) for run in results)
    return Plan(places, shapes, Table(table), tuple(counts), partials, statistics, tuple(runs), channels, widest)


def _runs(values: Sequence[object]) -> list[slice]:
    """Where neighbours are equal."""
    runs, start = [], 0
    for _, members in itertools.groupby(values):
        stop = start + len(list(members))
        runs.append(slice(start, stop))
        start = stop
    return runs


def _bits(eps: float | None) -> int:
    """The bits of epsilon as a float32; None is torch's default for the type that it computes in."""
    value: int = struct.unpack("<i", struct.pack("<f", torch.finfo(torch.float32).eps if eps is None else eps))[0]
    return value
