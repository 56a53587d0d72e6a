"""V = F^-1 W for a stack of tiles: by the inverses of two damped factors, or in their eigenbasis."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.device_tables import device_table
from .diagonal import DiagonalStore
from .eigenbasis import EigenStack
from .factor_bank import SideGroup, TileGroup
from .inverse import InverseStack


def _select(stack: Tensor, side: SideGroup) -> Tensor:
    """A group's part of a stack: a view where its factors are contiguous."""
    if side.run is not None:
        return stack[side.run]
    return stack[device_table(tuple((place,) for place in side.places), stack.device).flatten()]


def _vectors(store: DiagonalStore, side: SideGroup, name: str) -> Tensor:
    """A group's diagonals of one size as rows, (B, n)."""
    return torch.stack([store.piece(getattr(store, name), place) for place in side.places])


class InverseSolve:
    """V = G^-1 W A^-1 with inverses of split-damped factors (Martens and Grosse 2015, sections 4.2 and 6.3)."""

    def __init__(
        self, group: TileGroup, left: InverseStack | DiagonalStore, right: InverseStack | DiagonalStore, backend: str
    ) -> None:
        self._group, self._left, self._right = group, left, right
        self._backend = backend

    def __call__(self, gradient: Tensor, update: Tensor, product: Tensor) -> None:
        """See `gradients.Solve`."""
        left, right, group = self._left, self._right, self._group
        if isinstance(left, InverseStack) and isinstance(right, InverseStack):
            left_values, right_values = _select(left.values, group.g), _select(right.values, group.a)
            ops.precondition(
                gradient, left_values, right_values, update, product, factored=left.factored, backend=self._backend
            )
            return
        inner = gradient
        if isinstance(left, InverseStack):
            values = _select(left.values, group.g)
            inner = values.mT @ (values @ inner) if left.factored else values @ inner
        else:
            inner = inner * _vectors(left, group.g, "values").unsqueeze(-1)
        if isinstance(right, InverseStack):
            values = _select(right.values, group.a)
            inner = (inner @ values.mT) @ values if right.factored else inner @ values
        else:
            inner = inner * _vectors(right, group.a, "values").unsqueeze(-2)
        update.copy_(inner)
        product.copy_(torch.linalg.vecdot(update.flatten(1), gradient.flatten(1)))


@dataclass
class Spectrum:
    """EKFAC's corrected eigenvalues of one group of tiles.

    Attributes:
        values: (B, m, n), second moments of the gradient in the eigenbasis.
        sums: what passes added since the last step.
    """

    values: Tensor
    sums: Tensor


class EigenSolve:
    """V = Q_G [(Q_G^T W Q_A) / (S + damping)] Q_A^T: exact Tikhonov damping of the Kronecker product.

    S = d_G d_A^T for K-FAC, or EKFAC's second moments (George et al. 2018, equation 9).
    """

    def __init__(
        self,
        group: TileGroup,
        left: EigenStack | DiagonalStore,
        right: EigenStack | DiagonalStore,
        spectrum: Spectrum | None,
    ) -> None:
        self._group, self._left, self._right = group, left, right
        self.spectrum = spectrum
        self.damping = 0.0

    def kronecker(self) -> Tensor:
        """d_G d_A^T, (B, m, n)."""
        left, right = (
            _select(side.spectrum, places) if isinstance(side, EigenStack) else _vectors(side, places, "factors")
            for side, places in ((self._left, self._group.g), (self._right, self._group.a))
        )
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    def __call__(self, gradient: Tensor, update: Tensor, product: Tensor) -> None:
        """See `gradients.Solve`."""
        values = self.kronecker() if self.spectrum is None else self.spectrum.values
        left = _select(self._left.vectors, self._group.g) if isinstance(self._left, EigenStack) else None
        right = _select(self._right.vectors, self._group.a) if isinstance(self._right, EigenStack) else None
        inner = gradient if left is None else left.mT @ gradient
        inner = inner if right is None else inner @ right
        inner = inner / (values + self.damping)
        inner = inner if left is None else left @ inner
        update.copy_(inner if right is None else inner @ right.mT)
        product.copy_(torch.linalg.vecdot(update.flatten(1), gradient.flatten(1)))

    def rotate(self, left: Tensor, right: Tensor) -> None:
        """Carries EKFAC's moments over to a new basis, given the eigenvectors (B, m, m) and (B, n, n) of the old one.

        With R = Q_new^T Q_old, moments that are uncorrelated in the old basis become (R_G^2) S (R_A^2)^T in the new one.
        """
        if self.spectrum is None:
            return
        assert isinstance(self._left, EigenStack)
        assert isinstance(self._right, EigenStack)
        left_turn = (_select(self._left.vectors, self._group.g).mT @ left).square()
        right_turn = (_select(self._right.vectors, self._group.a).mT @ right).square()
        self.spectrum.values.copy_(left_turn @ self.spectrum.values @ right_turn.mT)

    def basis(self) -> tuple[Tensor, Tensor]:
        """Copies of the eigenvectors of G and of A."""
        assert isinstance(self._left, EigenStack)
        assert isinstance(self._right, EigenStack)
        return tuple(  # type: ignore[return-value]
            _select(x.vectors, places).clone() for x, places in ((self._left, self._group.g), (self._right, self._group.a))
        )
