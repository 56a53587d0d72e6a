"""Rounding at random: an average in 16 bits whose steps are smaller than its last digit stands still otherwise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.certificate import mirror

_PIECE = 2**23  # bytes of a stack that are rounded at a time


class Rounding:
    """Rounds a stack of symmetric matrices to bfloat16, up or down with the probability that makes the mean right.

    Its random numbers are its own, those of a step always the same: a training run's do not depend on it, and a run that is
    resumed from a checkpoint goes on with the same ones.
    """

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device)

    def __call__(self, factors: Tensor, step: int = 0) -> Tensor:
        """Bitwise symmetric, like the factors (B, n, n)."""
        self._generator.manual_seed(step)
        result = torch.empty_like(factors, dtype=torch.bfloat16)
        most = max(1, _PIECE // factors[0].nbytes)
        for some, out in zip(factors.split(most), result.split(most), strict=True):
            bits = some.float().contiguous().view(torch.int32)
            noise = torch.randint(0, 1 << 16, bits.shape, generator=self._generator, dtype=torch.int32, device=bits.device)
            # What is cut off is the noise's own remainder: adding it carries into the last kept digit as often as it should.
            out.copy_(mirror((noise.add_(bits).bitwise_and_(~0xFFFF)).view(torch.float32)))
        return result
