"""Launches the covariance kernels: groups of layers, the tables that describe them, and the split of rows into shares."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..device_tables import device_table
from ..tiles import count
from . import kernel
from .window import Window, unflatten

_PROGRAMS_PER_PROCESSOR = 2  # rows are split until a launch has this many
_LEAST_CHUNKS = 4  # loop iterations of a share of the rows
_MOST_SHARES = 64
REDUCED_PART = 32  # side of the part of a tile that a program of the reduction takes
_KEPT = 64  # cached plans; a training loop repeats a handful

# (rows, n, row stride, column stride, factor stride, ...) of a layer, the first fields of its row in the layer table
Geometry = tuple[int, ...]
Table = tuple[tuple[int, ...], ...]


def can_use(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: Sequence[bool],
    windows: Sequence[int],
    accept: Tensor | None = None,
) -> str | None:
    """Why the kernel cannot serve these layers; None if it can."""
    for i, (factor, source, window) in enumerate(zip(factors, inputs, unflatten(windows, inputs), strict=True)):
        if factor.dtype != torch.float32:
            return f"factors[{i}] is {factor.dtype}, and the kernel needs float32"
        if reason := runtime.unreadable(f"inputs[{i}]", source):
            return reason
        if factor.stride(1) != 1:
            return f"factors[{i}] has columns {factor.stride(1)} elements apart, and the kernel needs adjacent ones"
        if source.numel() // max(1, source.shape[1]) >= 2**31 or factor.shape[0] >= 2**31:
            return f"inputs[{i}] has more rows than 32 bits can count"
        if source.dim() > 2 and _extent(source, window) >= 2**31:
            return f"inputs[{i}] has images whose elements are further apart than 32 bits can count"
    return None


def _extent(images: Tensor, window: Window) -> int:
    """Largest distance in memory, in elements, between places of an image that a window reaches, padding included."""
    padding = (0, *window.padding)
    return sum((size - 1 + 2 * p) * step for size, p, step in zip(images.shape[1:], padding, images.stride()[1:], strict=True))


def geometry_of(source: Tensor, factor: Tensor, window: Window) -> Geometry:
    """The row of the layer table for one input."""
    fields = [0] * kernel.LAYER_FIELDS
    fields[kernel.FACTOR_STRIDE] = factor.stride(0)
    if source.dim() == 2:
        rows, n = source.shape
        fields[: kernel.FACTOR_STRIDE] = [rows, n, source.stride(0), source.stride(1)]
        return tuple(fields)
    missing = 5 - source.dim()
    sizes = [1] * missing + list(source.shape[2:])
    window = window.in_three_dimensions()
    outputs = window.positions(sizes)
    positions = math.prod(outputs)
    fields[: kernel.FACTOR_STRIDE] = [source.shape[0] * positions, source.shape[1] * math.prod(window.kernel), 0, 0]
    fields[kernel.POSITIONS] = positions
    for at, values in (
        (kernel.KERNEL, window.kernel),
        (kernel.OUTPUT, outputs),
        (kernel.STRIDE, window.stride),
        (kernel.PADDING, window.padding),
        (kernel.DILATION, window.dilation),
        (kernel.INPUT, sizes),
        (kernel.INPUT_STRIDE, [0] * missing + list(source.stride()[2:])),
    ):
        fields[at : at + 3] = values
    fields[kernel.IMAGE_STRIDE], fields[kernel.CHANNEL_STRIDE] = source.stride()[:2]
    return tuple(fields)


def shares_of(tiles: int, rows: int, block_k: int, programs: int) -> int:
    """Number of shares that the rows of a layer are split into, for a launch with so many tiles that wants so many programs."""
    wanted = -(-programs // max(1, tiles))
    return max(1, min(wanted, rows // (_LEAST_CHUNKS * block_k), _MOST_SHARES))


@functools.lru_cache(maxsize=_KEPT)
def tables(
    geometries: tuple[Geometry, ...],
    borders: tuple[bool, ...],
    indices: tuple[int, ...],
    block: int,
    block_k: int,
    programs: int,
) -> tuple[Table, Table, int]:
    """Rows of the tile table, rows of the reduction's table, and the number of workspace slots.

    Args:
        geometries: of the layers of one launch.
        borders: which of them have a bias.
        indices: their places in the caller's lists.
        block: side of a tile.
        block_k: rows that a program takes at a time.
        programs: how many a launch should have at least.
    """
    sides = [count(fields[kernel.COLUMNS], block) for fields in geometries]
    total = sum(side * (side + 1) // 2 for side in sides)
    tile_rows, reduce_rows, slots = [], [], 0
    for index, fields, border, side in zip(indices, geometries, borders, sides, strict=True):
        rows = fields[kernel.ROWS]
        shares = shares_of(total, rows, block_k, programs)
        length = count(count(rows, shares), block_k) * block_k
        cuts = [(min(k * length, rows), min((k + 1) * length, rows)) for k in range(shares)]
        wanted = [(i, j) for j in range(side) for i in range(j, side)]
        if border:  # its last stretch holds the corner, which may lie beyond the last tile
            wanted += [(i, kernel.BORDER) for i in range(count(fields[kernel.COLUMNS] + 1, block))]
        for i, j in wanted:
            if shares > 1:
                reduce_rows.append((index, i, j, slots, slots + shares, kernel.DIRECT, 0, 0))
            for first, last in cuts:
                tile_rows.append((index, i, j, first, last, slots if shares > 1 else kernel.DIRECT, 0, 0))
                slots += shares > 1
    tile_rows.sort(
        key=lambda row: row[kernel.TILE_FIRST] - row[kernel.TILE_LAST]
    )  # the longest first, so that no long one starts last
    return tuple(tile_rows), tuple(reduce_rows), slots


def config_key(dtype: torch.dtype, spatial: int, aligned: bool) -> str:
    """Key of the tile sizes: what a program holds besides the sums, and how wide it copies, depends on the kind of layer."""
    if spatial:
        return "covariance_patches"
    if not aligned:
        return "covariance_unaligned"
    return "covariance_fp32" if dtype == torch.float32 else "covariance"


def rows_at_a_time(block_k: int, spatial: int) -> int:
    """Rows that a program takes at a time, for inputs with this many spatial dimensions.

    With three, a thread keeps one offset more for every column that it loads: half as many columns then fit its registers.
    """
    return block_k // 2 if spatial == 3 else block_k


def _is_aligned(source: Tensor, factor: Tensor) -> bool:
    """Whether rows can be copied 16 bytes at a time, and a factor's too."""
    return (
        source.dim() == 2
        and source.stride(1) == 1
        and source.data_ptr() % 16 == factor.data_ptr() % 16 == 0
        and source.stride(0) % 8 == factor.stride(0) % 8 == source.shape[1] % 8 == 0
    )


def launch(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: Sequence[bool],
    windows: Sequence[int],
    accept: Tensor | None = None,
) -> None:
    """The Triton implementation of `covariance_ema_reference`, for a call that `can_use` accepts."""
    if not factors:
        return
    device = factors[0].device
    target = runtime.target(device)
    geometries = tuple(map(geometry_of, inputs, factors, unflatten(windows, inputs)))
    # One launch per kind of layer: the kind decides how the kernel is compiled.
    kinds: dict[tuple[torch.dtype, int, bool], list[int]] = defaultdict(list)
    for i, (factor, source) in enumerate(zip(factors, inputs, strict=True)):
        kinds[source.dtype, source.dim() - 2, _is_aligned(source, factor)].append(i)
    layer_table = device_table(geometries, device)
    addresses = device_table((tuple(x.data_ptr() for x in inputs), tuple(x.data_ptr() for x in factors)), device)
    flags = accept.view(torch.uint8) if accept is not None and accept.dtype == torch.bool else accept
    for (dtype, spatial, aligned), members in kinds.items():
        widest = max(geometries[i][kernel.COLUMNS] for i in members)
        config = dict(tuning.lookup(config_key(dtype, spatial, aligned), widest, target))
        block, block_k = config.pop("BLOCK"), rows_at_a_time(config.pop("BLOCK_K"), spatial)
        tile_rows, reduce_rows, slots = tables(
            tuple(geometries[i] for i in members),
            tuple(bool(ones_column[i]) for i in members),
            tuple(members),
            block,
            block_k,
            _PROGRAMS_PER_PROCESSOR * target.processors,
        )
        tile_table = device_table(tile_rows, device, torch.int32)
        workspace = torch.empty(slots * block * block, dtype=torch.float32, device=device)
        shared = (alpha, beta, alpha if flags is None else flags, workspace)
        kernel.covariance_kernel[(len(tile_table),)](
            addresses[0], addresses[1], layer_table, tile_table, *shared,
            DTYPE=runtime.TYPES[dtype],
            BLOCK=block, BLOCK_K=block_k, PRECISION=precision.resolve(precision.ROWS, target),
            ALIGNED=aligned, SPATIAL=spatial, UPCAST=runtime.INTERPRETED and dtype != torch.float32,
            HAS_ACCEPT=flags is not None, enable_fp_fusion=True, **config,
        )  # fmt: skip
        if reduce_rows:
            reduce_table = device_table(reduce_rows, device, torch.int32)
            part = min(block, REDUCED_PART)
            kernel.covariance_reduce_kernel[(len(reduce_table), (block // part) ** 2)](
                addresses[1], layer_table, reduce_table, *shared,
                BLOCK=block, PART=part, HAS_ACCEPT=flags is not None, enable_fp_fusion=True, num_warps=4,
            )  # fmt: skip
