"""The progress of a run: one immutable value, so that a step that fails can restore the one before it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Progress:
    """What the host knows about a run, apart from the tensors.

    Attributes:
        damping: of the last step.
        without_statistics: numbers of the layers that have no statistics yet.
        steps: number of steps taken.
        refreshes: number of times that inverses were computed.
        rewrites: number of times that inverses or EKFAC's moments were overwritten; the moments change with every batch.
        is_stale: whether factors or damping have changed since the last refresh.
        has_new_layers: whether a layer got its first statistics since the last refresh. Its inverse, and the certificate of
            it, belong to no factors until the next one.
    """

    damping: float
    without_statistics: frozenset[int]
    steps: int = 0
    refreshes: int = 0
    rewrites: int = 0
    is_stale: bool = True
    has_new_layers: bool = False

    def at_step(self, steps: int) -> Progress:
        """After this number of steps."""
        return replace(self, steps=steps)

    def at_damping(self, damping: float) -> Progress:
        """With the damping of this step. If it is another one than before, inverses are stale."""
        return replace(self, damping=damping, is_stale=self.is_stale or damping != self.damping)

    def with_statistics(self, layers: Set[int]) -> Progress:
        """After the first statistics of these layers. They need inverses now, even if none are due."""
        if not layers:
            return self
        return replace(self, without_statistics=self.without_statistics - layers, is_stale=True, has_new_layers=True)

    def rewritten(self) -> Progress:
        """Before inverses or moments are overwritten. It is noted before, because this can fail half way."""
        return replace(self, rewrites=self.rewrites + 1)

    def refreshed(self) -> Progress:
        """After inverses of the current factors were computed."""
        return replace(self, refreshes=self.refreshes + 1, is_stale=False, has_new_layers=False)
