"""Adam in the eigenbasis of K-FAC's factors, for tiles of all shapes together, with checked arguments.

Two operations, so that nothing of the state changes before all that can fail has succeeded. Only a step calls them, which
torch.compile never traces, so they are no operators of `torch.library`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import require, require_digits, require_like, require_vector
from ..operators import on_device
from ..runtime import choose
from . import launch
from .reference import Size, adam_direction_reference, adam_moments_reference


def adam_direction(
    rotated: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    out: list[Tensor],
    steps: Tensor,
    noise: Tensor,
    options: Tensor,
    sizes: Sequence[Size],
    backend: str = "auto",
) -> None:
    """U = N / (sqrt(D) + eps) of every tile, the step of Adam (Kingma and Ba 2015) in the eigenbasis; nothing else changes.

    With t = steps + 1, the gradient R and the moments that `adam_moments` would make,

        M' = b1 M + (1 - b1) R,  V' = b2 V + (1 - b2) R^2
        N = M' / (1 - b1^t), or with Nesterov's momentum b1 M' / (1 - b1^t) + (1 - b1) R
        D = V' / (1 - b2^t), then D += alpha rowmean(D), then D += beta colmean(D)

    U is zero where N is, even if D and eps are, and in the padding. All of U is NaN, but for the padding, if R or V' is not
    finite, or V' so large anywhere, beyond the largest number / (4 m n), that sums might overflow.

    Args:
        rotated: stacks of R, (B, rows, columns) each, fp32 or fp64; tiles are numbered through all stacks in order.
        means: M, of the same shapes.
        squares: V, likewise.
        out: output, likewise; other tensors than those before.
        steps: steps before this one, float32 (tiles,).
        noise: alpha and beta, from 0 to 1, float32 (tiles, 2).
        options: b1, b2, eps and whether the momentum is Nesterov's, 0 or 1, float64 (tiles, 4).
        sizes: true rows m and columns n of each tile; what is stored beyond is padding, which is not looked at.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes, types or devices disagree, or backend is "triton" and no kernel can serve the call.
    """
    count = _require_stacks(rotated, means=means, squares=squares, out=out)
    _require_numbers(rotated, count, steps, options)
    sizes = tuple(sizes)
    _require_sizes(tuple([x.shape for x in rotated]), sizes)
    require(noise.dtype in (torch.float32, torch.float64), f"noise must be float32, but is {noise.dtype}")
    require(noise.shape == (count, 2), f"noise must have shape ({count}, 2), but has {tuple(noise.shape)}")
    taken = {x.data_ptr() for x in (*rotated, *means, *squares)}
    for i, x in enumerate(out):
        if x.data_ptr() in taken and x.numel():
            raise ValueError(f"out[{i}] must not be one of rotated, means or squares: they are read again later")
    if not count:
        return
    arguments = rotated, means, squares, out, steps, noise, options, sizes
    if choose("adam_direction", backend, steps.device, lambda: launch.can_use_direction(*arguments)):
        with on_device(steps.device):
            launch.launch_direction(*arguments)
    else:
        adam_direction_reference(*arguments)


def adam_moments(
    rotated: list[Tensor],
    means: list[Tensor],
    squares: list[Tensor],
    steps: Tensor,
    accept: Tensor,
    options: Tensor,
    backend: str = "auto",
) -> None:
    """M <- b1 M + (1 - b1) R, V <- b2 V + (1 - b2) R^2 and a step more, for accepted tiles; nothing of the others changes.

    Args:
        rotated: stacks of R, (B, rows, columns) each, fp32 or fp64, with zeros as padding; as for `adam_direction`.
        means: M, of the same shapes, changed in place.
        squares: V, likewise.
        steps: float32 (tiles,), counted up.
        accept: bool (tiles,). A tile may hold anything where it is false.
        options: as for `adam_direction`.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes, types or devices disagree, or backend is "triton" and no kernel can serve the call.
    """
    count = _require_stacks(rotated, means=means, squares=squares)
    _require_numbers(rotated, count, steps, options)
    require_vector("accept", accept, count, steps.device)
    require(accept.dtype == torch.bool, f"accept must be bool, but is {accept.dtype}")
    if not count:
        return
    arguments = rotated, means, squares, steps, accept, options
    if choose("adam_moments", backend, steps.device, lambda: launch.can_use_moments(*arguments)):
        with on_device(steps.device):
            launch.launch_moments(*arguments)
    else:
        adam_moments_reference(*arguments)


def _require_stacks(rotated: list[Tensor], **others: list[Tensor]) -> int:
    """That other lists have stacks like those of R.

    Returns:
        The number of tiles.
    """
    for name, stacks in others.items():
        require(len(stacks) == len(rotated), f"{name} must have {len(rotated)} stacks, as rotated, but has {len(stacks)}")
    for i, r in enumerate(rotated):
        require_digits(f"rotated[{i}]", r)
        if r.dim() != 3 or r.dtype != rotated[0].dtype or r.device != rotated[0].device:
            raise ValueError(
                f"rotated[{i}] must have shape (B, rows, columns), and dtype and device of rotated[0], {rotated[0].dtype} and "
                f"{rotated[0].device}, but has {tuple(r.shape)}, {r.dtype} and {r.device}"
            )
        for name, stacks in others.items():
            require_like(f"{name}[{i}]", stacks[i], r.shape, r)
    return sum([len(r) for r in rotated])


def _require_numbers(rotated: list[Tensor], count: int, steps: Tensor, options: Tensor) -> None:
    """A counter and four numbers for each tile."""
    require_vector("steps", steps, count, rotated[0].device if rotated else steps.device)
    require(steps.dtype == torch.float32, f"steps must be float32, but is {steps.dtype}")
    require(
        options.shape == (count, 4) and options.dtype == torch.float64 and options.device == steps.device,
        f"options must be float64 ({count}, 4) on {steps.device}, but are {options.dtype} {tuple(options.shape)} on "
        f"{options.device}",
    )


@functools.lru_cache(maxsize=64)
def _require_sizes(shapes: tuple[tuple[int, ...], ...], sizes: tuple[Size, ...]) -> None:
    """True sides for each tile, which fit its stack."""
    stored = [shape[1:] for shape in shapes for _ in range(shape[0])]
    require(len(sizes) == len(stored), f"sizes must have an entry for each of {len(stored)} tiles, but has {len(sizes)}")
    for i, ((m, n), (rows, columns)) in enumerate(zip(sizes, stored, strict=True)):
        require(0 < m <= rows and 0 < n <= columns, f"sizes[{i}] must fit a tile of {rows} x {columns}, but is {m} x {n}")
