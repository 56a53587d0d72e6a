"""Factors of which only the diagonal is kept: embeddings, norms, sides too wide for a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class DiagonalStore:
    """All diagonal factors of one type and place, end to end in one vector, so that one operation serves them all.

    Attributes:
        sizes: of the factors.
        factors: bias-corrected moving averages of the diagonals.
        sums: what passes added since the last step.
        values: inverses of the damped diagonals, 1 / (d + damping).
        damping: the damping (factors,) that values were made with.
        owner: for every place the number of its factor.
    """

    def __init__(self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        self.sizes = list(sizes)
        total = sum(sizes)
        self.factors = torch.zeros(total, dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.factors)
        self.values = torch.zeros_like(self.factors)
        self.damping = torch.zeros(len(sizes), dtype=dtype, device=device)
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

    @property
    def residual(self) -> Tensor:
        """Certificates (factors,): a diagonal is inverted exactly."""
        return torch.zeros_like(self.damping)

    def kept(self, index: int) -> Tensor:
        """What a checkpoint keeps of one inverse, (n,): a view."""
        return self.piece(self.values, index)

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` gave."""
        self.kept(index).copy_(values)
        self.damping[index] = damping

    def traces(self, vector: Tensor) -> Tensor:
        """Sum over each factor, (factors,)."""
        return vector.new_zeros(len(self)).index_add_(0, self.owner, vector)

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor) -> None:
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

    def refresh(self, damping: Tensor) -> None:
        """Inverts the damped diagonals; a damping of zero stands for a factor that is 1 and needs none."""
        self.damping.copy_(damping)
        damped = self.factors + self.damping[self.owner]
        # Such a factor is zero as long as there are no statistics, and nothing is solved then.
        # The inverse of a number below the normal ones may be beyond the largest.
        self.values.copy_(torch.where(damped > 0, 1 / damped.clamp_min(torch.finfo(damped.dtype).tiny), 0.0))
