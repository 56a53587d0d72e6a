"""Launches the kernels of the cold inverse: fused for small matrices, in stages for larger ones; the host does not wait."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..certificate import MULTIPLIED
from ..tiles import ALIGNMENT, count, lower_tiles, padded
from . import kernel
from .reference import EDGE, LEAST, MOST

_TILE = 32  # of kernels without products
_CHUNK = 256  # shares of tiles that a reduction adds at a time
_ROUNDING = MULTIPLIED * torch.finfo(torch.float32).eps / 2
_PROGRAMS = 2**31  # of one launch


def can_use(factor: Tensor, damping: Tensor, inverse: Tensor, residual: Tensor, tolerance: float, max_steps: int) -> str | None:
    """Why the kernel cannot serve this stack; None if it can."""
    batch, n, _ = factor.shape
    if factor.dtype != torch.float32:
        return f"factor is {factor.dtype}, and the kernels need float32"
    if n == 0:
        return "the matrices are empty"
    for name, stack in (("factor", factor), ("inverse", inverse)):
        if stack.stride(2) != 1:
            return f"{name} has columns {stack.stride(2)} elements apart, and the kernels need adjacent ones"
    if residual.stride(0) != 1:
        return f"residual has numbers {residual.stride(0)} elements apart, and the kernels need adjacent ones"
    if factor.data_ptr() == inverse.data_ptr() != 0:
        return "inverse and factor are the same memory, and the kernels read factor after they write inverse"
    tiles = count(n, ALIGNMENT)  # more than any block makes
    if batch * tiles * (tiles + 1) >= _PROGRAMS:
        return f"{batch} matrices of side {n} are more than one launch can take"
    return None


def launch(factor: Tensor, damping: Tensor, inverse: Tensor, residual: Tensor, tolerance: float, max_steps: int) -> None:
    """The Triton implementation of `newton_schulz_inverse_reference`, for a call that `can_use` accepts."""
    if factor.shape[0] == 0:
        return
    damping, max_steps = damping.contiguous(), max(0, max_steps)
    constants = {"TOLERANCE": float(tolerance), "EDGE": EDGE, "LEAST": LEAST, "MOST": MOST}
    config = dict(tuning.lookup("newton_schulz_fused", factor.shape[-1], runtime.target(factor.device)))
    if config.pop("FUSED"):  # whether a matrix of this side fits the registers of one program
        _fused(factor, damping, inverse, residual, max_steps, constants, config)
    else:
        _by_stages(factor, damping, inverse, residual, max_steps, constants)


def _fused(
    factor: Tensor,
    damping: Tensor,
    inverse: Tensor,
    residual: Tensor,
    max_steps: int,
    constants: dict[str, float],
    config: tuning.Config,
) -> None:
    batch, n, _ = factor.shape
    kernel.fused_kernel[(batch,)](
        factor, factor.stride(0), factor.stride(1), damping, inverse, inverse.stride(0), inverse.stride(1), residual,
        n, max_steps, **constants, ROUNDING=_ROUNDING, SIDE=max(16, 1 << (n - 1).bit_length()),
        PRECISION=precision.resolve(precision.EXACT, runtime.target(factor.device)), enable_fp_fusion=True, **config,
    )  # fmt: skip


def _by_stages(
    factor: Tensor, damping: Tensor, inverse: Tensor, residual: Tensor, max_steps: int, constants: dict[str, float]
) -> None:
    batch, n, _ = factor.shape
    device, target = factor.device, runtime.target(factor.device)
    side = padded(n)
    step: dict[str, Any] = dict(tuning.lookup("newton_schulz_step", n, target))
    last: dict[str, Any] = dict(tuning.lookup("newton_schulz_residual", n, target))
    for config in (step, last):
        config |= {"PRECISION": precision.resolve(precision.EXACT, target), "enable_fp_fusion": True}
    step_tiles, last_tiles, plain_tiles = (
        lower_tiles(count(side, block), device) for block in (step["BLOCK"], last["BLOCK"], _TILE)
    )
    uppers = torch.empty(batch, device=device)
    squares = torch.empty(batch, len(plain_tiles), dtype=torch.float64, device=device)
    schedule = torch.empty(max_steps + 1, batch, kernel.ROW, device=device)
    work = torch.empty(2, 2, batch, side, side, device=device)
    partials = torch.empty(2, batch, len(last_tiles), device=device)

    source = (factor, factor.stride(0), factor.stride(1), damping)
    plain = {"BLOCK": _TILE, "enable_fp_fusion": True}
    grid = (batch * len(plain_tiles),)
    kernel.norm_kernel[grid](*source, squares, plain_tiles, len(plain_tiles), n, **plain)
    # Without fused multiply-adds the schedule is the reference's to the last bit.
    kernel.schedule_kernel[(batch,)](
        squares, damping, uppers, schedule, batch, len(plain_tiles), max_steps, **constants, CHUNK=_CHUNK,
        enable_fp_fusion=False,
    )  # fmt: skip
    kernel.prepare_kernel[grid](
        *source, uppers, schedule, work, plain_tiles, batch, len(plain_tiles), n, side, **plain
    )  # fmt: skip
    for row in schedule[:max_steps].unbind():
        kernel.step_kernel[(2 * batch * len(step_tiles),)](work, row, step_tiles, batch, len(step_tiles), side, **step)
    kernel.residual_kernel[(batch * len(last_tiles),)](
        *source, work, inverse, inverse.stride(0), inverse.stride(1), partials, last_tiles, batch, len(last_tiles), n, side,
        **last,
    )  # fmt: skip
    kernel.certificate_kernel[(batch,)](
        partials, residual, batch, len(last_tiles), ROUNDING=_ROUNDING, CHUNK=_CHUNK, enable_fp_fusion=True
    )
