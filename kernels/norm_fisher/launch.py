"""Launches the kernels of the norm layers: two for all layers of one kind, one or two more for those with channels."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table
from ..tiles import count
from . import kernel
from .layout import WIDE_COLUMNS, Shape, describe, shapes_in_place
from .layout import plan as plan_of
from .norm import Norm, unflatten

_PROGRAMS_PER_PROCESSOR = 4  # of a launch; memory is slow, and others work while one waits
UNITS, ITEMS = 16, 64  # tile of the statistics of channels
EXAMPLES, COLUMNS = 16, 32  # tile of the kernel that adds up


class Call(NamedTuple):
    """A call that was looked at.

    Attributes:
        obstacle: why the kernels cannot serve it; None if they can.
        norms: the layers.
        shapes: of the layers; None where input or gradient have to be copied first.
    """

    obstacle: str | None
    norms: tuple[Norm, ...]
    shapes: tuple[Shape | None, ...]


def look_at(
    totals: list[Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    means: Sequence[Tensor | None],
    variances: Sequence[Tensor | None],
    norms: Sequence[int],
    epsilons: Sequence[float],
) -> Call:
    """Describes the layers of a call, which is looked up by what decides it: a list for each property is made fastest."""
    layers = unflatten(tuple(norms), tuple(epsilons))
    if obstacle := _obstacle(totals, inputs, gradients, layers):
        return Call(obstacle, layers, ())
    addresses = [x.data_ptr() for x in (*inputs, *gradients)]
    offsets: tuple[int, ...] = ()
    if functools.reduce(operator.or_, addresses, 0) % 16:
        offsets = tuple([address % 16 for address in addresses])
    shapes = shapes_in_place(
        layers,
        tuple([x.shape for x in inputs]),
        (tuple(map(Tensor.stride, inputs)), tuple(map(Tensor.stride, gradients))),
        (tuple([x.dtype for x in inputs]), tuple([x.dtype for x in gradients])),
        offsets,
        tuple([mean is not None for mean in means]),
    )
    return Call(None, layers, shapes)


def _obstacle(totals: list[Tensor], inputs: list[Tensor], gradients: list[Tensor], norms: Sequence[Norm]) -> str | None:
    for i, (total, x, g) in enumerate(zip(totals, inputs, gradients, strict=True)):
        if total.dtype != torch.float32 or not total.is_contiguous():
            return f"totals[{i}] is {total.dtype} with strides {total.stride()}, and the kernel needs contiguous float32"
        if x.dtype not in runtime.TYPES or g.dtype not in runtime.TYPES:
            return runtime.unreadable(f"inputs[{i}]", x) or runtime.unreadable(f"gradients[{i}]", g)
        if x.numel() >= 2**31 and x.numel() // norms[i].width(x.shape) >= 2**31:
            return f"inputs[{i}] has more positions than 32 bits can count"
    return None


def can_use(
    totals: list[Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    means: Sequence[Tensor | None],
    variances: Sequence[Tensor | None],
    norms: Sequence[int],
    epsilons: Sequence[float],
) -> str | None:
    """Why the kernels cannot serve these layers; None if they can."""
    return look_at(totals, inputs, gradients, alpha, beta, means, variances, norms, epsilons).obstacle


def warps(elements: int, backend: str) -> int:
    """Warps of a program with a tile of so many elements: 8 for each thread, 16 bytes of 16-bit numbers; of the largest, 16."""
    return max(4, min(16, elements // 256)) // (2 if backend == "hip" else 1)  # which have twice as many threads


def row_options(elements: int, backend: str) -> dict[str, int]:
    """Launch options of `row_sums_kernel`. Left to itself, NVIDIA's compiler spills some bytes for one more program to fit."""
    return {"num_warps": warps(elements, backend)} | ({} if backend == "hip" else {"maxnreg": 128 if elements > 4096 else 96})


def launch(
    totals: list[Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    means: Sequence[Tensor | None],
    variances: Sequence[Tensor | None],
    norms: Sequence[int],
    epsilons: Sequence[float],
    *,
    plan: Call,
) -> None:
    """The Triton implementation of `norm_fisher_diagonal_reference`, for a call without an obstacle."""
    if not totals:
        return
    device, number = totals[0].device, len(totals)
    described: list[Shape] = []
    sources = [*inputs, *gradients]
    for i, shape in enumerate(plan.shapes):
        if shape is None:
            sources[i], sources[i + number], shape = describe(inputs[i], gradients[i], plan.norms[i], means[i] is not None)
        described.append(shape)
    planned = plan_of(tuple(described), _PROGRAMS_PER_PROCESSOR * runtime.target(device).processors)
    running = [None if x is None else x.to(torch.float32).contiguous() for x in (*means, *variances)]
    addresses = [x.data_ptr() for x in (*sources, *totals)]
    addresses += [0 if x is None else x.data_ptr() for x in running]
    columns = [addresses[start : start + number] for start in range(0, len(addresses), number)]
    rows = list(zip(*columns, [0] * number, strict=True))
    table, layers = device_table(tuple([rows[i] for i in planned.places]), device), device_table(planned.rows, device)
    workspace = torch.empty(planned.partials, dtype=torch.float32, device=device)
    statistics = torch.empty(planned.statistics, dtype=torch.float32, device=device)
    for run in planned.kinds:
        _launch_sums(table[run], layers[run], workspace, statistics, planned.shapes[run], planned.programs[run])
    if planned.units is not None:
        run, units = planned.units
        kernel.channel_statistics_kernel[(max(1, count(units, UNITS)), run.stop - run.start)](
            table[run], layers[run], workspace, statistics, UNITS=UNITS, ITEMS=ITEMS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    for run, widest in planned.results:
        shape = planned.shapes[run.start]
        kernel.fisher_kernel[(2 * count(widest, COLUMNS), run.stop - run.start)](
            table[run], layers[run], workspace, statistics, alpha, beta,
            EXAMPLES=EXAMPLES, COLUMNS=COLUMNS, HAS_CHANNELS=shape.norm.has_channels,
            BY_POSITION=shape.norm.has_channels and shape.by_position, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def _launch_sums(
    addresses: Tensor, layers: Tensor, workspace: Tensor, statistics: Tensor, shapes: Sequence[Shape], programs: Sequence[int]
) -> None:
    """The first kernel for layers of one kind."""
    shape = shapes[0]
    rows, columns = shape.tile
    backend = runtime.target(addresses.device).backend
    x_type, g_type = (runtime.TYPES[dtype] for dtype in shape.types)
    grid = (max(1, *programs), len(shapes)) if len(programs) > 1 else (max(1, programs[0]), 1)
    if shape.norm.has_channels:
        kernel.channel_sums_kernel[grid](
            addresses, layers, workspace, X_TYPE=x_type, G_TYPE=g_type, CHANNELS=columns, POSITIONS=rows,
            BY_POSITION=shape.by_position, ALIGNED=shape.aligned, CHANNELS_LAST=shape.channels_last,
            num_warps=warps(columns * rows, backend), enable_fp_fusion=True,
        )  # fmt: skip
        return
    if shape.is_wide:
        longest = max(max(1, shape.examples * shape.positions) for shape in shapes)
        kernel.row_statistics_kernel[(longest, len(shapes))](
            addresses, layers, statistics, X_TYPE=x_type, COLUMNS=WIDE_COLUMNS, ALIGNED=shape.aligned,
            num_warps=warps(WIDE_COLUMNS // 2, backend), enable_fp_fusion=True,
        )  # fmt: skip
    kernel.row_sums_kernel[grid](
        addresses, layers, statistics, workspace, X_TYPE=x_type, G_TYPE=g_type, ROWS=rows, COLUMNS=columns,
        BY_POSITION=shape.by_position, ALIGNED=shape.aligned, WIDE=shape.is_wide,
        enable_fp_fusion=True, **row_options(columns * rows, backend),
    )  # fmt: skip
