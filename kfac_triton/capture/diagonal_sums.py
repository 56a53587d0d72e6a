"""Sums of squared rows: what a pass adds to a factor of which only the diagonal is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.covariance.reference import patch_matrix
from ..kernels.ops import Window


def squared_rows(source: Tensor, window: Window, size: int, dtype: torch.dtype) -> Tensor:
    """Diagonal of X^T X, without the ones, from rows as `kernels.ops.covariance_ema` takes them, or from indices.

    Args:
        source: X (rows, n); the input (N, C, *spatial) of a convolution; indices (rows,), which stand for one-hot rows; or
            indices (rows, m), each of whose rows stands for the mean of m one-hot rows.
        window: the window of a convolution.
        size: n.
        dtype: of the sum.
    """
    if source.dim() == 2 and not source.is_floating_point():
        return _squared_means(source, size, dtype)
    if source.dim() == 1:
        return torch.zeros(size, dtype=dtype, device=source.device).index_add_(
            0, source, torch.ones(1, dtype=dtype, device=source.device).expand(len(source))
        )
    squares = source.to(dtype).square()
    if source.dim() == 2:
        return squares.sum(0)
    if math.prod(window.kernel) == 1:
        return squares.flatten(2).sum((0, 2))
    return patch_matrix(squares, window).sum(1)


def _squared_means(indices: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """With c the number of times that v is in a row, sum over rows of (c / m)^2: each of the c adds c / m^2. No row is made."""
    ordered = indices.sort(1).values.contiguous()
    counts = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    shares = counts.to(dtype) / indices.shape[1] ** 2
    return torch.zeros(size, dtype=dtype, device=indices.device).index_add_(0, ordered.flatten(), shares.flatten())
