"""Tiles that are preconditioned together, and where the factors of each side are stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.device_tables import device_table


@dataclass(frozen=True)
class SideGroup:
    """One side of a `TileGroup`: the store of its factors, and their places in it.

    Attributes:
        store: number in `FactorBank.stores`.
        places: one a tile.
    """

    store: int
    places: tuple[int, ...]

    @property
    def run(self) -> slice | None:
        """The places as a slice of a stack, a view; None where factors are shared between tiles."""
        first = self.places[0]
        return slice(first, first + len(self.places)) if self.places == tuple(range(first, first + len(self.places))) else None

    def select(self, stack: Tensor) -> Tensor:
        """The group's part of a stack: a view where its factors are contiguous."""
        if self.run is not None:
            return stack[self.run]
        return stack[device_table(tuple((place,) for place in self.places), stack.device).flatten()]


@dataclass(frozen=True)
class TileGroup:
    """Tiles whose gradients have one padded shape and whose factors are of one kind: one launch for all."""

    tiles: tuple[int, ...]
    a: SideGroup
    g: SideGroup
