"""Inverses of damped factors by the library's factorizations, each with its certificate (see `inverse`)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import precision
from ..kernels.certificate import FACTORED, damped, inverse_residual, mirror, probe_error, root_residual, rounding_error
from .triangular import prefers_batches, symmetric_product, triangular_inverse

# Bytes of a stack that are inverted at a time, because the work space is some five times as large. On a GPU, where each call is
# a few launches, seven matrices of 3,072 rows.
_PIECE, _PIECE_IN_BATCHES = 2**23, 2**28


def pieces(count: int, factors: Tensor, dtype: torch.dtype) -> list[slice]:
    """The parts of a stack of this many matrices that are inverted in dtype one after the other."""
    limit = _PIECE_IN_BATCHES if prefers_batches(factors.device) else _PIECE
    most = max(1, limit // max(1, factors.shape[-1] ** 2 * dtype.itemsize))
    return [slice(start, start + most) for start in range(0, count, most)]


@precision.library_float32()  # certificates of products in TF32 would refuse what is right
def cholesky(factor: Tensor, damping: Tensor, as_root: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cholesky in the factor's precision: (inverse, or its root T, rounded to dtype; residual of the rounded result)."""
    target = damped(factor, damping)
    lower, info = torch.linalg.cholesky_ex(target)
    failed = (info != 0) | ~torch.isfinite(lower.diagonal(dim1=-2, dim2=-1).sum(-1))
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    if prefers_batches(lower.device) or bool(failed.any()):  # on a GPU the host must not wait to find out
        lower = torch.where(failed[:, None, None], identity, lower)
    result = triangular_inverse(lower)
    if as_root:
        _, distance, rounding = root_residual(target, result.to(dtype).to(factor.dtype))
        residual = distance + rounding  # the distance does not include the rounding error of adding the damping
    else:
        result = symmetric_product(result)
        if factor.dtype == dtype:
            residual = rounding_error(target, result.diagonal(dim1=-2, dim2=-1), dtype, FACTORED)
            residual = torch.maximum(residual, probe_error(target, result))
        else:  # precise enough to measure the rounding error of the result
            residual = inverse_residual(target, result.to(dtype).to(factor.dtype))
    result = result.to(dtype)
    failed = failed | ~torch.isfinite(result.sum((-2, -1)))
    return result, residual.to(dtype).masked_fill(failed, torch.inf)


def eigh(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(inverse, residual) from the eigenbasis. Negative eigenvalues, which are due to rounding, are set to zero."""
    finite = all_finite(factor)  # eigh raises for the whole stack if one matrix is not finite
    try:
        values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], factor, 0.0))
    except torch.linalg.LinAlgError:  # one matrix of the stack did not converge
        if len(factor) == 1:
            return torch.zeros_like(factor), torch.full_like(damping, torch.inf)
        alone = [eigh(*pair) for pair in zip(factor.split(1), damping.split(1), strict=True)]
        return torch.cat([inverse for inverse, _ in alone]), torch.cat([residual for _, residual in alone])
    root = (vectors * (values.clamp_min(0) + damping[:, None]).rsqrt().unsqueeze(-2)).mT
    inverse = mirror(root.mT @ root)
    target = damped(factor, damping)
    # The root's distance does not see the rounding of T^T T, and the terms of the inverse's own can cancel where float32 has
    # too few digits. Of 600,000 hard matrices none had an error above the larger of the two.
    _, distance, rounding = root_residual(target, root)
    residual = torch.maximum(distance + rounding, inverse_residual(target, inverse))
    return inverse, residual.masked_fill(~(finite & all_finite(inverse)), torch.inf).nan_to_num(nan=torch.inf)


def all_finite(stack: Tensor) -> Tensor:
    """Whether all elements of each matrix are finite, (B,)."""
    return torch.isfinite(stack).flatten(1).all(1)
