"""Factors of which only the diagonal is kept: those of embeddings, norms and very wide layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .groups import SideGroup
from .inverse import Inverse


class DiagonalFactors:
    """All diagonal factors of one dtype and device, concatenated into one vector, so that one operation updates them all.

    Attributes:
        sizes: size of each factor.
        diagonal_sizes: likewise, as `FactorStack` has it.
        factors: bias-corrected moving averages of the diagonals.
        sums: sums over the backward passes since the last step.
        owner: for each element, the number of its factor.
        nbytes: bytes of the factors.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.sizes = list(sizes)
        self.diagonal_sizes = tuple(sizes)
        self._starts = [*itertools.accumulate(sizes, initial=0)]
        self.factors = torch.zeros(self._starts[-1], dtype=dtype, device=device)
        self.nbytes = self.factors.nbytes
        self.sums = torch.zeros_like(self.factors)
        self.owner = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)], device=device)
        self.old: Tensor | None = None  # flags (factors,): those whose old values are in `sums`

    def __len__(self) -> int:
        return len(self.sizes)

    def piece(self, vector: Tensor, index: int) -> Tensor:
        """The elements of one factor in a concatenated vector: a view."""
        start = self._starts[index]
        return vector[start : start + self.sizes[index]]

    def rows(self, vector: Tensor, side: SideGroup) -> Tensor:
        """The elements of a group's factors, which have the same size n, as rows (tiles, n): a view of neighbours."""
        run = side.run
        if run is not None:
            return vector[self._starts[run.start] : self._starts[run.stop]].view(len(side.places), -1)
        return torch.stack([self.piece(vector, place) for place in side.places])

    def view(self, index: int) -> Tensor:
        """The diagonal of one factor, (n,): a view."""
        return self.piece(self.factors, index)

    def write(self, index: int, value: Tensor) -> None:
        """Overwrites one factor."""
        self.view(index).copy_(value)

    def traces(self, vector: Tensor) -> Tensor:
        """Trace of each factor, (factors,), given all diagonals."""
        return vector.new_zeros(len(self)).index_add_(0, self.owner, vector)

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, step: int = 0, backend: str = "auto") -> None:
        """Sets accepted factors to keep * factor + gain * sum; keep, gain and accept have one element for each factor."""
        keep, gain = (x.to(self.factors)[self.owner] for x in (keep, gain))
        blended = torch.where(accept[self.owner], keep * self.factors + gain * self.sums, self.factors)
        everywhere = torch.ones_like(accept)
        self.sums.copy_(self.factors)
        self.old = everywhere
        self.factors.copy_(blended)

    def store(self, factors: Tensor, step: int = 0) -> None:
        """Nothing: the factors are changed where they are."""

    def roll_back(self) -> None:
        """Undoes `blend`."""
        if self.old is not None:
            torch.where(self.old[self.owner], self.sums, self.factors, out=self.factors)


class DiagonalInverse(Inverse):
    """Inverses of damped diagonals, 1 / (d + damping), concatenated like the factors."""

    def __init__(self, store: DiagonalFactors) -> None:
        super().__init__(torch.zeros_like(store.factors), len(store))
        self._store = store
        self.residual.zero_()  # a diagonal is inverted exactly

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts the damped diagonals. The damping is zero only for a factor that is exactly 1 (a constant input)."""
        self.damping.copy_(damping)
        damped = factors + self.damping[self._store.owner]
        # A constant factor is zero until it has statistics; until then nothing is preconditioned with it.
        # The inverse of a subnormal number can overflow.
        self.values.copy_(torch.where(damped > 0, 1 / damped.clamp_min(torch.finfo(damped.dtype).tiny), 0.0))

    def left(self, side: SideGroup, x: Tensor) -> Tensor:
        """See `Inverse`."""
        return x * self._store.rows(self.values, side).unsqueeze(-1)

    def right(self, side: SideGroup, x: Tensor) -> Tensor:
        """See `Inverse`."""
        return x * self._store.rows(self.values, side).unsqueeze(-2)

    def kept(self, index: int) -> Tensor:
        """The part of a checkpoint for one inverse, (n,): a view."""
        return self._store.piece(self.values, index)

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` returned; the residual remains zero."""
        self.kept(index).copy_(values)
        self.damping[index] = damping


class DiagonalBasis(DiagonalInverse):
    """The eigenbasis of diagonal factors: the identity. Checkpoints keep the inverses nevertheless."""

    def left(self, side: SideGroup, x: Tensor, back: bool = False) -> Tensor:
        """See `EigenStack`."""
        return x

    def right(self, side: SideGroup, x: Tensor, back: bool = False) -> Tensor:
        """See `EigenStack`."""
        return x

    def spectrum(self, side: SideGroup) -> Tensor:
        """Eigenvalues of a group's factors, (tiles, n): the diagonals as they are now."""
        return self._store.rows(self._store.factors, side)
