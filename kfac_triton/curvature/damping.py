"""How one damping is split between the two factors of a layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SplitDamping:
    """Damping of A and of G, and the pi that split it; tensors (layers,)."""

    a: Tensor
    g: Tensor
    pi: Tensor


def pi_split(
    trace_a: Tensor,
    size_a: Tensor,
    trace_g: Tensor,
    size_g: Tensor,
    damping: float | Tensor,
    constant: Tensor | None = None,
) -> SplitDamping:
    """Factored Tikhonov damping (Martens and Grosse 2015, section 6.3), all arguments of shape (layers,).

        (G + sqrt(damping) / pi I)^-1 W (A + sqrt(damping) pi I)^-1,   pi^2 = (tr A / size A) / (tr G / size G)

    A zero or non-finite trace (a layer that is dead, or without statistics) gives pi = 1. Where `constant` is set, A is 1
    and no approximation: G takes the whole damping.
    """
    pi = ((trace_a / size_a) / (trace_g / size_g)).sqrt()
    usable = torch.isfinite(pi) & (pi > 0)
    pi = torch.where(usable, pi, torch.ones_like(pi))
    root = damping**0.5  # a number goes into the operations as it is: a tensor of it would be copied to the device, with a wait
    a, g = root * pi, root / pi
    if constant is not None:
        a, g = torch.where(constant, 0.0, a), torch.where(constant, damping, g)
    return SplitDamping(a=a, g=g, pi=pi)
