"""Dense factors of one padded size: a stack (B, n, n), and a stack of the sums of the current step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..kernels import ops
from .rounding import stochastically_rounded

ALIGNMENT = 16  # sides are padded to a multiple: with an odd bias column, loads are unaligned and tensor cores unusable


def padded(size: int) -> int:
    """The padded side of a factor of this size."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def newest_weight(updates: Tensor, ema_decay: float) -> Tensor:
    """Weight r of the t-th update in a moving average, given t.

    The average with bias correction (Kingma and Ba 2015, section 3) is average <- (1 - r) average + r new with
    r = (1 - decay) / (1 - decay^t). It equals the average that starts at zero, divided by the sum of its weights. Only the
    corrected average is stored.
    """
    return (1 - ema_decay) / (1 - ema_decay ** updates.double().clamp_min(1))


class FactorStack:
    """Factors of one padded size, and the sums of the current step.

    The padding is zero: after damping, its eigenvalues equal the damping, which does not increase the condition number. Once
    the sums have been added to the factors, their buffer holds the old factors until the step ends.

    Args:
        sizes: size of each factor; padded, they are the same.
        dtype: of sums and inverses.
        device: of all tensors.
        is_compact: whether factors are kept in 16 bits between steps.

    Attributes:
        nbytes: bytes of the factors.
        diagonal_sizes: sizes of the factors that are stored as diagonals: none.
    """

    diagonal_sizes: tuple[int, ...] = ()

    def __init__(self, sizes: list[int], dtype: torch.dtype, device: torch.device, is_compact: bool = False) -> None:
        self.sizes = sizes
        side = padded(sizes[0])
        self.sums = torch.zeros(len(sizes), side, side, dtype=dtype, device=device)
        self._stored = torch.zeros_like(self.sums, dtype=torch.bfloat16 if is_compact else dtype)
        self.nbytes = self._stored.nbytes
        self._is_compact = is_compact
        self.old: Tensor | None = None  # flags (B,): those whose old values are in `sums`

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def factors(self) -> Tensor:
        """The stack itself, or a copy in full precision if it is kept in 16 bits; `store` writes changes of a copy back."""
        return self._stored.to(self.sums.dtype)

    def view(self, index: int) -> Tensor:
        """One factor without padding, (n, n): a view, or a copy if it is kept in 16 bits."""
        size = self.sizes[index]
        return self.factors[index, :size, :size]

    def write(self, index: int, value: Tensor) -> None:
        """Overwrites one factor."""
        size, factors = self.sizes[index], self.factors
        factors[index, :size, :size] = value.to(factors).view(size, size)
        self.store(factors)

    def piece(self, stack: Tensor, index: int) -> Tensor:
        """The matrix of one factor in a stack, with its padding: a view."""
        return stack[index]

    def traces(self, stack: Tensor) -> Tensor:
        """Trace of every matrix of a stack, (B,)."""
        return stack.diagonal(dim1=-2, dim2=-1).sum(-1)

    def store(self, factors: Tensor, step: int = 0) -> None:
        """Writes a changed copy of `factors` back. Stochastic rounding to 16 bits is seeded by the step."""
        if self._is_compact:
            self._stored.copy_(stochastically_rounded(factors, step))

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, step: int, backend: str) -> None:
        """`blend_stores` of this store alone, whose factors all have sums."""
        blend_stores([self], keep, gain, accept, torch.ones_like(accept), step, backend)

    def roll_back(self) -> None:
        """Restores the old factors."""
        factors = self.factors
        if self.old is not None:
            torch.where(self.old[:, None, None], self.sums, factors, out=factors)
        self.store(factors)  # rounding does not change them: they were stored in 16 bits before


class Store(Protocol):
    """What factors are kept in: a `FactorStack`, or `DiagonalFactors`."""

    sums: Tensor
    old: Tensor | None
    diagonal_sizes: tuple[int, ...]

    @property
    def factors(self) -> Tensor:
        """All factors."""

    def __len__(self) -> int:
        """Number of factors."""

    def store(self, factors: Tensor, step: int = 0) -> None:
        """See `FactorStack`."""


def blend_stores(
    stores: Sequence[Store], keep: Tensor, gain: Tensor, accept: Tensor, summed: Tensor, step: int, backend: str
) -> None:
    """Sets accepted factors of several stores to keep * factor + gain * sum, in one launch.

    Their old values are left in the buffers of the sums, for `roll_back`. A factor without a sum is only copied there.

    Args:
        stores: of one type and on one device.
        keep: over the factors of all stores, as the other vectors.
        gain: likewise.
        accept: flags of the factors that are to change, now or later in the step.
        summed: flags of the factors whose sums hold statistics.
        step: seeds stochastic rounding.
        backend: of the kernels.
    """
    changed = [store.factors for store in stores]
    diagonal_sizes = [size for store in stores for size in store.diagonal_sizes]
    # The launch that overwrites a sum sets its flag: whenever an exception comes, the flags say what the sums hold.
    old = torch.zeros_like(accept)
    for store, flags in zip(stores, old.split([len(store) for store in stores]), strict=True):
        store.old = flags
    ops.blend(changed, [store.sums for store in stores], keep, gain, accept, summed, old, diagonal_sizes, backend=backend)
    for store, factor in zip(stores, changed, strict=True):
        store.store(factor, step)
