"""Eigenbases of the factors of one stack: started by `eigh`, carried on by orthogonal iteration, certified."""

from __future__ import annotations

import torch
from torch import Tensor

from .inverse import ACCEPT

# What a warm basis may be off before eigh is asked again: well below what K-FAC can stand, for it is used until the next one.
_WARM_TOLERANCE = 0.1
_ITERATIONS = 2


def off_diagonal(rotated: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (B, n), certificate (B,)) of M = Q^T A Q, when its off-diagonal part is ignored.

    The certificate is ||D^-1/2 (M - diag M) D^-1/2||_F with D = diag M + damping: a bound on the energy-norm error of
    Q D^-1 Q^T as an inverse of A + damping I, to first order.
    """
    values = rotated.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    scale = (values + damping[:, None]).rsqrt()
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    error = torch.linalg.matrix_norm(rest * scale.unsqueeze(-1) * scale.unsqueeze(-2))
    return values, error.nan_to_num(nan=torch.inf)


class EigenStack:
    """Eigenvectors and eigenvalues of a stack of factors, refreshed in place.

    Args:
        factors: the stack (B, n, n), padded with zeros.
        sizes: the factors' sizes without the pad.

    Attributes:
        vectors: (B, n, n), columns; the pad has vectors of its own. Zero where there is no certificate.
        spectrum: (B, n), at least zero.
        residual: certificate (B,), see `off_diagonal`.
        damping: the damping (B,) that the certificate was made for.
        fallbacks: how often a warm basis was refused, (B,).
        raised: zero; for the sake of the diagnostics.
    """

    def __init__(self, factors: Tensor, sizes: list[int]) -> None:
        batch, n, _ = factors.shape
        self.vectors = torch.zeros_like(factors)
        self.spectrum = factors.new_zeros(batch, n)
        self.residual = factors.new_full((batch,), torch.inf)
        self.damping = factors.new_zeros(batch)
        self.fallbacks = torch.zeros(batch, dtype=torch.long, device=factors.device)
        self.raised = torch.zeros_like(self.fallbacks)
        places = torch.arange(n, device=factors.device)
        self._pad = places >= torch.tensor(sizes, device=factors.device)[:, None]
        self._is_cold = True

    @property
    def values(self) -> Tensor:
        """What is stored of the inverse."""
        return self.vectors

    def restart(self) -> None:
        """Makes the next refresh start from nothing: the factors were written from outside."""
        self._is_cold = True

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Eigenbases of factors (B, n, n); a factor that eigh cannot do keeps its last one."""
        damping = damping.to(factors)
        remaining = torch.arange(len(factors), device=factors.device)
        if not self._is_cold:
            vectors = self.vectors
            # Below the damping eigenvectors do not matter, and columns of A Q that are mere rounding would be turned at random.
            shift = damping[:, None, None]
            for _ in range(_ITERATIONS):
                vectors = torch.linalg.qr(factors @ vectors + shift * vectors)[0]
            values, residual = off_diagonal(vectors.mT @ factors @ vectors, damping)
            good = residual <= _WARM_TOLERANCE
            self._store(remaining[good], vectors[good], values[good], residual[good], damping)
            remaining = remaining[~good]
            self.fallbacks[remaining] += 1
        for index in remaining.tolist():
            self._decompose(index, factors[index], damping)
        self._is_cold = False

    def _decompose(self, index: int, factor: Tensor, damping: Tensor) -> None:
        # The pad gets an eigenvalue below all others, so that its vectors are not mixed with the factor's null space.
        scale = factor.diagonal().abs().max().clamp_min(torch.finfo(factor.dtype).tiny)
        shifted = factor - torch.diag_embed(self._pad[index] * scale)
        for dtype in (factor.dtype, torch.float64):
            try:
                _, vectors = torch.linalg.eigh(shifted.to(dtype))
            except torch.linalg.LinAlgError:
                continue
            vectors = self._pad_last(vectors.to(factor.dtype), index)
            values, residual = off_diagonal((vectors.mT @ factor @ vectors)[None], damping[index : index + 1])
            if bool(residual[0] <= ACCEPT) or dtype == torch.float64:
                place = torch.tensor([index], device=factor.device)
                if bool(torch.isfinite(values).all() and torch.isfinite(residual).all()):
                    self._store(place, vectors[None], values, residual, damping)
                return

    def _pad_last(self, vectors: Tensor, index: int) -> Tensor:
        """Moves the pad's vectors, which eigh puts first, to the end, where the pad is."""
        pad = int(self._pad[index].sum())
        return torch.cat([vectors[:, pad:], vectors[:, :pad]], 1)

    def _store(self, places: Tensor, vectors: Tensor, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        self.vectors[places] = vectors
        self.spectrum[places] = values
        self.residual[places] = residual
        self.damping[places] = damping[places]
