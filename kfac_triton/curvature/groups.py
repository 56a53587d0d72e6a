"""Tile groups: tiles that are preconditioned in one launch, and the places of their factors."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from ..kernels.device_tables import device_vector


@dataclass(frozen=True)
class SideGroup:
    """The factors A, or G, of a `TileGroup`: all of them are in one store.

    Attributes:
        store: index of the store in `FactorBank.stores`.
        places: index of each tile's factor within the store.
    """

    store: int
    places: tuple[int, ...]

    @functools.cached_property
    def run(self) -> slice | None:
        """The places as a slice, if they are consecutive; None if tiles share factors."""
        first = self.places[0]
        return slice(first, first + len(self.places)) if self.places == tuple(range(first, first + len(self.places))) else None

    def select(self, stack: Tensor) -> Tensor:
        """The group's matrices of a stack: a view if their places are consecutive, else a copy."""
        run = self.run
        if run is not None:
            return stack[run]
        return stack[device_vector(self.places, stack.device)]


@dataclass(frozen=True)
class TileGroup:
    """Tiles whose gradients have the same padded shape and whose factors are of the same kind."""

    tiles: tuple[int, ...]
    a: SideGroup
    g: SideGroup
