"""How the weights of layers are divided: each block into parts of A and G, which are the stored factors, and tiles of W.

A block is a diagonal block of the Fisher matrix, G (x) A: a layer, or one of its channel groups. Usually A and G are one part
each, and W is one tile. If a side is larger than `max_factor_size`, only its diagonal is kept, or it is divided into several
parts and what is outside of their diagonal blocks is ignored. A tile is the part of W between one part of G and one of A.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from .base import Layer
from .rows import Rows


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Double precision for a weight in double precision, else single: moving averages in 16 bits stop moving."""
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
    """A range of one side of W of a block, with one stored factor.

    Attributes:
        block: number of the block that it belongs to.
        is_input: whether it is a part of A, else of G.
        start, stop: the range, including the bias column of W.
        diagonal: whether only the diagonal of the factor is kept.
        has_bias_column: whether the last column is that of the bias, whose input is 1.
        unit: columns per channel; `start` and `stop` without the bias are multiples of it.
        whole: whether it is the whole side.
        group: channel group of the block. Stored here, so that a graph of torch.compile does not depend on the block's number.
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
        """Rows and columns of the factor."""
        return self.stop - self.start

    def cut(self, source: Tensor) -> Tensor:
        """Its columns (channels) of the rows, without the column of ones."""
        if self.whole or source.dim() == 1:
            return source
        unit = self.unit if source.dim() > 2 else 1  # mean patches are rows already
        return source[:, self.start // unit : (self.stop - self.has_bias_column) // unit]

    def sources(self, rows: Rows) -> tuple[Tensor, ops.Window]:
        """Its columns of the rows of a backward pass, and the window to read them with."""
        rows = rows.made()
        if self.is_input:
            return self.cut(rows.inputs[self.group]), rows.input_window
        source = rows.gradients[self.group]
        return self.cut(source), rows.gradient_window if source.dim() > 2 else ops.ROWS


@dataclass(frozen=True)
class Block:
    """A diagonal block of the Fisher matrix, G (x) A: a layer, or one channel group of it."""

    layer: Layer
    layer_number: int
    group: int


@dataclass(frozen=True)
class Tile:
    """The part of W of a block between a part of A and a part of G, given by their numbers."""

    block: int
    a: int
    g: int


class Partition:
    """All blocks, parts and tiles of some layers.

    Attributes:
        blocks: in the order of layers and groups.
        parts: for each block those of A, then those of G.
        tiles: for each block in the order of rows, then columns.
        parts_of: for each block, the numbers of the parts of A and of G.
        tiles_of: for each block, the numbers of its tiles.
    """

    def __init__(self, layers: Sequence[Layer], max_factor_size: int | None = None, oversize: str = "diagonal") -> None:
        self.layers = list(layers)
        self.blocks = [Block(x, i, group) for i, x in enumerate(layers) for group in range(x.groups)]
        self.parts: list[Part] = []
        self.tiles: list[Tile] = []
        self.parts_of: list[tuple[range, range]] = []
        self.tiles_of: list[range] = []
        for number, block in enumerate(self.blocks):
            a_parts, g_parts = (_divided(number, block, is_input, max_factor_size, oversize) for is_input in (True, False))
            first, middle = len(self.parts), len(self.parts) + len(a_parts)
            self.parts += a_parts + g_parts
            a_range, g_range = range(first, middle), range(middle, len(self.parts))
            self.parts_of.append((a_range, g_range))
            self.tiles_of.append(range(len(self.tiles), len(self.tiles) + len(a_range) * len(g_range)))
            self.tiles += [Tile(number, i, j) for j in g_range for i in a_range]

    def blocks_of(self, layer_number: int) -> list[int]:
        """Numbers of a layer's blocks."""
        return [i for i, block in enumerate(self.blocks) if block.layer_number == layer_number]


def _divided(number: int, block: Block, is_input: bool, largest: int | None, oversize: str) -> list[Part]:
    """The parts of A or of G of one block: the whole side, as a matrix or as its diagonal, or several."""
    layer, bias = block.layer, is_input and block.layer.has_bias
    size = layer.input_size if is_input else layer.output_size
    diagonal = layer.diagonal_inputs if is_input else layer.diagonal_gradients
    unit = layer.input_unit if is_input else 1
    count = 1 if is_input or diagonal else layer.output_parts  # a diagonal has no entries between parts to leave out
    size //= count
    bounds = [0, size]
    if not diagonal and largest is not None and size > largest:
        if oversize == "diagonal":
            diagonal = True
        else:
            bounds = _bounds(size, unit, bias, largest)
    whole = count == 1 and len(bounds) == 2
    return [
        Part(number, is_input, i * size + start, i * size + stop, diagonal, bias and stop == size, unit, whole, block.group)
        for i in range(count)
        for start, stop in itertools.pairwise(bounds)
    ]


def _bounds(size: int, unit: int, bias: bool, largest: int) -> list[int]:
    """Where parts of equal size begin and end, as few as fit; the last one has the bias, too."""
    if unit + bias > largest:
        raise ValueError(
            f"max_factor_size must be at least {unit + bias} to cut a side of size {size} into parts of whole channels, but "
            f"is {largest}; raise it, or pass oversize='diagonal'"
        )
    units = (size - bias) // unit
    count = -(-units * unit // ((largest - bias) // unit * unit))
    return [*(units * i // count * unit for i in range(count)), size]
