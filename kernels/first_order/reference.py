"""SGD with momentum and AdamW in plain torch: oracle of the kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .rule import Rule


def move_reference(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    rate: Tensor,
    finite: Tensor,
    rule: Rule,
) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.move`."""
    for i, (p, gradient, step) in enumerate(zip(parameters, gradients, steps, strict=True)):
        g = -gradient.float() if rule.maximize else gradient.float()
        count, own = step + 1, [kept[i] for kept in moments]
        new: list[Tensor] = []
        moved = p.float() * (1 - rate * rule.weight_decay).float()
        if rule.adam:
            (beta1, beta2), (mean, square) = rule.betas, own
            new = [torch.lerp(mean.float(), g, 1 - beta1), torch.lerp(square.float(), g * g, 1 - beta2)]
            scaled, root = rate / (1 - beta1 ** count.double()), (1 - beta2 ** count.double()).sqrt()
            along = scaled.float() * new[0]
            if rule.nesterov:
                along = (beta1 * scaled).float() * new[0] + ((1 - beta1) * rate).float() * g
            moved -= along / (new[1].sqrt() / root.float() + rule.eps)
        else:
            along = g
            if rule.momentum:
                new = [rule.momentum * own[0].float() + g]
                along = g + rule.momentum * new[0] if rule.nesterov else new[0]
            moved -= rate.float() * along
        for old, value in zip((p, *own, step), (moved, *new, count), strict=True):
            old.copy_(torch.where(finite[i], value.to(old.dtype), old))
