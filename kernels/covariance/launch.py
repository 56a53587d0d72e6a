"""Launches the covariance kernels: the plan of a call, which is looked up, and what differs from call to call."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import precision, runtime
from ..device_tables import device_table
from . import kernel
from .plan import PROGRAMS_PER_PROCESSOR, Plan, configuration, plan_of, rows_at_a_time

REDUCED_PART = 32  # side of the part of a tile that a program of the reduction takes
_BYTES = 16  # of the widest copy


class Call(NamedTuple):
    """A call that was looked at.

    Attributes:
        obstacle: why the kernel cannot serve it; None if it can.
        plan: what to launch.
        addresses: of the input and of the factor of each layer.
    """

    obstacle: str | None
    plan: Plan
    addresses: tuple[int, ...]


def look_at(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: Sequence[bool],
    windows: Sequence[int],
    accept: Tensor | None = None,
) -> Call:
    """Looks up the plan of a call by what decides it.

    The key holds a list for each property rather than a tuple for each layer, which takes Python three times as long to make.
    """
    addresses = [0] * (2 * len(factors))
    addresses[::2], addresses[1::2] = map(Tensor.data_ptr, inputs), map(Tensor.data_ptr, factors)
    offsets: tuple[int, ...] = ()
    if functools.reduce(operator.or_, addresses, 0) % _BYTES:
        offsets = tuple([address % _BYTES for address in addresses])
    plan = plan_of(
        tuple([x.dtype for x in inputs]),
        tuple([x.shape for x in inputs]),
        tuple(map(Tensor.stride, inputs)),
        tuple([x.dtype for x in factors]),
        tuple([x.shape for x in factors]),
        tuple(map(Tensor.stride, factors)),
        offsets,
        tuple(ones_column),
        tuple(windows),
    )
    return Call(plan.obstacle, plan, tuple(addresses))


def can_use(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: Sequence[bool],
    windows: Sequence[int],
    accept: Tensor | None = None,
) -> str | None:
    """Why the kernel cannot serve these layers; None if it can."""
    return look_at(factors, inputs, alpha, beta, ones_column, windows, accept).obstacle


def launch(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: Sequence[bool],
    windows: Sequence[int],
    accept: Tensor | None = None,
    *,
    plan: Call,
) -> None:
    """The Triton implementation of `covariance_ema_reference`, for a call without an obstacle."""
    if not factors:
        return
    device = factors[0].device
    target = runtime.target(device)
    layer_table, addresses = device_table(plan.plan.layers, device), device_table(plan.addresses, device)
    flags = accept.view(torch.uint8) if accept is not None and accept.dtype == torch.bool else accept
    mode = precision.resolve(precision.ROWS, target)
    for group in plan.plan.groups:
        spatial, images, width = group.layout[:3]
        config = dict(configuration(group, target))
        block, block_k = config.pop("BLOCK"), rows_at_a_time(config.pop("BLOCK_K"), spatial)
        programs = group.programs(block, block_k, PROGRAMS_PER_PROCESSOR * target.processors)
        tile_table = device_table(programs.tiles, device, torch.int32)
        workspace = torch.empty(programs.slots * block * block, dtype=torch.float32, device=device)
        shared = (alpha, beta, alpha if flags is None else flags, workspace)
        kernel.covariance_kernel[(len(programs.tiles),)](
            addresses, layer_table, tile_table, *shared,
            DTYPE=runtime.TYPES[group.dtype],
            BLOCK=block, BLOCK_K=block_k, PRECISION=mode,
            IMAGES=images, WIDTH=width, SPATIAL=spatial, UPCAST=runtime.INTERPRETED and group.dtype != torch.float32,
            HAS_ACCEPT=flags is not None, enable_fp_fusion=True, **config,
        )  # fmt: skip
        if programs.reductions:
            reduce_table = device_table(programs.reductions, device, torch.int32)
            part = min(block, REDUCED_PART)
            kernel.covariance_reduce_kernel[(len(programs.reductions), (block // part) ** 2)](
                addresses, layer_table, reduce_table, *shared,
                BLOCK=block, PART=part, HAS_ACCEPT=flags is not None, enable_fp_fusion=True, num_warps=4,
            )  # fmt: skip
