"""V = F^-1 W for the gradients of a tile group: by the inverses of the damped factors, or in their eigenbasis."""

from __future__ import annotations

import torch
from torch import Tensor

from ..capture.ekfac_moments import MomentTile
from ..kernels import ops, precision
from .diagonal import DiagonalBasis
from .eigenbasis import EigenStack
from .groups import TileGroup
from .inverse import Inverse, InverseStack

Basis = EigenStack | DiagonalBasis


def _finish(gradient: Tensor, result: Tensor, update: Tensor, product: Tensor | None) -> None:
    update.copy_(result)
    if product is not None:
        product.copy_(torch.linalg.vecdot(update.flatten(1), gradient.flatten(1)))


class InverseSolve:
    """V = G^-1 W A^-1 with inverses of split-damped factors (Martens and Grosse 2015, sections 4.2 and 6.3)."""

    def __init__(self, group: TileGroup, left: Inverse, right: Inverse, backend: str) -> None:
        self._group, self._left, self._right, self._backend = group, left, right, backend
        self._is_dense = isinstance(left, InverseStack) and isinstance(right, InverseStack)
        # Refreshes and checkpoints write inverses where they are, so that views of neighbours need not be made again.
        sides = (group.g, left), (group.a, right)
        self._views = [side.select(inverse.values) for side, inverse in sides if self._is_dense and side.run is not None]

    def __call__(self, gradient: Tensor, update: Tensor, product: Tensor | None) -> None:
        """See `preconditioning.Solve`."""
        left, right, a, g = self._left, self._right, self._group.a, self._group.g
        if self._is_dense:  # one launch for both sides
            values = self._views if len(self._views) == 2 else [g.select(left.values), a.select(right.values)]
            is_root = left.kind == "root"
            ops.precondition(gradient, values[0], values[1], update, product, factored=is_root, backend=self._backend)
        else:
            with precision.library_for_gradients(gradient.device, self._backend):
                result = right.right(a, left.left(g, gradient))
            _finish(gradient, result, update, product)


class EigenSolve:
    """V = Q_G [(Q_G^T W Q_A) / (S + damping)] Q_A^T: exact Tikhonov damping of the Kronecker product, S = d_G d_A^T."""

    def __init__(self, group: TileGroup, left: Basis, right: Basis) -> None:
        self.group, self._left, self._right = group, left, right
        self.damping = 0.0

    def kronecker(self) -> Tensor:
        """d_G d_A^T, (B, m, n)."""
        return self._left.spectrum(self.group.g).unsqueeze(-1) * self._right.spectrum(self.group.a).unsqueeze(-2)

    def spectrum(self) -> Tensor:
        """S, (B, m, n)."""
        return self.kronecker()

    def __call__(self, gradient: Tensor, update: Tensor, product: Tensor | None) -> None:
        """See `preconditioning.Solve`."""
        a, g, left, right = self.group.a, self.group.g, self._left, self._right
        inner = right.right(a, left.left(g, gradient)) / (self.spectrum() + self.damping)
        _finish(gradient, right.right(a, left.left(g, inner, back=True), back=True), update, product)


class EkfacSolve(EigenSolve):
    """`EigenSolve` with EKFAC's corrected eigenvalues as S (George et al. 2018, equation 9).

    Attributes:
        values: (B, m, n), second moments of the gradient in the eigenbasis.
        sums: sums over the backward passes since the last step.
    """

    def __init__(self, group: TileGroup, left: EigenStack, right: EigenStack) -> None:
        super().__init__(group, left, right)
        self._g_vectors, self._a_vectors = left.vectors, right.vectors
        self.values = torch.zeros_like(self.kronecker())
        self.sums = torch.zeros_like(self.values)

    def spectrum(self) -> Tensor:
        """S, (B, m, n)."""
        return self.values

    def moment_tiles(self) -> list[MomentTile]:
        """The eigenvectors and the sum of each tile, for backward passes to add to."""
        group = self.group
        places = zip(group.tiles, group.a.places, group.g.places, self.sums, strict=True)
        return [MomentTile(number, self._a_vectors[a], self._g_vectors[g], total) for number, a, g, total in places]

    def basis(self) -> tuple[Tensor, Tensor]:
        """Copies of the eigenvectors of G and of A."""
        return self.group.g.select(self._g_vectors).clone(), self.group.a.select(self._a_vectors).clone()

    def rotate(self, left: Tensor, right: Tensor) -> None:
        """Transforms the moments from the old basis, with eigenvectors (B, m, m) and (B, n, n), to the present one.

        With R = Q_new^T Q_old, moments that are uncorrelated in the old basis become (R_G^2) S (R_A^2)^T in the new one.
        """
        left_turn = (self.group.g.select(self._g_vectors).mT @ left).square()
        right_turn = (self.group.a.select(self._a_vectors).mT @ right).square()
        self.values.copy_(left_turn @ self.values @ right_turn.mT)
