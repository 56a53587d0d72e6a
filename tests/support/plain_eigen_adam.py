"""Adam in the eigenbasis of given factors, a weight matrix at a time in double precision: an oracle for `KFACAdam`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class PlainEigenAdam:
    """The averages of one matrix W, and the bases in which they are taken.

    Attributes:
        betas, eps, nesterov, noise_damping: as `KFACAdam` takes them.
        decay: of the factors' averages.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    nesterov: bool = True
    noise_damping: float = 0.3
    decay: float = 0.95
    mean: Tensor | None = None  # in the coordinates of W, unlike the package's
    square: Tensor | None = None
    bases: list[Tensor] = field(default_factory=list)  # of G and of A
    rows: list[int] = field(default_factory=list)
    steps: int = 0

    def refresh(self, a: Tensor, g: Tensor, refresh: str) -> None:
        """Eigenvectors of A and G; a factor that is a vector is a diagonal, whose basis is the identity."""
        new = []
        for i, factor in enumerate((g, a)):
            if factor.dim() == 1:
                new.append(torch.eye(len(factor), dtype=torch.float64))
            elif not self.bases or refresh == "eigh":
                new.append(torch.linalg.eigh(factor.double())[1].flip(-1))
            else:
                shift = 1e-3 * factor.double().trace() / len(factor)
                new.append(torch.linalg.qr((factor.double() + shift * torch.eye(len(factor))) @ self.bases[i])[0])
        self.bases = new

    def uncertainty(self, size: int) -> float:
        """N / rows of a side of this size, where the averages stand for so many rows."""
        count = len(self.rows)
        weights = [(1 - self.decay) * self.decay ** (count - 1 - i) / (1 - self.decay**count) for i in range(count)]
        variance = sum(weight**2 / rows for weight, rows in zip(weights, self.rows, strict=True))
        return min(1.0, self.noise_damping * size * variance)

    def direction(self, gradient: Tensor, rows: int | None, dense: tuple[bool, bool] = (True, True)) -> Tensor:
        """U for a gradient whose factors have just been updated from so many rows, if at all; averages take the gradient."""
        gradient = gradient.double()
        (beta1, beta2), (left, right) = self.betas, self.bases
        if self.mean is None or self.square is None:
            self.mean, self.square = torch.zeros_like(gradient), torch.zeros_like(gradient)
        if rows is not None:
            self.rows.append(rows)
        self.steps += 1
        self.mean = beta1 * self.mean + (1 - beta1) * gradient
        rotated = left.T @ gradient @ right
        self.square = beta2 * self.square + (1 - beta2) * rotated**2
        ahead = self.mean / (1 - beta1**self.steps)
        if self.nesterov:
            ahead = beta1 * ahead + (1 - beta1) * gradient
        d = self.square / (1 - beta2**self.steps)
        m, n = d.shape
        damped = torch.empty_like(d)
        share = self.uncertainty(n) if dense[1] else 0.0
        for i in range(m):
            damped[i] = d[i] + share * d[i].mean()
        share = self.uncertainty(m) if dense[0] else 0.0
        for j in range(n):
            d[:, j] = damped[:, j] + share * damped[:, j].mean()
        return left @ ((left.T @ ahead @ right) / (d.sqrt() + self.eps)) @ right.T
