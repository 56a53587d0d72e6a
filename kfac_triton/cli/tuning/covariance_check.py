"""Factor statistics of made-up layers, linear and convolutional, with their error against float64."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...curvature.factor_stack import padded
from ...kernels import ops
from ...kernels.covariance.window import flatten
from .checks import EMA_DECAY, Problem, worst

_CHUNK = 1 << 26  # elements of a patch matrix at a time


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

    def pieces(self, dtype: torch.dtype) -> list[Tensor]:
        """The rows in this type, with their ones, a few images at a time."""
        sources = [self.source]
        if self.source.dim() == 4:
            per_image = self.columns * self.row_count // max(1, len(self.source))
            sources = list(self.source.split(max(1, _CHUNK // per_image)))
        pieces = []
        for source in sources:
            rows = source.to(dtype)
            if rows.dim() == 4:
                kernel, stride, padding, dilation = self.window
                rows = F.unfold(rows, kernel, dilation, padding, stride).movedim(1, 2).flatten(0, 1)
            pieces.append(F.pad(rows, (0, 1), value=1.0) if self.ones else rows)
        return pieces


class Covariance(Problem):
    """A <- beta A + alpha X^T X; error: largest Frobenius norm of a layer's difference over that of its alpha X^T X.

    Two factors of a product may be cut to TF32 each, or a product of 16-bit rows be rounded to 16 bits: 2^-9 either way, and
    twice that is allowed. Whole numbers weighted with powers of two allow no error at all.
    """

    operation = "covariance_ema"

    def __init__(self, name: str, rows: Sequence[RowSource], whole: bool = False) -> None:
        """The layers; whole: their numbers are small integers."""
        super().__init__(name, rows[0].source.device)
        self.rows = list(rows)
        self.whole = whole
        self.allowed = 0.0 if whole else 2.0**-8
        self.sides = [layer.columns for layer in rows]
        weights = [0.25 if whole else (1 - EMA_DECAY) / max(1, layer.row_count) for layer in rows]
        self.alpha = torch.tensor(weights, device=self.device)
        self.beta = torch.full_like(self.alpha, 0.5 if whole else EMA_DECAY)
        self.starts = [self._start(layer) for layer in rows]
        self.storage = [torch.zeros(padded(side), padded(side), device=self.device) for side in self.sides]
        self.prepare()

    def _start(self, layer: RowSource) -> Tensor:
        root = torch.randn(layer.columns, 4, dtype=torch.float64, device=self.device)
        root = root.round() if self.whole else root
        return (root @ root.T).float()  # in float64, where the order of the sums leaves no trace in the float32

    @property
    def factors(self) -> list[Tensor]:
        """The factors without their pad."""
        return [stored[:side, :side] for stored, side in zip(self.storage, self.sides, strict=True)]

    def calls(self) -> list[tuple[Any, ...]]:
        """One call for all layers."""
        ones, sources, windows = ([getattr(layer, name) for layer in self.rows] for name in ("ones", "source", "window"))
        return [(self.storage, sources, self.alpha, self.beta, ones, windows, None)]

    def operands(self) -> list[tuple[Any, ...]]:
        """The windows as integers."""
        return [(*before, flatten(windows), accept) for *before, windows, accept in self.calls()]

    def prepare(self) -> None:
        """Factors of the step before."""
        for factor, start in zip(self.factors, self.starts, strict=True):
            factor.copy_(start)

    @functools.cached_property
    def exact(self) -> list[tuple[Tensor, float]]:
        """The new factors in float64, and the norms of what was added."""
        results = []
        weights = zip(self.alpha.tolist(), self.beta.tolist(), strict=True)
        for layer, start, (alpha, beta) in zip(self.rows, self.starts, weights, strict=True):
            added = torch.zeros_like(start, dtype=torch.float64)
            for piece in layer.pieces(torch.float64):
                added.addmm_(piece.T, piece, alpha=alpha)
            results.append((added.add(start, alpha=beta), float(torch.linalg.vector_norm(added))))
        return results

    def error(self) -> float:
        """Infinite if a factor is not symmetric to the last bit."""
        if not all(torch.equal(factor, factor.T) for factor in self.factors):
            return math.inf
        return self.error_of(self.factors)

    def error_of(self, factors: Iterable[Tensor]) -> float:
        """The error of somebody else's factors."""
        pairs = zip(factors, self.exact, strict=True)
        return worst(float(torch.linalg.vector_norm(factor - exact)) / (norm or 1.0) for factor, (exact, norm) in pairs)
