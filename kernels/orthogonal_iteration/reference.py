"""One step of orthogonal iteration, Q <- the Q factor of (A + s I) Q with R's diagonal positive, by matrix products.

    1  Y = A Q + s Q                       4  Z = Y T1^T,  S = Z^T Z
    2  B = Q^T Y                           5  T2 = Newton(S), so that T2^T T2 is close to S^-1
    3  T1 = Newton(B)                      6  Q = Z T2^T, and Q <- Q (I + Phi(I - Q^T Q))^T until it is orthonormal

T lower triangular of positive diagonal with T^T T = S^-1 is the inverse of S's Cholesky factor, which makes Z T^T the Q factor
of Z: Cholesky-QR (Fukaya et al., ScalA 2014). Multiplication with a triangular matrix of positive diagonal does not change the
Q factor, so that T1 may be far from converged. It is there because Newton's method fails with Y^T Y: eigenvector j leaks into
column i in the ratio of the eigenvalues, of which B has only the square root, and Z next to nothing.
Newton's method (see `factored_newton`) starts from diag(S)^-1/2 each time, which is what scales the columns.

The basis is taken only if Q^T Q, measured, is I: no direction can be lost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..factored_newton.reference import factored_newton_refresh_reference

# At which Newton's method stops. Of the first root nothing is asked. The corrections square what the second one leaves.
FIRST_TOLERANCE, SECOND_TOLERANCE = 0.1, 1e-2
CORRECTIONS = 3  # from an orthonormality of 0.1 they lead to 1e-7


def enough(dtype: torch.dtype) -> float:
    """The ||Q^T Q - I||_F below which nothing is corrected, a few times what rounding leaves: 3e-5 in float32."""
    return 256 * torch.finfo(dtype).eps


def most(dtype: torch.dtype) -> float:
    """The ||Q^T Q - I||_F of an accepted basis: at most 1e-4 in float32, with what the measurement may be wrong by."""
    return 800 * torch.finfo(dtype).eps


def least_mean(dtype: torch.dtype) -> float:
    """Mean diagonal of a factor below which it counts as zero: small entries of it are no normal numbers."""
    return torch.finfo(dtype).tiny / torch.finfo(dtype).eps


def exact(left: Tensor, right: Tensor) -> Tensor:
    """A product whose rounding matters."""
    return left @ right


def coarse(left: Tensor, right: Tensor) -> Tensor:
    """A product that is a correction."""
    return left @ right


def orthonormality(basis: Tensor) -> tuple[Tensor, Tensor]:
    """I - Q^T Q, and its norm (B,), which is infinite where it is not finite."""
    gap = torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device) - exact(basis.mT, basis)
    return gap, torch.linalg.matrix_norm(gap).nan_to_num(nan=math.inf, posinf=math.inf)


def orthogonal_iteration_reference(
    factors: list[Tensor],
    bases: list[Tensor],
    residuals: list[Tensor],
    refused: list[Tensor],
    shift: float,
    rescue_shift: float,
    max_steps: int,
    accept: float,
) -> None:
    """Plain PyTorch: fallback, CPU path and reference of the tests. See `kfac_triton.kernels.ops.orthogonal_iteration`."""
    for factor, basis, residual, flags in zip(factors, bases, residuals, refused, strict=True):
        mean = (factor.diagonal(dim1=-2, dim2=-1) / max(1, factor.shape[-1])).sum(-1)
        active = factor.isfinite().all(-1).all(-1) & (mean >= least_mean(factor.dtype)) & mean.isfinite()
        result, distance = basis.clone(), orthonormality(basis)[1]
        for number in (shift, rescue_shift):
            if not factor.is_cuda and not bool(active.any()):  # a GPU is not asked, because the host would wait
                break
            found, reached = _basis(factor, basis, number, mean, max_steps, accept)
            accepted = active & (reached <= most(factor.dtype))
            result = torch.where(accepted[:, None, None], found, result)
            distance = torch.where(accepted, reached, distance)
            active = active & ~accepted
        is_axis = (factor.diagonal(dim1=-2, dim2=-1) == 0) & (basis.diagonal(dim1=-2, dim2=-1) == 1)
        diagonal = result.diagonal(dim1=-2, dim2=-1)
        diagonal.copy_(torch.where(is_axis, 1.0, diagonal))  # padding remains what it is exactly
        basis.copy_(result)
        residual.copy_(distance)
        flags.copy_(active)


def _basis(factor: Tensor, basis: Tensor, shift: float, mean: Tensor, max_steps: int, accept: float) -> tuple[Tensor, Tensor]:
    """The Q factor of (A + shift mean I) Q and its orthonormality (B,), infinite where the roots did not come near."""
    y = exact(factor, basis) / mean[:, None, None] + shift * basis
    z = exact(y, _root(exact(basis.mT, y), FIRST_TOLERANCE, max_steps).mT)
    current = exact(z, _root(exact(z.mT, z), SECOND_TOLERANCE, max_steps).mT)
    gap, distance = orthonormality(current)
    distance = distance.masked_fill(~(distance <= accept), math.inf)
    for _ in range(CORRECTIONS):
        unfinished = (distance > enough(factor.dtype)) & distance.isfinite()
        if not factor.is_cuda and not bool(unfinished.any()):
            break
        phi = gap.tril(-1) + torch.diag_embed(0.5 * gap.diagonal(dim1=-2, dim2=-1))
        corrected = current + coarse(current, phi.mT)
        current = torch.where(unfinished[:, None, None], corrected, current)
        gap, following = orthonormality(current)
        distance = torch.where(unfinished, following, distance)
    return current, distance


def _root(matrix: Tensor, tolerance: float, max_steps: int) -> Tensor:
    """T, lower triangular with T^T T close to matrix^-1."""
    matrix = matrix.tril() + matrix.tril(-1).mT
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    root = torch.diag_embed(diagonal.clamp_min(1e-30).rsqrt().nan_to_num(nan=1.0))
    none = torch.zeros_like(diagonal[:, 0])
    factored_newton_refresh_reference([matrix], [none], [root], [none.clone()], tolerance, max_steps)
    return root
