"""EKFAC's diagonal: second moments of per-example gradients in the eigenbasis of the factors (George et al. 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.covariance.reference import patch_matrix
from ..kernels.ops import Window
from ..layers import Rows
from ..layers.partition import Partition
from .loss_terms import ONE, Number, Weight, is_one

_CHUNK = 1 << 24  # elements of per-example gradients at a time: 64 MiB in single precision


@dataclass(frozen=True)
class MomentTile:
    """One tile of a layer: its number, the eigenvectors of its factors (padded), and the sum of its moments (padded)."""

    tile: int
    a_vectors: Tensor
    g_vectors: Tensor
    total: Tensor


class Moments:
    """Sums over loss terms of the squares of per-example gradients, in the eigenbasis, for the tiles of one layer.

    Args:
        partition: of all layers.
        tiles: those of this layer.
    """

    def __init__(self, partition: Partition, tiles: Sequence[MomentTile]) -> None:
        self._partition = partition
        self._tiles = tiles
        self.ready = False  # there is a basis
        self.fresh = False  # something was added since the last step
        self._earlier: list[Tensor] = []

    def add(self, rows: Rows, weight: Weight = ONE) -> None:
        """Adds one backward pass. The loss terms of one example are treated as one term."""
        if not self.ready:
            return
        for place in self._tiles:
            tile = self._partition.tiles[place.tile]
            a_part, g_part = self._partition.parts[tile.a], self._partition.parts[tile.g]
            inputs = _matrix(*a_part.sources(rows), place.total.dtype)
            gradients = _matrix(*g_part.sources(rows), place.total.dtype)
            if a_part.has_bias_column:
                inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], 1)
            a, g = inputs @ place.a_vectors[: a_part.size], gradients @ place.g_vectors[: g_part.size]
            if not self.fresh:
                place.total.zero_()
            elif not is_one(weight.old):
                place.total.mul_(_like(weight.old, place.total))
            if weight is not ONE:
                g = g * _like(weight.new, g) ** 0.5
            _add_squares(place.total, a, g, rows.examples or len(a), rows.outer)
        self.fresh = True

    def set_aside(self) -> None:
        """Keeps the moments of earlier calls, whose weights will not change any more."""
        if not self.fresh:
            return
        totals = [place.total for place in self._tiles]
        earlier = self._earlier or [torch.zeros_like(total) for total in totals]
        self._earlier = [kept.add_(total) for kept, total in zip(earlier, totals, strict=True)]
        self.fresh = False

    def restore(self) -> None:
        """Adds what was set aside."""
        for place, kept in zip(self._tiles, self._earlier, strict=False):
            place.total.copy_(kept + place.total if self.fresh else kept)
        self.fresh |= bool(self._earlier)
        self._earlier = []

    def clear(self) -> None:
        """Forgets what was added since the last step."""
        self.fresh, self._earlier = False, []


def _like(number: Number, x: Tensor) -> Number:
    return number.to(x.device) if isinstance(number, Tensor) else number


def _matrix(source: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """Rows as a matrix, in the order that `Rows` describes."""
    source = source.to(dtype)
    return source if source.dim() == 2 else patch_matrix(source, window).T


def _add_squares(total: Tensor, a: Tensor, g: Tensor, examples: int, outer: int) -> None:
    """Total (m, n) += sum over examples of (sum over their rows of g a^T)^2."""
    if not examples:
        return
    if len(a) == examples:
        total.addmm_(g.square().T, a.square())
        return
    a, g = (x.unflatten(0, (outer, examples, -1)).transpose(0, 1).flatten(1, 2) for x in (a, g))
    chunk = max(1, _CHUNK // total.numel())
    for a_some, g_some in zip(a.split(chunk), g.split(chunk), strict=True):
        total.add_((g_some.mT @ a_some).square().sum(0))
