"""Dense factors of one padded size: a (B, n, n) stack, and as many sums of the current step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import ops
from .rounding import Rounding

ALIGNMENT = 16  # sides are padded to a multiple: an odd bias column would cost aligned loads and tensor cores


def padded(size: int) -> int:
    """The side that a factor of this size is stored with."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def newest_weight(updates: Tensor, ema_decay: float) -> Tensor:
    """Weight r of the t-th update in a moving average, given t.

    The average with bias correction (Kingma and Ba 2015, section 3) is average <- (1 - r) average + r new with
    r = (1 - decay) / (1 - decay^t): the average that starts at zero, divided by the sum of its weights. What is kept is
    always the corrected one.
    """
    return (1 - ema_decay) / (1 - ema_decay ** updates.double().clamp_min(1))


class FactorStack:
    """Factors of one padded size, and as many sums of the current step.

    The pad is zero, so that damping alone fills it and no spectrum is widened. Once the sums are in the factors, their buffer
    keeps the old factors until the step is over.

    Args:
        sizes: of the factors.
        side: padded.
        dtype: that sums and inverses have.
        device: where they are.
        is_compact: whether factors are kept in 16 bits between steps.
    """

    def __init__(self, sizes: list[int], side: int, dtype: torch.dtype, device: torch.device, is_compact: bool = False) -> None:
        self.sizes = sizes
        self.sums = torch.zeros(len(sizes), side, side, dtype=dtype, device=device)
        self._stored = torch.zeros_like(self.sums, dtype=torch.bfloat16 if is_compact else dtype)
        self._rounding = Rounding(device) if is_compact else None
        self.old: Tensor | None = None  # flags (B,): of which factors sums holds the old ones
        self._before: Tensor | None = None  # the old factors, while they are on their way there

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def factors(self) -> Tensor:
        """The stack itself; of one kept in 16 bits a copy in full precision, to be given to `store`."""
        return self._stored if self._rounding is None else self._stored.to(self.sums.dtype)

    @property
    def nbytes(self) -> int:
        """Memory of the factors."""
        return self._stored.nbytes

    def side(self, index: int) -> int:
        """The side that a gradient has for this factor, with the pad."""
        return self.sums.shape[-1]

    def view(self, index: int) -> Tensor:
        """One factor without its pad, (n, n): a view, but of one kept in 16 bits a copy."""
        size = self.sizes[index]
        return self.factors[index, :size, :size]

    def write(self, index: int, value: Tensor) -> None:
        """Overwrites one factor."""
        size, factors = self.sizes[index], self.factors
        factors[index, :size, :size] = value.to(factors).view(size, size)
        self.store(factors)

    def sum_of(self, index: int) -> Tensor:
        """Where backward passes sum what goes into one factor, with the pad: a view."""
        return self.sums[index]

    def traces(self, stack: Tensor) -> Tensor:
        """Trace of every factor, or sum, of such a stack, (B,)."""
        return stack.diagonal(dim1=-2, dim2=-1).sum(-1)

    def store(self, factors: Tensor, step: int = 0) -> None:
        """Keeps what was `factors` and has been written to; what is rounded at random is so by numbers of this step."""
        if self._rounding is not None:
            self._stored.copy_(self._rounding(factors, step))

    def back_up(self, places: Tensor) -> None:
        """Copies the factors with these flags (B,) into the buffers of their sums, which hold nothing of use."""
        torch.where(places[:, None, None], self.factors, self.sums, out=self.sums)
        self.old = places

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, step: int, backend: str) -> None:
        """Factor <- keep factor + gain sum where accepted; vectors (B,). What was not backed up before is so now."""
        factors, everywhere = self.factors, torch.ones_like(accept)
        if self._rounding is None:  # else `_stored` has them until `store`
            self._before = factors.clone()
        before = self._stored if self._before is None else self._before
        ops.blend(factors, self.sums, keep, gain, accept, backend=backend)
        if self.old is None:
            self.sums.copy_(before)
        else:
            torch.where(self.old[:, None, None], self.sums, before.to(self.sums.dtype), out=self.sums)
        self.old, self._before = everywhere, None
        self.store(factors, step)

    def roll_back(self) -> None:
        """Puts the old factors back."""
        factors = self.factors
        if self._before is not None:  # stopped in the middle of `blend`
            factors.copy_(self._before)
        if self.old is not None:
            torch.where(self.old[:, None, None], self.sums, factors, out=factors)
        self._before = None
        self.store(factors)  # numbers that need no rounding
