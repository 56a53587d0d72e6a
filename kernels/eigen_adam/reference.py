"""Adam in the eigenbasis of K-FAC's factors in plain torch: fallback, CPU path and oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Size = tuple[int, int]


def adam_direction_reference(
    rotated: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    out: list[Tensor],
    steps: Tensor,
    noise: Tensor,
    options: Tensor,
    sizes: Sequence[Size],
) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.adam_direction`."""
    beta1, beta2, eps, nesterov = options.unbind(1)
    alpha, beta = noise.to(options.dtype).unbind(1)
    count = (steps + 1).double()
    ahead = 1 / (1 - beta1**count)
    ahead, beside = torch.where(nesterov != 0, beta1 * ahead, ahead), torch.where(nesterov != 0, 1 - beta1, 0.0)
    # N as a sum of M and R: M' is not made here.
    along = ahead * beta1, ahead * (1 - beta1) + beside
    factors = torch.stack([*along, beta2, 1 - beta2, (1 - beta2**count).rsqrt(), eps, alpha, beta], 1).to(rotated[0].dtype)
    first = 0
    for r, mean, square, target in zip(rotated, means, squares, out, strict=True):
        target.zero_()
        start = 0
        for (m, n), alike in itertools.groupby(sizes[first : first + len(r)]):  # tiles of one size are taken together
            run = slice(start, start := start + len(list(alike)))
            own = factors[first : first + len(r)][run]
            target[run, :m, :n] = _direction(r[run, :m, :n], mean[run, :m, :n], square[run, :m, :n], own)
        first += len(r)


def _direction(r: Tensor, mean: Tensor, square: Tensor, factors: Tensor) -> Tensor:
    """U of tiles without their padding."""
    of_mean, of_gradient, keep, gain, of_root, eps, alpha, beta = (x.view(-1, 1, 1) for x in factors.unbind(1))
    new = r.square().mul_(gain).add_(square * keep)
    # So that neither the sum over the tile nor what damping makes of an element, at most four times its size, overflows.
    fits = new.amax((1, 2), keepdim=True) <= torch.finfo(new.dtype).max / (4 * r[0].numel())
    new.add_(alpha * new.mean(2, keepdim=True))
    new.add_(beta * new.mean(1, keepdim=True))
    root = new.sqrt_().mul_(of_root).add_(eps)
    along = torch.mul(mean, of_mean).add_(r * of_gradient)
    root.masked_fill_(along == 0, 1.0)
    return along.div_(root).masked_fill_(~fits, torch.nan)


def _tiles(*lists: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """The matrices of all stacks, those of the same place in each list together."""
    for stacks in zip(*lists, strict=True):
        yield from zip(*(stack.unbind() for stack in stacks), strict=True)


def adam_moments_reference(
    rotated: list[Tensor], means: list[Tensor], squares: list[Tensor], steps: Tensor, accept: Tensor, options: Tensor
) -> None:
    """Plain PyTorch, the kernel's reference. See `kfac_triton.kernels.ops.adam_moments`."""
    update = _update_accepted if steps.device.type == "cpu" else _select_accepted
    update(list(_tiles(rotated, means, squares)), accept, options)
    steps += accept


def _update_accepted(tiles: list[tuple[Tensor, ...]], accept: Tensor, options: Tensor) -> None:
    for (r, mean, square), accepted, (beta1, beta2, *_) in zip(tiles, accept.tolist(), options.tolist(), strict=True):
        if accepted:
            mean.mul_(beta1).add_(r, alpha=1 - beta1)
            square.mul_(beta2).addcmul_(r, r, value=1 - beta2)


def _select_accepted(tiles: list[tuple[Tensor, ...]], accept: Tensor, options: Tensor) -> None:
    """Without a host read: what is not accepted may be NaN, so it is selected away, not weighted with zero."""
    for i, (r, mean, square) in enumerate(tiles):
        (beta1, beta2), others = options[i, :2].to(r.dtype).unbind(), (1 - options[i, :2]).to(r.dtype).unbind()
        torch.where(accept[i], beta1 * mean + others[0] * r, mean, out=mean)
        torch.where(accept[i], beta2 * square + others[1] * (r * r), square, out=square)
