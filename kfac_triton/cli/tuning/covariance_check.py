"""Factor statistics of made-up layers, linear and convolutional, with their error against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...curvature.factor_stack import padded
from ...kernels import ops
from ...kernels.covariance.window import flatten
from .checks import EMA_DECAY, Problem, worst


class RowSource(NamedTuple):
    """Where rows of X come from: a matrix, or images and a window; and whether a column of ones follows."""

    source: Tensor
    window: ops.Window = ops.ROWS
    ones: bool = False

    @property
    def columns(self) -> int:
        """Side of the factor."""
        return self.source.shape[1] * math.prod(self.window.kernel) + self.ones

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return len(self.source) * math.prod(self.window.positions(self.source.shape[2:]))

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """All rows in this type, with their ones."""
        rows = self.source.to(dtype)
        if rows.dim() == 4:
            kernel, stride, padding, dilation = self.window
            rows = F.unfold(rows, kernel, dilation, padding, stride).movedim(1, 2).flatten(0, 1)
        return F.pad(rows, (0, 1), value=1.0) if self.ones else rows


class Covariance(Problem):
    """A <- beta A + alpha X^T X; error: largest Frobenius norm of a layer's difference over that of its alpha X^T X.

    Two factors of a product may be cut to TF32 each, or a product of 16-bit rows be rounded to 16 bits: 2^-9 either way, and
    twice that is allowed. Whole numbers weighted with powers of two allow no error at all.
    """

    operation = "covariance_ema"

    def __init__(self, name: str, rows: Sequence[RowSource], whole: bool = False) -> None:
        """The layers; whole: their numbers are small integers."""
        self.rows = rows
        self.allowed = 0.0 if whole else 2.0**-8
        device = rows[0].source.device
        weights = [0.25 if whole else (1 - EMA_DECAY) / max(1, layer.row_count) for layer in rows]
        self.alpha = torch.tensor(weights, device=device)
        self.beta = torch.full_like(self.alpha, 0.5 if whole else EMA_DECAY)
        roots = (torch.randn(layer.columns, 4, dtype=torch.float64, device=device) for layer in rows)
        # In float64, where the order of the sums leaves no trace in the float32.
        self.starts = [(root @ root.T).float() for root in (map(torch.round, roots) if whole else roots)]
        storage = [start.new_zeros(2 * [padded(len(start))]) for start in self.starts]
        self.factors = [stored[: len(start), : len(start)] for stored, start in zip(storage, self.starts, strict=True)]
        sources, windows, ones = zip(*rows, strict=True)
        before = (storage, list(sources), self.alpha, self.beta, list(ones))
        super().__init__(name, [(*before, windows, None)], list(zip(self.factors, self.starts, strict=True)))
        self.operands = [(*before, flatten(windows), None)]

    @functools.cached_property
    def exact(self) -> list[tuple[Tensor, float]]:
        """The new factors in float64, and the norms of what was added."""
        results = []
        weights = zip(self.alpha.tolist(), self.beta.tolist(), strict=True)
        for layer, start, (alpha, beta) in zip(self.rows, self.starts, weights, strict=True):
            rows = layer.matrix(torch.float64)
            added = alpha * (rows.T @ rows)
            results.append((added.add(start, alpha=beta), float(torch.linalg.vector_norm(added))))
        return results

    def error(self) -> float:
        """Infinite if a factor is not symmetric to the last bit."""
        is_symmetric = all(torch.equal(factor, factor.T) for factor in self.factors)
        return self.error_of(self.factors) if is_symmetric else math.inf

    def error_of(self, factors: Iterable[Tensor]) -> float:
        """The error of somebody else's factors."""
        pairs = zip(factors, self.exact, strict=True)
        return worst(float(torch.linalg.vector_norm(factor - exact)) / (norm or 1.0) for factor, (exact, norm) in pairs)
