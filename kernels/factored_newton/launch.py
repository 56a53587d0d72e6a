"""Launches the warm refresh: one kernel first, then four per step, for any number of matrices in stacks of any sizes.

In the first step there are as many more as the power iteration takes. Which matrices go on is decided on the device, without a
host read: for a finished matrix, programs return at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..certificate import COMPUTED
from ..device_tables import Table, device_table
from ..tiles import count, padded
from . import kernel, tables
from . import plan_kernel as planning
from .reference import ITERATE_ABOVE, LARGEST_SCALE, POWER_STEPS, fixed_probes

_CHUNK = 128  # sums over tiles and over the diagonal; from 256 on, the plan spills registers on sm_100


def can_use(
    factors: list[Tensor],
    dampings: list[Tensor],
    roots: list[Tensor],
    residuals: list[Tensor],
    tolerance: float,
    max_steps: int,
    accept: float | None = None,
    used: Sequence[Tensor] = (),
    fallbacks: Sequence[Tensor] = (),
    refused: Sequence[Tensor] = (),
) -> str | None:
    """Why the kernel cannot serve these stacks; None if it can."""
    for i, (factor, root) in enumerate(zip(factors, roots, strict=True)):
        reason = tables.why_not(f"factors[{i}]", factor) or tables.why_not(f"roots[{i}]", root)
        if reason:
            return reason
    written = {"residuals": residuals, "used": used, "fallbacks": fallbacks, "refused": refused}
    for name, vectors in written.items():
        for i, vector in enumerate(vectors):
            if not vector.is_contiguous():
                return f"{name}[{i}] has gaps, and the kernel needs it contiguous"
    return None


def launch(
    factors: list[Tensor],
    dampings: list[Tensor],
    roots: list[Tensor],
    residuals: list[Tensor],
    tolerance: float,
    max_steps: int,
    accept: float | None = None,
    used: Sequence[Tensor] = (),
    fallbacks: Sequence[Tensor] = (),
    refused: Sequence[Tensor] = (),
    active: Sequence[Tensor] = (),
) -> None:
    """The Triton implementation of `factored_newton_refresh_reference`, for a call that `can_use` accepts.

    active: for another kernel's launch, optional flags of each stack, (B,), float32 and contiguous: a matrix whose flag is zero
    costs nothing. Its root stays, its residual is infinite. Without `accept`.
    """
    dampings = [damping.contiguous() for damping in dampings]
    lists = [factors, dampings, roots, residuals, *([used, fallbacks, refused] if accept is not None else [])]
    if active:
        lists.append(list(active))
    # Two kinds of stacks, because the kind decides how the kernels are compiled. Padded stacks are aligned.
    kinds: dict[bool, list[int]] = {}
    for i, (factor, root) in enumerate(zip(factors, roots, strict=True)):
        if factor.shape[0]:
            kinds.setdefault(tables.is_aligned(factor, root), []).append(i)
    for aligned, members in kinds.items():
        _refresh([[x[i] for i in members] for x in lists], tolerance, max_steps, accept, aligned, bool(active))


def _refresh(
    lists: list[list[Tensor]], tolerance: float, max_steps: int, accept: float | None, aligned: bool, some: bool
) -> None:
    """Refreshes stacks of one kind. some: whether the last list has the flags of those matrices that are to be refreshed."""
    factors = lists[0]
    device = factors[0].device
    target = runtime.target(device)
    mode = precision.resolve(precision.COARSE, target)
    rounds, keeps = mode == "tf32", accept is not None
    shapes = tables.shapes_of(factors)
    widest = max(n for _, n in shapes)
    config = dict(tuning.lookup("factored_newton", widest, target))
    block, block_k = config.pop("BLOCK"), config.pop("BLOCK_K")
    plan_config = tuning.lookup("factored_newton_plan", widest, target)
    half = POWER_STEPS + 1
    layout = tables.layout(shapes, block, plan_config["BLOCK"], 2 * half, rounds, keeps)
    addresses = tuple([tuple([x.data_ptr() for x in stack]) for stack in zip(*lists, strict=True)])
    strides = tuple([(*factor.stride()[:2], *root.stride()[:2]) for factor, root in zip(factors, lists[2], strict=True)])
    stacks = device_table(_rows(shapes, addresses, strides, layout, block, plan_config["BLOCK"], some, device), device)
    scratch = torch.empty(layout.size, dtype=torch.float32, device=device)
    matrices = tables.programs(shapes, widest, "rows", device)  # one block each
    bands = tables.programs(shapes, plan_config["BLOCK"], "rows", device)
    orders = [tables.programs(shapes, block, order, device) for order in ("factor", "energy", "update")]
    grid = (len(orders[0]),)

    common = {"ROUND": rounds, "ALIGNED": aligned, "enable_fp_fusion": True}
    tile = {"BLOCK": block, "BLOCK_K": block_k, "PRECISION": mode, **common, **config}
    plan = {"CHUNK": _CHUNK, "FLUSHED": rounds, "enable_fp_fusion": True}
    noise = COMPUTED * torch.finfo(torch.float32).eps / 2
    bound = torch.inf if accept is None else accept
    kernel.prepare_kernel[grid](
        stacks, orders[0], scratch, BLOCK=block, KEEP=keeps, SOME=some, num_warps=config.get("num_warps", 4), **common
    )  # fmt: skip
    for step in range(max_steps):
        kernel.factor_kernel[grid](stacks, orders[0], scratch, step, **tile)
        kernel.energy_kernel[grid](stacks, orders[1], scratch, step, **tile)
        planning.plan_kernel[(len(matrices),)](
            stacks, matrices, scratch, int(step == 0), tolerance, noise, ITERATE_ABOVE, LARGEST_SCALE, **plan
        )  # fmt: skip
        if step == 0:
            for product in range(2 * half):
                planning.grow_kernel[(len(bands),)](
                    stacks, bands, scratch, product,
                    HALF=half, ALIGNED=aligned, PRECISION=mode, enable_fp_fusion=True, **plan_config,
                )  # fmt: skip
            planning.conclude_kernel[(len(matrices),)](stacks, matrices, scratch, tolerance, noise, HALF=half, **plan)
        kernel.update_kernel[grid](
            stacks, orders[2], scratch, step, int(step == max_steps - 1), bound, KEEP=keeps, **tile
        )  # fmt: skip


@functools.lru_cache(maxsize=64)
def _rows(
    shapes: tables.Shapes,
    addresses: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    layout: tables.Layout,
    block: int,
    block_of_rows: int,
    some: bool,
    device: torch.device,
) -> Table:
    """The table of stacks.

    Args:
        shapes: of the stacks.
        addresses: for each stack those of its factors, dampings, roots, residuals, and what else the caller keeps of it.
        strides: for each stack those between its factors and between their rows, and the same of its roots.
        layout: of the scratch memory.
        block: side of a tile.
        block_of_rows: rows of a matrix that a program of the power iteration takes.
        some: whether the last address of a stack is that of its flags of active matrices.
        device: of the stacks.
    """
    rows, first = [], 0
    for places, (batch, n), own, steps in zip(layout.places, shapes, addresses, strides, strict=True):
        factor, damping, root, residual, *kept = own
        blocks = count(n, block)
        row = [0] * tables.STACK_FIELDS
        row[tables.FACTOR : tables.N] = (factor, *steps[:2], root, *steps[2:], damping, residual)
        row[tables.N : tables.USED] = (
            n, padded(n), first, blocks * (blocks + 1) // 2, count(n, block_of_rows),
            fixed_probes(n, torch.float32, device).data_ptr(),
        )  # fmt: skip
        if some:
            *kept, row[tables.ACTIVE] = kept
        row[tables.USED : tables.USED + len(kept)] = kept
        row[tables.TRANSPOSED : tables.TRANSPOSED + len(places)] = places
        rows.append(tuple(row))
        first += batch
    return Table(rows)
