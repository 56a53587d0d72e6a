"""Splitting the damping between the two factors of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SplitDamping:
    """The damping of A and of G, and the ratio pi; tensors (blocks,)."""

    a: Tensor
    g: Tensor
    pi: Tensor


def pi_split(mean_a: Tensor, mean_g: Tensor, damping: float | Tensor, constant: Tensor | None = None) -> SplitDamping:
    """Factored Tikhonov damping (Martens and Grosse 2015, section 6.3), for tensors (blocks,).

        (G + sqrt(damping) / pi I)^-1 W (A + sqrt(damping) pi I)^-1,   pi^2 = (tr A / size A) / (tr G / size G)

    The means are the mean eigenvalues of A and of G, tr A / size A and tr G / size G. If pi is zero or not finite (a dead
    layer, or one without statistics), it is set to 1. Where `constant` is true, the input is always 1, so that A = 1 is exact
    and G takes the whole damping.
    """
    pi = (mean_a / mean_g).sqrt()
    pi = torch.where((pi > 0) & (pi < torch.inf), pi, 1.0)
    root = damping**0.5  # stays a Python number: converting it to a tensor on the device would wait
    a, g = root * pi, root / pi
    if constant is not None:
        a, g = torch.where(constant, 0.0, a), torch.where(constant, damping, g)
    return SplitDamping(a=a, g=g, pi=pi)
