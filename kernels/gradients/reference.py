"""Copies between gradients or updates and stacks of matrices, and the KL clip, in plain torch: fallback and oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .layout import Layout


def gather_reference(stacks: list[Tensor], gradients: list[Tensor], layout: Layout) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.gather`."""
    for stack in stacks:
        stack.zero_()
    for piece in layout.pieces:
        piece.of_stack(stacks).copy_(piece.of_tensor(gradients))


def inner_reference(gradients: list[Tensor], updates: list[Tensor], out: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.inner`."""
    place = 0
    for gradient, update in zip(gradients, updates, strict=True):
        run = slice(place, place := place + len(gradient))
        for row, (x, y) in zip(out, ((update, gradient), (gradient, gradient), (update, update)), strict=True):
            row[run] = torch.linalg.vecdot(x.flatten(1), y.flatten(1))


def scatter_reference(stacks: list[Tensor], updates: list[Tensor], scale: Tensor, zeros: Tensor, layout: Layout) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.scatter`."""
    for piece in layout.pieces:
        values = torch.where(zeros[piece.flag], 0.0, piece.of_stack(stacks) * scale)
        piece.of_tensor(updates).copy_(values)


def clip_scale(products: Tensor, rates: Tensor, kl_clip: float) -> Tensor:
    """Scale nu = min(1, sqrt(kl_clip / sum_l lr_l^2 <V_l, grad_l>)), a scalar; terms that are not finite are left out."""
    terms = rates**2 * products
    total = torch.where(torch.isfinite(terms), terms, 0.0).sum().clamp_min(torch.finfo(products.dtype).tiny)
    return (kl_clip / total).sqrt().clamp_max(1.0)


def clip_reference(
    products: Tensor,
    rates: Tensor,
    members: Tensor,
    places: Tensor,
    kl_clip: float,
    scale: Tensor,
    finite: Tensor,
    zeros: Tensor,
    dropped: Tensor,
) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.clip`."""
    has = members >= 0
    which = members.clamp_min(0).long()
    broken = ~torch.isfinite(products)
    dropped.index_add_(0, places, broken.long())
    bad = (broken[which] & has).any(1)
    finite.copy_(~bad)
    # A padded entry of `members` points to the first matrix, to which it must add nothing.
    owners = torch.zeros(len(products), dtype=torch.long, device=products.device)
    numbers = torch.arange(len(members), device=products.device)[:, None].expand_as(which)
    owners.index_add_(0, which.flatten(), torch.where(has, numbers, 0).flatten())
    zeros.copy_(bad[owners])
    scale.fill_(1.0)
    if kl_clip < math.inf:
        scale.copy_(clip_scale(products.masked_fill(zeros, 0.0), rates[owners], kl_clip))
