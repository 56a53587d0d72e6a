"""Where a run of K-FAC stands: one value, kept before a step and put back whole if the step fails."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """What the host knows of a run, beside the tensors of factors and inverses.

    Attributes:
        damping: that of the last step.
        without_statistics: numbers of the layers that have had no statistics yet.
        steps: taken so far.
        refreshes: how often inverses were computed.
        rewrites: how often inverses, or EKFAC's moments, were written: more often than that where moments follow every batch.
        is_stale: whether factors or damping have changed since the last refresh.
        has_new_layers: whether layers got their first statistics since the last refresh, so that their inverses, and with them
            what is certified, belong to no factors.
    """

    damping: float
    without_statistics: frozenset[int]
    steps: int = 0
    refreshes: int = 0
    rewrites: int = 0
    is_stale: bool = True
    has_new_layers: bool = False

    def at_step(self, steps: int) -> Progress:
        """With another number of steps taken."""
        return replace(self, steps=steps)

    def at_damping(self, damping: float) -> Progress:
        """With the damping of this step; inverses with another one are stale."""
        return replace(self, damping=damping, is_stale=self.is_stale or damping != self.damping)

    def with_statistics(self, layers: Set[int]) -> Progress:
        """With the first statistics of some layers: their inverses do not wait until they are due."""
        if not layers:
            return self
        return replace(self, without_statistics=self.without_statistics - layers, is_stale=True, has_new_layers=True)

    def rewritten(self) -> Progress:
        """With inverses, or moments, that are being written: said before, because writing may fail half way."""
        return replace(self, rewrites=self.rewrites + 1)

    def refreshed(self) -> Progress:
        """With inverses of the factors as they are."""
        return replace(self, refreshes=self.refreshes + 1, is_stale=False, has_new_layers=False)
