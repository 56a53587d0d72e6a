"""Preconditioned gradient V = G^-1 W A^-1 and the product <V, W> of the KL clip, batched over layers of one shape."""

from __future__ import annotations

import torch
from torch import Tensor

_LOOP_FROM = 256  # on a CPU, batched products of matrices this large are slower than a loop of single ones


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    if out is None:
        out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if a.is_cuda or a.shape[-1] < _LOOP_FROM:
        return torch.bmm(a, b, out=out)
    for i in range(len(a)):
        torch.mm(a[i], b[i], out=out[i])
    return out


def finish(gradient: Tensor, out: Tensor, product: Tensor | None) -> None:
    """<V, W> of each layer into product, unless it is None."""
    if product is not None:
        product.copy_(torch.linalg.vecdot(out.flatten(1), gradient.flatten(1)))


def precondition_reference(
    gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor | None, factored: bool
) -> None:
    """Plain PyTorch: fallback, CPU path and reference of the tests. See `kfac_triton.kernels.ops.precondition`."""
    if factored:
        inner = _product(_product(left, gradient), right.mT)
        _product(_product(left.mT, inner), right, out)
    else:
        _product(_product(left, gradient), right, out)
    finish(gradient, out, product)
