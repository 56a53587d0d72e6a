"""Launches the warm refresh: one kernel first, then four per step (thirteen for large matrices), for any number of matrices.

Which matrices go on is decided on the device, without a host read: for a finished matrix, programs return at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..certificate import COMPUTED
from ..tiles import ALIGNMENT, MOST_MATRICES, count, lower_tiles, padded
from . import kernel
from . import plan_kernel as planning
from .reference import ITERATE_ABOVE, fixed_probes

_CHUNK = 128  # sums over tiles and over the diagonal; from 256 on, the plan spills registers on sm_100
# Above this side, the power iteration is spread over the grid: one program would read the matrix eight times for milliseconds.
# For smaller ones, nine more launches per step would cost the host more than they save.
_SPREAD_ABOVE = 1024


def can_use(factor: Tensor, damping: Tensor, root: Tensor, residual: Tensor, tolerance: float, max_steps: int) -> str | None:
    """Why the kernel cannot serve this stack; None if it can."""
    batch, n, _ = factor.shape
    if factor.dtype != torch.float32:
        return f"factor is {factor.dtype}, and the kernel needs float32"
    if n == 0:
        return "the matrices are empty"
    if batch > MOST_MATRICES:
        return f"factor has {batch} matrices, and a launch takes {MOST_MATRICES}"
    for name, stack in (("factor", factor), ("root", root)):
        if n > 1 and stack.stride(2) != 1:
            return f"{name} has columns {stack.stride(2)} elements apart, and the kernel needs adjacent ones"
        if n * max(stack.stride(1), n + ALIGNMENT) >= 2**31:
            return f"{name} has matrices with more elements than 32 bits can count"
    if not residual.is_contiguous():
        return "residual has gaps, and the kernel needs it contiguous"
    return None


def launch(factor: Tensor, damping: Tensor, root: Tensor, residual: Tensor, tolerance: float, max_steps: int) -> None:
    """The Triton implementation of `factored_newton_refresh_reference`, for a call that `can_use` accepts."""
    batch, n, _ = factor.shape
    if batch == 0:
        return
    device, target = factor.device, runtime.target(factor.device)
    mode = precision.resolve(precision.COARSE, target)
    rounds = mode == "tf32"
    side = padded(n)
    config = dict(tuning.lookup("factored_newton", n, target))
    block, block_k = config.pop("BLOCK"), config.pop("BLOCK_K")
    plan_config = tuning.lookup("factored_newton_plan", n, target)
    tiles = lower_tiles(count(n, block), device)
    grid = (len(tiles), batch)

    def scratch(*sides: int) -> Tensor:
        return torch.empty(batch, *sides, dtype=torch.float32, device=device)

    damping = damping.contiguous()
    transposed, product, energy = scratch(n, side), scratch(n, side), scratch(n, side)
    rounded = scratch(n, side) if rounds else root
    diagonal = scratch(side)
    partials, scales = scratch(len(tiles), kernel.PARTIALS), scratch()
    flags = torch.empty(batch, kernel.FLAGS, dtype=torch.int32, device=device)
    probes = fixed_probes(n, torch.float32, device)
    blocks = scratch(2, len(probes), side)
    spread = n > _SPREAD_ABOVE
    blocks_of_rows = count(n, plan_config["BLOCK"])
    growth = scratch(planning.PRODUCTS, blocks_of_rows, len(probes)) if spread else None

    tile = {"BLOCK": block, "BLOCK_K": block_k, "PRECISION": mode, "enable_fp_fusion": True, **config}
    noise = COMPUTED * torch.finfo(torch.float32).eps / 2
    kernel.prepare_kernel[grid](
        root, rounded, transposed, flags, residual, tiles, n, root.stride(0), root.stride(1), side,
        BLOCK=block, ROUND=rounds, enable_fp_fusion=True, num_warps=config.get("num_warps", 4),
    )  # fmt: skip
    for _ in range(max_steps):
        kernel.factor_kernel[grid](
            factor, damping, rounded, product, partials, flags, tiles, n,
            factor.stride(0), factor.stride(1), rounded.stride(0), rounded.stride(1), side, SPLIT=rounds, **tile,
        )  # fmt: skip
        kernel.energy_kernel[grid](
            product, rounded, energy, diagonal, partials, flags, tiles, n, rounded.stride(0), rounded.stride(1), side,
            SPLIT=rounds, **tile,
        )  # fmt: skip
        planning.plan_kernel[(batch,)](
            energy, diagonal, partials, flags, scales, residual, probes, blocks, n, side, len(tiles), tolerance, noise,
            ITERATE_ABOVE, CHUNK=_CHUNK, SPREAD=spread, PRECISION=mode, enable_fp_fusion=True, **plan_config,
        )  # fmt: skip
        for step in range(planning.PRODUCTS if spread else 0):
            planning.grow_kernel[(blocks_of_rows, batch)](
                energy, scales, flags, probes, blocks, growth, step, n, side,
                PRECISION=mode, enable_fp_fusion=True, **plan_config,
            )  # fmt: skip
        if spread:
            planning.conclude_kernel[(batch,)](
                diagonal, partials, flags, scales, residual, growth, n, side, len(tiles), blocks_of_rows, tolerance, noise,
                CHUNK=_CHUNK, enable_fp_fusion=True,
            )  # fmt: skip
        kernel.update_kernel[grid](
            energy, root, rounded, transposed, product, flags, scales, tiles, n,
            root.stride(0), root.stride(1), rounded.stride(0), rounded.stride(1), side, ROUND=rounds, **tile,
        )  # fmt: skip
        transposed, product = product, transposed  # Y is no longer needed, and U of the next step has overwritten it
