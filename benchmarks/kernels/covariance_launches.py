"""How many kernels a covariance call launches: one for each way to read rows, and a second one where rows are split."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kfac_triton.kernels import tuning
from kfac_triton.kernels.covariance.plan import LEAST_SHARE, PROGRAMS_PER_PROCESSOR, shares_of

from .shapes import Layer


@dataclass(frozen=True)
class Card:
    """What launches depend on: the architecture whose tile sizes are taken, and the number of multiprocessors."""

    arch: str = "sm_90"
    processors: int = 132


@dataclass(frozen=True)
class Kind:
    """How rows are read: as a matrix, as images as they lie, or as patches; and how many neighbours are copied at once."""

    source: str
    width: int

    def tiles(self, itemsize: int, columns: int, arch: str) -> tuple[int, int]:
        """BLOCK and BLOCK_K for factors up to this size, as shipped."""
        key = {"patches": "covariance_patches", "images": "covariance_images", "rows": "covariance"}[self.source]
        if self.source != "patches":
            key = "covariance_unaligned" if self.width == 1 else key + "_fp32" * (itemsize == 4)
        entries = tuning.load(tuning.SHIPPED / f"{arch}.json")[key]
        entry = next(entry for entry in entries if entry["up_to"] is None or columns <= entry["up_to"])
        return entry["BLOCK"], entry["BLOCK_K"]


def kinds_of(layer: Layer, itemsize: int) -> tuple[Kind, Kind]:
    """How the rows of A and of G are read, if images are contiguous."""
    if (images := layer.images) is None:
        inputs, outputs = (Kind("rows", 8 if columns % 8 == 0 else 1) for columns in (layer.inputs, layer.outputs))
        return inputs, outputs

    def as_they_lie(channels: int, side: int) -> Kind:
        widths = (width for width in ((8, 4) if itemsize == 2 else (4,)) if side**2 % width == 0)
        return Kind("images", next(widths, 1) if channels % 8 == 0 else 1)

    gathered = images.kernel > 1 or images.stride > 1 or images.padding > 0
    of_inputs = Kind("patches", 1) if gathered else as_they_lie(images.channels, images.side)
    return of_inputs, as_they_lie(layer.outputs, images.out_side)


def launches(layers: Sequence[Layer], itemsize: int, card: Card) -> int:
    """Launches of one call for A and G of all these layers."""
    groups: dict[Kind, list[tuple[int, int]]] = defaultdict(list)
    for layer in layers:
        for kind, columns in zip(kinds_of(layer, itemsize), (layer.inputs, layer.outputs), strict=True):
            groups[kind] += [(layer.rows, columns)] * layer.count
    return sum(1 + _is_split(kind, members, itemsize, card) for kind, members in groups.items())


def _is_split(kind: Kind, members: list[tuple[int, int]], itemsize: int, card: Card) -> bool:
    """Whether a launch has fewer tiles than the card runs programs, and rows enough to share them out."""
    wanted = PROGRAMS_PER_PROCESSOR * card.processors

    def count(block: int) -> int:
        return sum(side * (side + 1) // 2 for side in (-(-columns // block) for _, columns in members))

    block, block_k = kind.tiles(itemsize, max(columns for _, columns in members), card.arch)
    rows = max(rows for rows, _ in members)
    if count(block) < wanted and rows < LEAST_SHARE * -(-wanted // count(block)):
        block, block_k = kind.tiles(itemsize, 1, card.arch)
    return shares_of(count(block), rows, block_k, wanted) > 1


def batches(layers: Sequence[Layer], itemsize: int, limit: int) -> Iterator[list[Layer]]:
    """Layers whose rows are summed by one call in a backward pass: as soon as rows take more than the limit, in bytes."""
    waiting: list[Layer] = []
    kept = 0
    for layer in layers:
        images = layer.images
        inputs = images.batch * images.channels * images.side**2 if images else layer.rows * layer.inputs
        for _ in range(layer.count):
            waiting.append(_one(layer))
            kept += itemsize * (inputs + layer.rows * layer.outputs)
            if kept > limit:
                yield waiting
                waiting, kept = [], 0
    if waiting:
        yield waiting


def _one(layer: Layer) -> Layer:
    return Layer(layer.rows, layer.inputs, layer.outputs, layer.bias, 1, layer.images)
