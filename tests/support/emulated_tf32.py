"""TF32 tensor cores in PyTorch on a CPU: operands are cut as an NVIDIA GPU cuts them, sums stay in float32."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kfac_triton.kernels.certificate import mirror, rounding_error
from kfac_triton.kernels.factored_newton.reference import ITERATE_ABOVE, LARGEST_SCALE, _nearest_scale, _spectral_bounds
from kfac_triton.kernels.orthogonal_iteration import reference


def cut(x: Tensor) -> Tensor:
    """The TF32 number that a tensor core makes of a float32: the last 13 bits are gone."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """The nearest TF32 number."""
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isfinite(), ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32), x)


def one_pass(left: Tensor, right: Tensor) -> Tensor:
    return cut(left) @ cut(right)


def three_passes(left: Tensor, right: Tensor) -> Tensor:
    a, b = cut(left), cut(right)
    return cut(left - a) @ b + a @ cut(right - b) + a @ b


def split(left: Tensor, right: Tensor) -> Tensor:
    """A product with a TF32 number on the right: the left operand is split in two."""
    high = rounded(left)
    return high @ right + cut(left - high) @ right


def newton(
    factors: list[Tensor], dampings: list[Tensor], roots: list[Tensor], residuals: list[Tensor], tolerance: float, steps: int
) -> None:
    """`factored_newton_refresh_reference` with the products of the kernels."""
    for factor, damping, root, residual in zip(factors, dampings, roots, residuals, strict=True):
        assert not damping.any()
        identity = torch.eye(factor.shape[-1])
        current, running = root.clone(), torch.ones_like(damping, dtype=torch.bool)
        residual.fill_(math.inf)
        for number in range(steps):
            t = rounded(current)
            energy = mirror(split(split(factor, t.mT).mT, t.mT))
            scale = _nearest_scale(energy)
            distance = torch.linalg.matrix_norm(identity - scale[:, None, None] * energy)
            safe = scale.clamp(max=LARGEST_SCALE) if number else 2 / sum(_spectral_bounds(energy))
            scale = torch.where(distance > ITERATE_ABOVE, safe, scale)
            gap = identity - scale[:, None, None] * energy
            distance = torch.linalg.matrix_norm(gap)
            rounding = rounding_error(factor, t.square().sum(-2), torch.float32) * scale
            phi = gap.tril(-1) + torch.diag_embed(0.5 * gap.diagonal(dim1=-2, dim2=-1))
            step = (scale.sqrt()[:, None, None] * (t + one_pass(phi, t))).tril()
            after = (1.5 * distance**2 + 0.5 * distance**3 + rounding).nan_to_num(nan=math.inf, posinf=math.inf)
            taken = running & after.isfinite() & (scale > 1.2e-38)
            current = torch.where(taken[:, None, None], step, current)
            residual.copy_(torch.where(running, after.masked_fill(~taken, math.inf), residual))
            running = taken & (after > tolerance) & (after > 2 * rounding)
            if not bool(running.any()):
                break
        root.copy_(current)


def use(patch: pytest.MonkeyPatch) -> None:
    """Has the reference of orthogonal iteration multiply as its kernels do."""
    patch.setattr(reference, "exact", three_passes)
    patch.setattr(reference, "coarse", one_pass)
    patch.setattr(reference, "factored_newton_refresh_reference", newton)
