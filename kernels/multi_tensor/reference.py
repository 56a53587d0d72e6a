"""Operations over many tensors in plain torch: fallback, CPU path and oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .diagonals import split

_STRIPE = (
    1 << 15
)  # elements of a part of a factor. PyTorch does not divide so few among threads, which would wait for each other


def squares_reference(inputs: list[Tensor], out: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.squares`."""
    for i, source in enumerate(inputs):
        out[i] = source.to(out.dtype).square().sum()


def blend_reference(
    factors: list[Tensor],
    sums: list[Tensor],
    keep: Tensor,
    gain: Tensor,
    accept: Tensor,
    summed: Tensor,
    old: Tensor,
    sizes: Sequence[int] = (),
) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.blend`.

    At any point, `old` says of which factors the old values are in the sums: an exception can come between two operations.
    """
    place = 0
    for factor, total in zip(split(factors, sizes), split(sums, sizes), strict=True):
        run = slice(place, place := place + len(factor))
        (_blend_one_by_one if factor.device.type == "cpu" else _blend_together)(
            factor, total, *(vector[run] for vector in (keep, gain, accept, summed, old))
        )


def _blend_one_by_one(
    factor: Tensor, total: Tensor, keep: Tensor, gain: Tensor, accept: Tensor, summed: Tensor, old: Tensor
) -> None:
    for i, (weight, other, has_sum) in enumerate(zip(keep.tolist(), gain.tolist(), (accept & summed).tolist(), strict=True)):
        if has_sum:
            _blend_one(factor[i], total[i], weight, other, old[i])
    for i, only_saved in enumerate((accept & ~summed).tolist()):
        if only_saved:
            total[i].copy_(factor[i])
            old[i] = True


def _blend_one(factor: Tensor, total: Tensor, weight: float, other: float, old: Tensor) -> None:
    """A few rows at a time, which stay in the processor's cache, and for which no memory is mapped: four times as fast."""
    rows, moved = max(1, _STRIPE // max(1, factor[:1].numel())), 0
    try:
        for part, new in zip(factor.split(rows), total.split(rows), strict=True):
            blended = part.mul(weight).add_(new, alpha=other)
            new.copy_(part)
            moved += len(part)
            part.copy_(blended)
        old.fill_(True)
    except BaseException:  # `old` is about all rows or none
        factor[:moved].copy_(total[:moved])
        raise


def _blend_together(
    factor: Tensor, total: Tensor, keep: Tensor, gain: Tensor, accept: Tensor, summed: Tensor, old: Tensor
) -> None:
    """Without a host read: a sum that is not accepted may be NaN, so it is selected away, not weighted with zero."""
    shape = (-1, *[1] * (factor.dim() - 1))
    keep, gain, moves, saved = (x.view(shape) for x in (keep.to(factor), gain.to(factor), accept & summed, accept))
    blended = torch.where(moves, keep * factor + gain * total, factor)
    torch.where(saved, factor, total, out=total)
    old |= accept
    factor.copy_(blended)


def traces_reference(stacks: list[Tensor], out: Tensor, sizes: Sequence[int] = ()) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.traces`."""
    place = 0
    for stack in split(stacks, sizes):
        diagonals = stack.diagonal(dim1=-2, dim2=-1) if stack.dim() > 2 else stack
        out[place : place + len(diagonals)] = diagonals.sum(-1)
        place += len(diagonals)


def restore_reference(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.restore`."""
    for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True)):
        torch.where(finite[i % len(finite)], tensor, copy, out=tensor)
