"""How far to go along the preconditioned gradient."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_clip_scale(products: Tensor, learning_rates: Tensor, kl_clip: float | None) -> Tensor:
    """Scale nu = min(1, sqrt(kl_clip / sum_l lr_l^2 <V_l, grad_l>)) (Ba et al. 2017, section 5; Osawa et al. 2019).

    For a step lr V the sum estimates V^T F V lr^2, twice the Kullback-Leibler divergence between the predictions before and
    after it. Layers whose product is not finite do not take part: one broken layer must not stop the others.

    Args:
        products: <V_l, grad_l>, (layers,).
        learning_rates: lr_l, (layers,).
        kl_clip: the bound, or None for no clipping.

    Returns:
        nu, a scalar tensor.
    """
    one = torch.ones((), dtype=products.dtype, device=products.device)
    if kl_clip is None:
        return one
    terms = learning_rates**2 * products
    total = torch.where(torch.isfinite(terms), terms, 0.0).sum().clamp_min(torch.finfo(products.dtype).tiny)
    return torch.minimum(one, (kl_clip / total).sqrt())
