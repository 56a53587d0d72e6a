"""Factors of which only the diagonal is kept: embeddings, norms, sides too wide for a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .kernels.covariance.reference import WINDOW, patch_matrix


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


def squared_rows(source: Tensor, geometry: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    """Diagonal of X^T X, without the ones, from rows as `kernels.ops.covariance_ema` takes them, or from indices.

    Args:
        source: X (rows, n); the input (N, C, *spatial) of a convolution; indices (rows,), which stand for one-hot rows; or
            indices (rows, m), each of whose rows stands for the mean of m one-hot rows.
        geometry: the window of a convolution.
        size: n.
        dtype: of the sum.
    """
    if source.dim() == 2 and not source.is_floating_point():
        return _squared_means(source, size, dtype)
    if source.dim() == 1:
        return torch.zeros(size, dtype=dtype, device=source.device).index_add_(
            0, source, torch.ones(1, dtype=dtype, device=source.device).expand(len(source))
        )
    squares = source.to(dtype).square()
    if source.dim() == 2:
        return squares.sum(0)
    assert len(geometry) == WINDOW
    kernel = geometry[3 - (source.dim() - 2) : 3]
    if math.prod(kernel) == 1:
        return squares.flatten(2).sum((0, 2))
    return patch_matrix(squares, geometry).sum(1)


def _squared_means(indices: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """With c the number of times that v is in a row, sum over rows of (c / m)^2: each of the c adds c / m^2. No row is made."""
    ordered = indices.sort(1).values.contiguous()
    counts = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    shares = counts.to(dtype) / indices.shape[1] ** 2
    return torch.zeros(size, dtype=dtype, device=indices.device).index_add_(0, ordered.flatten(), shares.flatten())
