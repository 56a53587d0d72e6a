"""Factors of which only the diagonal is kept: embeddings, norms, sides too wide for a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .groups import SideGroup
from .inverse import Inverse


class DiagonalFactors:
    """All diagonal factors of one type and place, end to end in one vector, so that one operation serves them all.

    Attributes:
        sizes: of the factors.
        factors: bias-corrected moving averages of the diagonals.
        sums: what passes added since the last step.
        owner: for every place the number of its factor.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.sizes = list(sizes)
        total = sum(sizes)
        self.factors = torch.zeros(total, dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.factors)
        self.owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
        self.old: Tensor | None = None  # flags (factors,): of which factors sums holds the old ones
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def nbytes(self) -> int:
        """Memory of the factors."""
        return self.factors.nbytes

    def piece(self, vector: Tensor, index: int) -> Tensor:
        """One factor's part of a vector over all: a view."""
        start = self._starts[index]
        return vector[start : start + self.sizes[index]]

    def rows(self, vector: Tensor, side: SideGroup) -> Tensor:
        """A group's parts of a vector over all, (tiles, n): they have one size."""
        return torch.stack([self.piece(vector, place) for place in side.places])

    def side(self, index: int) -> int:
        """The side that a gradient has for this factor: a diagonal has no pad."""
        return self.sizes[index]

    def view(self, index: int) -> Tensor:
        """One factor, (n,): a view."""
        return self.piece(self.factors, index)

    def write(self, index: int, value: Tensor) -> None:
        """Overwrites one factor."""
        self.view(index).copy_(value)

    def sum_of(self, index: int) -> Tensor:
        """Where backward passes sum what goes into one factor: a view."""
        return self.piece(self.sums, index)

    def traces(self, vector: Tensor) -> Tensor:
        """Sum over each factor, (factors,)."""
        return vector.new_zeros(len(self)).index_add_(0, self.owner, vector)

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, step: int = 0, backend: str = "auto") -> None:
        """Factor <- keep factor + gain sum for every factor that is accepted; vectors over factors."""
        keep, gain = (x.to(self.factors)[self.owner] for x in (keep, gain))
        blended = torch.where(accept[self.owner], keep * self.factors + gain * self.sums, self.factors)
        everywhere = torch.ones_like(accept)
        self.sums.copy_(self.factors)
        self.old = everywhere
        self.factors.copy_(blended)

    def roll_back(self) -> None:
        """Puts the factors back that `blend` changed in this step."""
        if self.old is not None:
            self.factors.copy_(self.sums)


class DiagonalInverse(Inverse):
    """Inverses of damped diagonals, 1 / (d + damping), end to end like the factors."""

    def __init__(self, store: DiagonalFactors) -> None:
        super().__init__(torch.zeros_like(store.factors), len(store))
        self._store = store
        self.residual.zero_()  # a diagonal is inverted exactly

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts the damped diagonals; a damping of zero stands for a factor that is 1 and needs none."""
        self.damping.copy_(damping)
        damped = factors + self.damping[self._store.owner]
        # Such a factor is zero as long as there are no statistics, and nothing is solved then.
        # The inverse of a number below the normal ones may be beyond the largest.
        self.values.copy_(torch.where(damped > 0, 1 / damped.clamp_min(torch.finfo(damped.dtype).tiny), 0.0))

    def left(self, side: SideGroup, x: Tensor) -> Tensor:
        """See `Inverse`."""
        return x * self._store.rows(self.values, side).unsqueeze(-1)

    def right(self, side: SideGroup, x: Tensor) -> Tensor:
        """See `Inverse`."""
        return x * self._store.rows(self.values, side).unsqueeze(-2)

    def kept(self, index: int) -> Tensor:
        """What a checkpoint keeps of one inverse, (n,): a view."""
        return self._store.piece(self.values, index)

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` gave; the residual is always zero."""
        self.kept(index).copy_(values)
        self.damping[index] = damping


class DiagonalBasis(DiagonalInverse):
    """Diagonals as factors whose eigenvectors are those of the identity; see `EigenStack`. A checkpoint keeps the inverses."""

    def left(self, side: SideGroup, x: Tensor, back: bool = False) -> Tensor:
        """See `EigenStack`."""
        return x

    def right(self, side: SideGroup, x: Tensor, back: bool = False) -> Tensor:
        """See `EigenStack`."""
        return x

    def spectrum(self, side: SideGroup) -> Tensor:
        """The diagonals themselves."""
        return self._store.rows(self._store.factors, side)
