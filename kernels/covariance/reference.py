"""Factor statistics: A <- beta A + alpha X^T X, for any number of layers (Martens and Grosse 2015, section 5).

X holds one row per example or position. A convolution passes its input image and the window instead of X: the rows are
then its patches, and only a cache-sized part of the patch matrix exists at any time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .window import Window, unflatten

_COLUMN_BLOCK = 128  # columns per GEMM of the symmetric product: measured fastest of 128..504 at n = 1008
_PATCH_CHUNK = 1 << 20  # patch elements in flight: 4 MiB of fp32 stays in cache, 100 MiB of im2col does not
# Elements of an image, and positions for each of its channels, from which on its product is faster than a copy of its rows next
# to those of other images: 4.6 ms instead of 6.0 for 32 images of 64 channels and 32 x 32, but 2.3 instead of 1.4 for 64 of 16
# channels and 28 x 28.
_LARGE_IMAGE, _LONG_IMAGE = 1 << 16, 8


def patch_matrix(images: Tensor, window: Window) -> Tensor:
    """Patches of images (N, C, *spatial) as columns: (C * kernel elements, N * positions), in the order of a conv weight."""
    kernel, stride, padding, dilation = window
    positions = window.positions(images.shape[2:])
    if any(padding):
        images = F.pad(images, [amount for size in reversed(padding) for amount in (size, size)])
    step = images.stride()
    view = images.as_strided(
        (images.shape[1], *kernel, images.shape[0], *positions),
        (
            step[1],
            *(d * s for d, s in zip(dilation, step[2:], strict=True)),
            step[0],
            *(d * s for d, s in zip(stride, step[2:], strict=True)),
        ),
    )
    return view.reshape(images.shape[1] * math.prod(kernel), -1)


def symmetric_update(factor: Tensor, rows: Tensor, alpha: float, beta: float) -> None:
    """Factor (n, n) <- beta factor + alpha rows^T rows: lower triangle in column blocks, mirrored: bitwise symmetric."""
    n, block = factor.shape[-1], _COLUMN_BLOCK
    if n < 2 * block:
        factor.addmm_(rows.T, rows, beta=beta, alpha=alpha)
        factor.copy_((factor + factor.T).mul_(0.5))  # a + b is b + a to the last bit
        return
    for start in range(0, n, block):
        stop = min(start + block, n)
        factor[start:, start:stop].addmm_(rows[:, start:].T, rows[:, start:stop], beta=beta, alpha=alpha)
        square = factor[start:stop, start:stop]
        square.copy_((square + square.T).mul_(0.5))  # a + b is b + a to the last bit
        if stop < n:
            factor[start:stop, stop:].copy_(factor[stop:, start:stop].T)


def _row_chunks(source: Tensor, window: Window) -> Sequence[Tensor]:
    """Rows of one input, as views where it already is a matrix; patches of a few images at a time otherwise."""
    if source.dim() == 2:
        return [source]
    per_image = source.shape[1:].numel() * math.prod(window.kernel) // max(1, math.prod(window.stride))
    count = max(1, _PATCH_CHUNK // max(1, per_image))
    if window.reads_as_it_is and source.stride(1) == source.shape[2:].numel() >= _LONG_IMAGE * source.shape[1]:
        # The patch matrix of one such image is a view of it.
        count = 1 if source.shape[1:].numel() >= _LARGE_IMAGE else count
    return source.split(count) if len(source) else ()


def _accumulate(factor: Tensor, source: Tensor, window: Window, alpha: float, beta: float, ones: bool) -> None:
    for chunk in _row_chunks(source, window):
        chunk = chunk.to(factor.dtype)  # 16-bit inputs are summed in the factor's precision
        rows = chunk if chunk.dim() == 2 else patch_matrix(chunk, window).T
        n = rows.shape[1]
        symmetric_update(factor[:n, :n], rows, alpha, beta)
        if ones:  # the column of ones of the bias, without a copy of X
            column = rows.sum(0)
            border = factor[n, : n + 1]
            border[:n].mul_(beta).add_(column, alpha=alpha) if beta else border[:n].copy_(column).mul_(alpha)
            border[n] = (beta * border[n] if beta else 0.0) + alpha * rows.shape[0]
            factor[:n, n].copy_(border[:n])
        beta = 1.0
    if source.dim() > 2 and len(source) == 0:  # no patches: only the decay is left to apply
        n = source.shape[1] * math.prod(window.kernel) + ones
        block = factor[:n, :n]
        block.mul_(beta) if beta else block.zero_()


def covariance_ema_reference(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: list[bool],
    windows: list[int],
    accept: Tensor | None = None,
) -> None:
    """Plain PyTorch: fallback, CPU path and reference of the tests. See `kfac_triton.kernels.ops.covariance_ema`."""
    # The host reads the coefficients here; the Triton kernel reads them from device memory.
    alphas, betas = alpha.tolist(), beta.tolist()
    accepted = [True] * len(factors) if accept is None else accept.tolist()
    for i, window in enumerate(unflatten(windows, [source.shape for source in inputs])):
        if accepted[i]:
            _accumulate(factors[i], inputs[i], window, alphas[i], betas[i], ones_column[i])
