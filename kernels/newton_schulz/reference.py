"""Cold start: (A + damping I)^-1 by matrix products alone, batched.

Coupled Newton-Schulz of degree 2. X and M = X B commute, so both products of a step are symmetric; the known damping is a
rigorous lower bound of the spectrum, which turns the iteration into damped Chebyshev polynomials with closed-form
coefficients: 9 doublings instead of 16 at condition number 1e3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..certificate import MULTIPLIED, damped, frobenius_norm, inverse_residual, mirror

# No eigenvalue is ever sent below this share of the top: pure Chebyshev steps send large ones near zero and lose digits.
_FLOOR = 0.35
_RIPPLE = (1 - _FLOOR) / (1 + _FLOOR)
_Z = math.cosh(math.acosh(1 / _RIPPLE) / 2)
EDGE = (_Z - 1) / (_Z + 1)  # the least lower bound that a step's polynomial is made for
LEAST, MOST = torch.finfo(torch.float32).tiny, 1 - 1e-12  # of a lower bound: the formulas divide by 1 - lower


def chebyshev_step(lower: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of M <- h0 M + h1 M M for spectra in [lower, 1] (float64, (B,)), and the lower bounds after the step."""
    edge = lower.clamp_min(EDGE)
    z = (1 + edge) / (1 - edge)
    t2 = 2 * z * z - 1  # T_2(z)
    scale = (1 + 1 / t2) * t2 * (1 - edge) ** 2
    h0, h1 = 8 * (1 + edge) / scale, -8 / scale
    after = torch.minimum(h0 * lower + h1 * lower**2, (1 - 1 / t2) / (1 + 1 / t2))
    return h0, h1, after


def newton_schulz_inverse_reference(
    factor: Tensor, damping: Tensor, inverse: Tensor, residual: Tensor, tolerance: float, max_steps: int
) -> None:
    """Plain PyTorch: fallback, CPU path and reference of the tests. See `kfac_triton.kernels.ops.newton_schulz_inverse`."""
    target = damped(factor, damping)
    upper = frobenius_norm(target)  # a rigorous bound of the spectrum, and at most sqrt(n) loose
    m = target / upper[:, None, None]
    x = torch.diag_embed((1 / upper)[:, None].expand(-1, factor.shape[-1]))
    lower = (damping.double() / upper.double()).clamp(LEAST, 1.0)
    for _ in range(max_steps):
        running = 1 - lower > tolerance
        if not factor.is_cuda and not bool(running.any()):
            break
        h0, h1, after = chebyshev_step(lower.clamp_max(MOST))
        h0, h1 = (torch.where(running, h, keep).to(m.dtype)[:, None, None] for h, keep in ((h0, 1.0), (h1, 0.0)))
        x = h0 * x + h1 * mirror(x @ m)
        m = h0 * m + h1 * mirror(m @ m)
        lower = torch.where(running, after, lower)
    inverse.copy_(x)
    residual.copy_(inverse_residual(target, x, MULTIPLIED).nan_to_num(nan=math.inf, posinf=math.inf))
