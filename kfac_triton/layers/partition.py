"""How layers fall into factors: parts of the sides of W, and tiles of W, each between a part of A and a part of G.

Usually a layer is one tile between two parts, its A and its G. A side larger than `max_factor_size` is kept as its diagonal,
or cut into blocks along its diagonal; a tile is then what lies between one block of A and one of G.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..kernels import ops
from .base import Layer, Rows


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Double precision for such a weight, else single: moving averages in 16 bits stop moving."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class FactorSpec:
    """A factor to store: its side, whether only its diagonal is kept, in what precision and where."""

    size: int
    dtype: torch.dtype
    device: torch.device
    diagonal: bool = False


@dataclass(frozen=True)
class Part:
    """One factor: a range of a side of W of one group of a layer.

    Attributes:
        block: number of the Kronecker block (layer and group) that it belongs to.
        is_input: whether it is part of A, else of G.
        start, stop: range of the side, the bias column of W included.
        diagonal: whether only the diagonal is kept.
        has_bias_column: whether the last place is the bias's, whose input is 1.
        unit: columns per channel; `start` and `stop` without the bias are multiples of it.
        whole: whether it is the whole side.
        group: channel group of the block. Known here, so that a graph of torch.compile does not depend on the block's number.
    """

    block: int
    is_input: bool
    start: int
    stop: int
    diagonal: bool
    has_bias_column: bool
    unit: int
    whole: bool
    group: int = 0

    @property
    def size(self) -> int:
        """Side of the factor."""
        return self.stop - self.start

    def cut(self, source: Tensor) -> Tensor:
        """The columns (channels) of rows that belong to it, without the ones."""
        if self.whole or source.dim() == 1:
            return source
        unit = self.unit if source.dim() > 2 else 1  # mean patches are rows already
        return source[:, self.start // unit : (self.stop - self.has_bias_column) // unit]

    def sources(self, rows: Rows) -> tuple[Tensor, ops.Window]:
        """Its columns of what a backward pass left, and how to read rows from them."""
        if self.is_input:
            return self.cut(rows.inputs[self.group]), rows.input_window
        source = rows.gradients[self.group]
        return self.cut(source), rows.gradient_window if source.dim() > 2 else ops.ROWS


@dataclass(frozen=True)
class Block:
    """One Kronecker block: a layer, or one channel group of it."""

    layer: Layer
    layer_number: int
    group: int


@dataclass(frozen=True)
class Tile:
    """A sub-matrix of W of one block, preconditioned by a part of A and a part of G, given by their numbers."""

    block: int
    a: int
    g: int


class Partition:
    """All parts, tiles and blocks of some layers.

    Attributes:
        blocks: in the order of layers and groups.
        parts: those of a block's A, then of its G.
        tiles: those of a block by rows, then columns.
        parts_of: per block, the numbers of the parts of A and of G.
        tiles_of: per block, the numbers of its tiles.
    """

    def __init__(self, layers: Sequence[Layer], max_factor_size: int | None = None, oversize: str = "diagonal") -> None:
        self.layers = list(layers)
        self.blocks = [Block(x, i, group) for i, x in enumerate(layers) for group in range(x.groups)]
        self.parts: list[Part] = []
        self.tiles: list[Tile] = []
        self.parts_of: list[tuple[range, range]] = []
        self.tiles_of: list[range] = []
        for number, block in enumerate(self.blocks):
            a, g = _sides(number, block)
            a_parts, g_parts = _divided(a, max_factor_size, oversize), _output_parts(g, block.layer, max_factor_size, oversize)
            first = len(self.parts)
            self.parts += a_parts + g_parts
            a_range, g_range = range(first, first + len(a_parts)), range(first + len(a_parts), len(self.parts))
            self.parts_of.append((a_range, g_range))
            start = len(self.tiles)
            self.tiles += [Tile(number, i, j) for j in g_range for i in a_range]
            self.tiles_of.append(range(start, len(self.tiles)))

    def blocks_of(self, layer_number: int) -> list[int]:
        """Numbers of a layer's blocks."""
        return [i for i, block in enumerate(self.blocks) if block.layer_number == layer_number]


def _sides(number: int, block: Block) -> tuple[Part, Part]:
    """A and G of a block, undivided."""
    layer = block.layer
    a = Part(
        number,
        True,
        0,
        layer.input_size,
        layer.diagonal_inputs,
        layer.has_bias,
        layer.input_unit,
        whole=True,
        group=block.group,
    )
    return a, Part(number, False, 0, layer.output_size, layer.diagonal_gradients, False, 1, whole=True, group=block.group)


def _output_parts(side: Part, layer: Layer, largest: int | None, oversize: str) -> list[Part]:
    """Parts of G: those of each of the layer's equal output blocks. A diagonal has none between its blocks to begin with."""
    count = 1 if side.diagonal else layer.output_parts
    if count == 1:
        return _divided(side, largest, oversize)
    size = side.size // count
    parts = _divided(replace(side, stop=size, whole=False), largest, oversize)
    return [replace(x, start=x.start + i * size, stop=x.stop + i * size) for i in range(count) for x in parts]


def _divided(side: Part, largest: int | None, oversize: str) -> list[Part]:
    """The side itself if it is not too large, else its diagonal or its blocks."""
    if side.diagonal or largest is None or side.size <= largest:
        return [side]
    if oversize == "diagonal":
        return [replace(side, diagonal=True)]
    unit, bias = side.unit, side.has_bias_column
    if unit + bias > largest:
        raise ValueError(
            f"max_factor_size must be at least {unit + bias} to cut a side of {side.size} into blocks of whole channels, but "
            f"is {largest}; raise it, or pass oversize='diagonal'"
        )
    units = (side.size - bias) // unit
    count = -(-units * unit // ((largest - bias) // unit * unit))  # equal blocks, as few as fit
    bounds = [units * i // count * unit for i in range(count)] + [side.size]
    return [
        replace(side, start=start, stop=stop, has_bias_column=bias and stop == side.size, whole=False)
        for start, stop in itertools.pairwise(bounds)
    ]
