"""What a covariance call launches: layers grouped by kind, tile sizes, the tables of programs, rows split into shares.

All of it follows from types, sizes, strides, windows and the alignment of addresses, and is remembered under these.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import runtime, tuning
from ..device_tables import Table
from ..runtime import Target
from ..tiles import count
from . import kernel
from .layout import Layout, Operand, layout_of, reach
from .window import unflatten

PROGRAMS_PER_PROCESSOR = 2  # rows are split until a launch has this many
LEAST_SHARE = 1024  # rows: shorter shares are worse than smaller tiles, see `configuration`
_LEAST_CHUNKS = 4  # loop iterations of a share of the rows
_MOST_SHARES = 64
_KEPT = 128  # plans; a training loop repeats a handful, and a layer that is summed in backward has one of its own


class Programs(NamedTuple):
    """Rows of the tile table, rows of the reduction's table, and the number of workspace slots."""

    tiles: Table
    reductions: Table
    slots: int


class Group:
    """The layers of one launch: those for which the kernel is compiled in the same way.

    Attributes:
        dtype: of the inputs.
        layout: of each layer; all but the fields are the same for all.
        borders: which of them have a bias.
        indices: their places in the caller's lists.
        widest: the largest number of columns.
    """

    def __init__(self, dtype: torch.dtype, layouts: Sequence[Layout], borders: Sequence[bool], indices: Sequence[int]) -> None:
        self.dtype = dtype
        self.layout = layouts[0]
        self.borders = borders
        self.indices = indices
        self.rows = [layout.fields[kernel.ROWS] for layout in layouts]
        self.columns = [layout.fields[kernel.COLUMNS] for layout in layouts]
        self.widest = max(self.columns)
        self._programs: dict[tuple[int, int, int], Programs] = {}

    def tiles(self, block: int) -> int:
        """How many tiles of this side lie on and below the diagonals."""
        return sum(side * (side + 1) // 2 for side in (count(n, block) for n in self.columns))

    def programs(self, block: int, block_k: int, wanted: int) -> Programs:
        """The tables for tiles of these sizes, in a launch that should have so many programs; see `programs_of`."""
        key = (block, block_k, wanted)
        if key not in self._programs:
            self._programs[key] = programs_of(self.rows, self.columns, self.borders, self.indices, *key)
        return self._programs[key]


class Plan(NamedTuple):
    """What a call launches.

    Attributes:
        obstacle: why the kernel cannot serve the call; None if it can.
        layers: the layer table.
        groups: one for each launch.
    """

    obstacle: str | None
    layers: Table
    groups: list[Group]


def shares_of(tiles: int, rows: int, block_k: int, programs: int) -> int:
    """Number of shares that the rows of a layer are split into, for a launch with so many tiles that wants so many programs."""
    wanted = -(-programs // max(1, tiles))
    return max(1, min(wanted, rows // (_LEAST_CHUNKS * block_k), _MOST_SHARES))


def programs_of(
    rows: Sequence[int],
    columns: Sequence[int],
    borders: Sequence[bool],
    indices: Sequence[int],
    block: int,
    block_k: int,
    programs: int,
) -> Programs:
    """Who sums what.

    Args:
        rows: of the layers of one launch.
        columns: the same.
        borders: which of them have a bias.
        indices: their places in the caller's lists.
        block: side of a tile.
        block_k: rows that a program takes at a time.
        programs: how many a launch should have at least.
    """
    sides = [count(n, block) for n in columns]
    total = sum(side * (side + 1) // 2 for side in sides)
    tile_rows, reduce_rows, slots = [], [], 0
    for index, n, length, border, side in zip(indices, columns, rows, borders, sides, strict=True):
        shares = shares_of(total, length, block_k, programs)
        share = count(count(length, shares), block_k) * block_k
        cuts = [(min(k * share, length), min((k + 1) * share, length)) for k in range(shares)]
        wanted = [(i, j) for j in range(side) for i in range(j, side)]
        if border:  # its last stretch holds the corner, which may lie beyond the last tile
            wanted += [(i, kernel.BORDER) for i in range(count(n + 1, block))]
        for i, j in wanted:
            if shares > 1:
                reduce_rows.append((index, i, j, slots, slots + shares, kernel.DIRECT, 0, 0))
            for first, last in cuts:
                tile_rows.append((index, i, j, first, last, slots if shares > 1 else kernel.DIRECT, 0, 0))
                slots += shares > 1
    tile_rows.sort(
        key=lambda row: row[kernel.TILE_FIRST] - row[kernel.TILE_LAST]
    )  # the longest first, so that no long one starts last
    return Programs(Table(tile_rows), Table(reduce_rows), slots)


def config_key(dtype: torch.dtype, layout: Layout) -> str:
    """Key of the tile sizes: what a program holds besides the sums, and how wide it copies, depends on the kind of layer."""
    if layout.spatial:
        return "covariance_patches"
    if layout.width == 1:
        return "covariance_unaligned"
    key = "covariance_images" if layout.images else "covariance"
    return f"{key}_fp32" if dtype == torch.float32 else key


def rows_at_a_time(block_k: int, spatial: int) -> int:
    """Rows that a program takes at a time, for inputs with this many spatial dimensions.

    With three, a thread keeps one offset more for every column that it loads: half as many columns then fit its registers.
    """
    return block_k // 2 if spatial == 3 else block_k


def configuration(group: Group, target: Target) -> tuning.Config:
    """Tile sizes and launch options for one launch: those for its widest layer, or the smallest where tiles are few.

    Large tiles load less in all, and small ones fill more multiprocessors. On an H200, tiles of 64 were 28 % faster than tiles
    of 128 on 20 factors of sizes 128 to 512 with 1,024 rows, and 20 % slower on 64 factors of size 512 (see
    `benchmarks/results/nvidia-h200-2026-11-27`). There, the 20 factors have a hundred tiles of 128, fewer than the programs
    that the card holds: their rows were split into three shares, whose partial sums cost a launch more and as much traffic as
    the rows. Long shares are worth that, short ones are not; where the line is (`LEAST_SHARE`) was not measured.
    """
    key = config_key(group.dtype, group.layout)
    config = tuning.lookup(key, group.widest, target)
    tiles, programs = group.tiles(config["BLOCK"]), PROGRAMS_PER_PROCESSOR * target.processors
    if tiles < programs and max(group.rows) < LEAST_SHARE * count(programs, max(1, tiles)):
        return tuning.lookup(key, 1, target)
    return config


@functools.lru_cache(maxsize=_KEPT)
def plan_of(
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    factor_dtypes: tuple[torch.dtype, ...],
    factor_shapes: tuple[tuple[int, ...], ...],
    factor_strides: tuple[tuple[int, ...], ...],
    offsets: tuple[int, ...],
    borders: tuple[bool, ...],
    windows: tuple[int, ...],
) -> Plan:
    """The plan of a call.

    Args:
        dtypes: of the inputs.
        shapes: of the inputs.
        strides: of the inputs.
        factor_dtypes: of the factors.
        factor_shapes: of the factors.
        factor_strides: of the factors.
        offsets: what of the addresses of an input and of its factor is no multiple of 16 bytes; empty if nothing is.
        borders: which layers have a bias.
        windows: as the operator takes them.
    """
    kinds: dict[tuple[torch.dtype, int, bool, int], list[int]] = defaultdict(list)
    layouts = []
    for i, (dtype, shape, window) in enumerate(zip(dtypes, shapes, unflatten(windows, shapes), strict=True)):
        ours, theirs = offsets[2 * i : 2 * i + 2] or (0, 0)
        source = Operand(dtype, tuple(shape), strides[i], ours)
        factor = Operand(factor_dtypes[i], tuple(factor_shapes[i]), factor_strides[i], theirs)
        if obstacle := _obstacle(i, source, factor):
            return Plan(obstacle, Table(), [])
        layout = layout_of(source, factor, window)
        padding = (0, *window.padding) if layout.spatial else None
        if (layout.spatial or layout.images) and reach(shape[1:], source.strides[1:], padding) >= 2**31:
            return Plan(f"inputs[{i}] has images whose elements are further apart than 32 bits can count", Table(), [])
        layouts.append(layout)
        kinds[dtype, layout.spatial, layout.images, layout.width].append(i)
    groups = [
        Group(dtype, [layouts[i] for i in members], [bool(borders[i]) for i in members], members)
        for (dtype, *_), members in kinds.items()
    ]
    return Plan(None, Table(layout.fields for layout in layouts), groups)


def _obstacle(i: int, source: Operand, factor: Operand) -> str | None:
    if factor.dtype != torch.float32:
        return f"factors[{i}] is {factor.dtype}, and the kernel needs float32"
    if source.dtype not in runtime.TYPES:
        return f"inputs[{i}] is {source.dtype}, and the kernel reads float32, bfloat16 and float16"
    if factor.strides[1] != 1:
        return f"factors[{i}] has columns {factor.strides[1]} elements apart, and the kernel needs adjacent ones"
    if math.prod(source.shape) // max(1, source.shape[1]) >= 2**31 or factor.shape[0] >= 2**31:
        return f"inputs[{i}] has more rows than 32 bits can count"
    return None
