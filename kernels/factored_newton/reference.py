"""Warm refresh of the inverse Cholesky factor, batched: T lower triangular with T^T T close to (A + damping I)^-1.

    M = T (A + damping I) T^T,   R = I - c M,   T <- sqrt(c) (I + Phi(R)) T,   Phi = strictly lower part + half the diagonal.

Quadratic, self-correcting, matrix products only, and T^T T is positive semidefinite whatever is rounded. After one step
||R'||_F <= 1.5 ||R||_F^2 + 0.5 ||R||_F^3: the residual of the scaled factor that came in bounds the one that goes out.
The scale c = tr M / ||M||_F^2 minimises that residual, and needs sums alone. Where even so it is large, a few eigenvalues
of M may be so far above the rest that the step would not contract: there c is 2 / (lower + upper) of the spectrum in the first
step. That step brings all eigenvalues below about 1, so that in later steps it is enough to bound c.
(Niklasson, PRB 70, 193102 (2004) refines an inverse factor in this way; Rubensson et al., JCP 128, 104105 (2008).)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..certificate import damped, root_energy

# Below 1, all eigenvalues of c M are below 2 and the step contracts. Above this ||I - c M||_F, the power iteration makes sure
# in the first step, and the largest scale in later ones. Of 716 refreshes in the training of a small GPT (damping 0.001 to
# 0.03) and of an autoencoder (0.03), four steps leave 2 above an error of 0.3; with eight products in every step they leave 3.
ITERATE_ABOVE = 0.8
LARGEST_SCALE = 1.5
POWER_STEPS = 2  # products before the one that measures growth
_PROBES = 16  # a tensor core multiplies 16 vectors at a time


@functools.cache  # for good: a CUDA graph goes on reading them
def fixed_probes(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Random vectors (16, n), always the same: a refresh is a function of its inputs."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_PROBES, n, generator=generator, dtype=torch.float64).to(device, dtype)


def _nearest_scale(matrix: Tensor) -> Tensor:
    """The c (B,) that minimises ||I - c M||_F: tr M / ||M||_F^2."""
    unit = matrix.abs().amax((-2, -1))  # squares may be beyond the dtype
    matrix = matrix / unit[:, None, None]
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1) / matrix.square().sum((-2, -1)) / unit


def _spectral_bounds(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates (lower, upper), each (B,), of the extreme eigenvalues of symmetric positive matrices, by power iteration."""
    n = matrix.shape[-1]
    unit = matrix.diagonal(dim1=-2, dim2=-1).amax(-1)  # their largest entry; squares of it may be beyond the dtype
    matrix = matrix / unit[:, None, None]
    probes = fixed_probes(n, matrix.dtype, matrix.device).mT

    def top(operator: Tensor) -> Tensor:
        block = probes.expand(len(matrix), -1, -1)
        for _ in range(POWER_STEPS):
            block = operator @ block
            block = block / torch.linalg.vector_norm(block, dim=-2, keepdim=True).clamp_min(1e-30)
        return torch.linalg.vector_norm(operator @ block, dim=-2).amax(-1)

    upper = 1.05 * top(matrix)
    shifted = upper[:, None, None] * torch.eye(n, dtype=matrix.dtype, device=matrix.device) - matrix
    lower = (upper - 1.05 * top(shifted)).clamp_min(1e-3 * upper)
    return lower * unit, upper * unit


def factored_newton_refresh_reference(
    factors: list[Tensor],
    dampings: list[Tensor],
    roots: list[Tensor],
    residuals: list[Tensor],
    tolerance: float,
    max_steps: int,
    accept: float | None = None,
    used: Sequence[Tensor] = (),
    fallbacks: Sequence[Tensor] = (),
    refused: Sequence[Tensor] = (),
) -> None:
    """Plain PyTorch: fallback, CPU path and reference of the tests. See `kfac_triton.kernels.ops.factored_newton_refresh`."""
    for i, stack in enumerate(zip(factors, dampings, roots, strict=True)):
        root, bound = _refreshed(*stack, tolerance, max_steps)
        if accept is not None:
            is_refused = ~(bound <= accept)
            root = torch.where(is_refused[:, None, None], stack[2], root)
            bound = torch.where(is_refused, residuals[i], bound)
            used[i].copy_(torch.where(is_refused, used[i], dampings[i]))
            fallbacks[i].add_(is_refused)
            refused[i].copy_(is_refused)
        roots[i].copy_(root)
        residuals[i].copy_(bound)


def _refreshed(factor: Tensor, damping: Tensor, root: Tensor, tolerance: float, max_steps: int) -> tuple[Tensor, Tensor]:
    """The new root of every matrix of a stack, and the bound on its error."""
    target = damped(factor, damping)
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    current = root.clone()
    bound = torch.full_like(damping, math.inf)
    running = torch.ones_like(bound, dtype=torch.bool)
    # What T B loses below the normal numbers is not relative to the result.
    lost = current.shape[-1] * torch.finfo(current.dtype).smallest_normal * torch.finfo(current.dtype).eps
    for number in range(max_steps):
        energy, rounding = root_energy(target, current)
        scale = _nearest_scale(energy)
        gap = identity - scale[:, None, None] * energy
        distance = torch.linalg.matrix_norm(gap)
        far = running & (distance > ITERATE_ABOVE)
        if factor.is_cuda or bool(far.any()):
            safe = scale.clamp(max=LARGEST_SCALE) if number else 2 / sum(_spectral_bounds(energy))
            scale = torch.where(far, safe, scale)
            gap = identity - scale[:, None, None] * energy
            distance = torch.linalg.matrix_norm(gap)
        rounding = (rounding + lost * current.abs().sum((-2, -1))) * scale  # of the scaled root
        phi = gap.tril(-1) + torch.diag_embed(0.5 * gap.diagonal(dim1=-2, dim2=-1))
        step = (scale.sqrt()[:, None, None] * (current + phi @ current)).tril()
        after = (1.5 * distance**2 + 0.5 * distance**3 + rounding).nan_to_num(nan=math.inf, posinf=math.inf)
        # A step that does not contract keeps the factor it came from, and says so in the residual.
        # A scale that is not positive has no root: the matrix is not positive either, whatever the scale makes of it.
        taken = running & torch.isfinite(after) & (scale > torch.finfo(scale.dtype).tiny)
        current = torch.where(taken[:, None, None], step, current)
        bound = torch.where(running, after.masked_fill(~taken, math.inf), bound)
        # Below twice the rounding there is nothing left to gain.
        running = running & (after > tolerance) & (after > 2 * rounding)
        if not factor.is_cuda and not bool(running.any()):
            break
    return current, bound
