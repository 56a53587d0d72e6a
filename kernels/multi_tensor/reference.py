"""Operations over many tensors in plain torch: fallback, CPU path and oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def squares_reference(inputs: list[Tensor], out: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.squares`."""
    for i, source in enumerate(inputs):
        out[i] = source.to(out.dtype).square().sum()


def gather_reference(weights: list[Tensor], biases: list[Tensor], out: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.gather`."""
    for block, weight, bias in zip(out, weights, biases, strict=True):
        if weight.numel() == 0:
            block.zero_()
            continue
        rows, columns = weight.shape[0], weight[0].numel()
        block[:rows, :columns].copy_(weight.reshape(rows, columns))
        if columns < block.shape[1]:
            block[:rows, columns].copy_(bias) if bias.numel() else block[:rows, columns].zero_()


def blend_reference(factor: Tensor, total: Tensor, keep: Tensor, gain: Tensor, accept: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.blend`."""
    if factor.device.type == "cpu":
        for i, (old, new, accepted) in enumerate(zip(keep.tolist(), gain.tolist(), accept.tolist(), strict=True)):
            if accepted:
                factor[i].mul_(old).add_(total[i], alpha=new)
        return
    # Without a host read: a sum that is not accepted may be NaN, so it is selected away, not weighted with zero.
    keep, gain, accept = (vector[:, None, None] for vector in (keep.to(factor), gain.to(factor), accept))
    factor.copy_(torch.where(accept, keep * factor + gain * total, factor))


def restore_reference(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.restore`."""
    for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True)):
        torch.where(finite[i % len(finite)], tensor, copy, out=tensor)
