"""Stochastic rounding: otherwise a moving average in 16 bits would ignore all changes smaller than its last digit."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.certificate import mirror

_PIECE = 2**23  # bytes of a stack that are rounded at a time


def stochastically_rounded(factors: Tensor, step: int = 0) -> Tensor:
    """Rounds symmetric matrices (B, n, n) to bfloat16, up or down with the probability that leaves the mean unchanged.

    The random numbers are those of a generator that is seeded by the step: the numbers of the training run do not change, and a
    run resumed from a checkpoint rounds the same way. The result is symmetric bit for bit.
    """
    generator = torch.Generator(factors.device).manual_seed(step)
    result = torch.empty_like(factors, dtype=torch.bfloat16)
    most = max(1, _PIECE // factors[0].nbytes)
    for some, out in zip(factors.split(most), result.split(most), strict=True):
        bits = some.float().contiguous().view(torch.int32)
        noise = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=bits.device)
        # The sum carries into the last kept bit with a probability proportional to the bits that are then cut off.
        out.copy_(mirror((noise.add_(bits).bitwise_and_(~0xFFFF)).view(torch.float32)))
    return result
