"""The diagonal of the Fisher matrix of norm layers, from per-example gradients of [scale | shift].

With g the gradient of y = scale * xhat + shift, the gradient of the loss of example n is

    u_n = [sum_t g_nt * xhat_nt | sum_t g_nt],    summed over positions t,

and the Fisher matrix is E[u u^T], the diagonal E[u^2]. If loss terms are positions, each has a gradient of its own, without the
sum. Xhat is recomputed from the input, because computing it from y would divide by scale, which may be zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .norm import Norm, unflatten


def normalized(x: Tensor, norm: Norm, mean: Tensor | None = None, variance: Tensor | None = None) -> Tensor:
    """The normalized input xhat.

    Args:
        x: the input.
        norm: the layer.
        mean: the running mean, if "batch" normalizes by running statistics rather than by those of the batch.
        variance: the running variance.
    """
    if norm.kind in ("layer", "rms"):
        shape = x.shape[x.dim() - norm.dims :]
        return F.rms_norm(x, shape, eps=norm.eps) if norm.kind == "rms" else F.layer_norm(x, shape, eps=norm.eps or 0.0)
    if norm.kind == "group":
        return F.group_norm(x, norm.groups, eps=norm.eps or 0.0)
    if mean is None or variance is None:
        return F.batch_norm(x, None, None, training=True, eps=norm.eps or 0.0)
    return F.batch_norm(x, mean.to(x.dtype), variance.to(x.dtype), eps=norm.eps or 0.0)


def by_position(values: Tensor, norm: Norm) -> Tensor:
    """Values of the output's shape as (examples, positions, entries of scale)."""
    if norm.has_channels:
        return values.reshape(*values.shape[:2], values.shape[2:].numel()).mT
    return values.reshape(*norm.counts(values.shape), norm.width(values.shape))


def per_example_gradients(
    x: Tensor, gradient: Tensor, norm: Norm, mean: Tensor | None = None, variance: Tensor | None = None
) -> Tensor:
    """Gradients of [scale | shift] as rows, one for each example or position."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, gradient.dtype), torch.float32)
    gradient = gradient.to(dtype)
    parts = [by_position(gradient * normalized(x.to(dtype), norm, mean, variance), norm)]
    if norm.has_shift:
        parts.append(by_position(gradient, norm))
    return torch.cat([part.flatten(0, 1) if norm.by_position else part.sum(1) for part in parts], 1)


def norm_fisher_diagonal_reference(
    totals: list[Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    means: Sequence[Tensor | None],
    variances: Sequence[Tensor | None],
    norms: Sequence[int],
    epsilons: Sequence[float],
) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.norm_fisher_diagonal`."""
    for i, (total, norm) in enumerate(zip(totals, unflatten(tuple(norms), tuple(epsilons)), strict=True)):
        rows = per_example_gradients(inputs[i], gradients[i], norm, means[i], variances[i])
        added = rows.to(total.dtype).square().sum(0) * alpha[i].to(total.dtype)
        # An old sum that does not count may contain a NaN, so it is not multiplied by zero.
        total.copy_(torch.where(beta[i] > 0, beta[i].to(total.dtype) * total + added, added))
