"""Sums of squared rows: what a pass adds to a factor of which only the diagonal is kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.covariance.reference import patch_matrix
from ..kernels.ops import ROWS, Window


def squared_rows(source: Tensor, window: Window, size: int, dtype: torch.dtype, mask: Tensor | None = None) -> Tensor:
    """Diagonal of X^T X, without the ones, from rows as `kernels.ops.covariance_ema` takes them, or from indices.

    Args:
        source: X (rows, n); the input (N, C, *spatial) of a convolution; indices (rows,), which stand for one-hot rows; or
            indices (rows, m), each of whose rows stands for the mean of m one-hot rows.
        window: the window of a convolution.
        size: n.
        dtype: of the sum.
        mask: of indices, which rows count, (rows, 1). (Other rows are masked by zeros, see `masked_rows`.)
    """
    if source.dim() == 2 and not source.is_floating_point():
        return _squared_means(source, size, dtype, mask)
    if source.dim() == 1:
        ones = torch.ones(1, dtype=dtype, device=source.device).expand(len(source))
        weights = ones if mask is None else mask[:, 0].to(dtype)
        return torch.zeros(size, dtype=dtype, device=source.device).index_add_(0, source, weights)
    squares = source.to(dtype).square()
    if source.dim() == 2:
        return squares.sum(0)
    if math.prod(window.kernel) == 1:
        return squares.flatten(2).sum((0, 2))
    return patch_matrix(squares, window).sum(1)


def masked_rows(source: Tensor, window: Window, mask: Tensor) -> tuple[Tensor, Window]:
    """A copy of rows or images with zeros for the rows that do not count, and the window to read it with.

    Patches of an image overlap. Where some of its positions do not count, the copy is the matrix of all patches, which takes
    as many times the memory of the image as the kernel has elements.

    Args:
        source: X (rows, n), or the input (N, C, *spatial) of a convolution.
        window: the window of a convolution.
        mask: see `layers.Rows`.
    """
    if source.dim() == 2:
        return torch.where(mask, source, 0), window
    spatial = source.shape[2:]
    if mask.shape[1] == 1 or window.reads_as_it_is:
        places = spatial if mask.shape[1] > 1 else [1] * len(spatial)
        return torch.where(mask.reshape(len(mask), 1, *places), source, 0), window
    return torch.where(mask.reshape(-1, 1), patch_matrix(source, window).T, 0), ROWS


def _squared_means(indices: Tensor, size: int, dtype: torch.dtype, mask: Tensor | None) -> Tensor:
    """With c the number of times that v is in a row, sum over rows of (c / m)^2: each of the c adds c / m^2. No row is made."""
    ordered = indices.sort(1).values.contiguous()
    counts = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    shares = counts.to(dtype) / indices.shape[1] ** 2
    if mask is not None:
        shares = shares * mask
    return torch.zeros(size, dtype=dtype, device=indices.device).index_add_(0, ordered.flatten(), shares.flatten())
