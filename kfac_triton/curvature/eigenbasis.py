"""Certified eigenbases of the factors of one stack: first by `eigh`, then updated by orthogonal iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from .groups import SideGroup
from .inverse import ACCEPT, Inverse

# Largest certificate of an updated basis; beyond it eigh is used again. Below `ACCEPT`, as an accepted basis is the next start.
_WARM_TOLERANCE = 0.1
_ITERATIONS = 2


def off_diagonal(rotated: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(eigenvalues (B, n), certificate (B,)) of M = Q^T A Q if its off-diagonal part is ignored.

    The certificate is ||D^-1/2 (M - diag d) D^-1/2||_F with d = max(diag M, 0) and D = d + damping. If Q is orthogonal and in
    exact arithmetic, it bounds the energy-norm error of Q D^-1 Q^T as an inverse of A + damping I. An estimate of the rounding
    errors is added: those of the diagonal of M, of Q, and of storing d and Q in the dtype of damping.
    """
    n, kept = rotated.shape[-1], torch.finfo(damping.dtype)
    values = rotated.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    scale = (values + damping[:, None]).rsqrt()
    rest = (rotated - torch.diag_embed(values)) * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    noise = torch.finfo(rotated.dtype).eps / 2 * values.amax(-1, keepdim=True) + n * kept.tiny * kept.eps
    rounding = torch.linalg.vector_norm(noise * scale.square(), dim=-1) + n * kept.eps
    return values, (torch.linalg.matrix_norm(rest) + rounding).nan_to_num(nan=torch.inf)


class Rotation(Inverse):
    """What rotates into the eigenbases of a stack of factors, and back.

    Attributes:
        vectors: eigenvectors as columns, (B, n, n).
    """

    vectors: Tensor

    def left(self, side: SideGroup, x: Tensor, back: bool = False) -> Tensor:
        """Q^T x, into the eigenbasis, or Q x, back from it."""
        vectors = side.select(self.vectors)
        return vectors @ x if back else vectors.mT @ x

    def right(self, side: SideGroup, x: Tensor, back: bool = False) -> Tensor:
        """Likewise x Q, into the eigenbasis, or x Q^T, back from it."""
        vectors = side.select(self.vectors)
        return x @ vectors.mT if back else x @ vectors


class EigenStack(Rotation):
    """Eigenvectors and eigenvalues of a stack of factors, refreshed in place.

    Args:
        factors: the stack (B, n, n), padded with zeros; only its shape, dtype and device are used.
        sizes: sizes of the factors without padding.

    Attributes:
        vectors: eigenvectors as columns, (B, n, n), those of the padding last. Zero where there is no certificate.
        values: the same tensor, under its name in `Inverse`.
        eigenvalues: (B, n), not negative. Where the damping had to be raised, they contain the difference.
        residual: certificates (B,), see `off_diagonal`.
        damping: the damping (B,) that the certificates hold for.
    """

    kind = "basis"

    def __init__(self, factors: Tensor, sizes: list[int]) -> None:
        super().__init__(torch.zeros_like(factors), len(factors))
        self.vectors = self.values
        self.eigenvalues = torch.zeros_like(factors[..., 0])
        self._sizes = sizes

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Computes the eigenbases of factors (B, n, n); where eigh fails, the last one remains."""
        damping = damping.to(factors)
        remaining = torch.arange(len(factors), device=factors.device)
        if not self.is_cold:
            vectors = self.vectors
            # Without the shift, rounding errors would rotate eigenvectors with tiny eigenvalues at random. With it they stay.
            # That is accurate enough, as eigenvectors do not matter below the damping.
            shift = damping[:, None, None]
            for _ in range(_ITERATIONS):
                vectors = torch.linalg.qr(factors @ vectors + shift * vectors)[0]
            values, residual = off_diagonal(vectors.mT @ factors @ vectors, damping)
            good = residual <= _WARM_TOLERANCE
            self._store(remaining[good], vectors[good], values[good], residual[good], damping[good])
            remaining = remaining[~good]
            self.fallbacks[remaining] += 1
        for index in remaining.tolist():
            self._decompose(index, factors[index], damping)
        self.is_cold = False

    def spectrum(self, side: SideGroup) -> Tensor:
        """Eigenvalues of the factors of a tile group, (tiles, n)."""
        return side.select(self.eigenvalues)

    def kept(self, index: int) -> Tensor:
        """The part of a checkpoint for one factor, (n + 1, n): its eigenvectors, and its eigenvalues as the last row."""
        return torch.cat([self.vectors[index], self.eigenvalues[index : index + 1]])

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` returned, with its certificate."""
        super().restore(index, values[:-1], residual, damping)
        self.eigenvalues[index] = values[-1].to(self.eigenvalues)

    def _decompose(self, index: int, factor: Tensor, damping: Tensor) -> None:
        """Computes the basis of one factor by eigh, in its own precision or in float64, and stores it if it is certified.

        In float64 the damping is multiplied by ten until it is, and the difference is added to the eigenvalues.
        """
        size, wanted = self._sizes[index], damping[index : index + 1]
        tiny = torch.finfo(factor.dtype).tiny
        # The padding gets an eigenvalue below all others, so that eigh does not mix it with the null space of the factor.
        shifted = factor.clone()
        shifted.diagonal()[size:] -= factor.diagonal().abs().max().clamp_min(tiny)
        place = torch.tensor([index], device=factor.device)
        for dtype in dict.fromkeys((factor.dtype, torch.float64)):
            try:
                _, vectors = torch.linalg.eigh(shifted.to(dtype))
            except torch.linalg.LinAlgError:
                continue
            vectors = vectors.to(factor.dtype).roll(size, 1)  # eigh returns the eigenvectors of the padding first
            columns = vectors.to(dtype)
            rotated = (columns.mT @ factor.to(dtype) @ columns)[None]
            damping, tries = wanted, 0
            while not self._store_certified(place, vectors, rotated, damping, damping - wanted):
                damping, tries = (10 * damping).clamp_min(tiny), tries + 1
                if dtype != torch.float64 or not bool(torch.isfinite(rotated).all() & torch.isfinite(damping)):
                    break
            else:
                self.raised[place] += tries
                return

    def _store_certified(self, place: Tensor, vectors: Tensor, rotated: Tensor, damping: Tensor, shift: Tensor) -> bool:
        """Stores the basis of one factor, if it is certified for this damping and its eigenvalues do not overflow."""
        values, residual = off_diagonal(rotated, damping)
        if not bool((residual <= ACCEPT) & torch.isfinite((values + damping).to(self.eigenvalues)).all()):
            return False
        self._store(place, vectors[None], (values + shift).to(self.eigenvalues), residual.to(self.residual), damping)
        return True

    def _store(self, places: Tensor, vectors: Tensor, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        self.vectors[places], self.eigenvalues[places] = vectors, values
        self.residual[places], self.damping[places] = residual, damping
