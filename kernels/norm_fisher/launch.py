"""Launches the kernels of the norm layers: two for all layers of one kind, one or two more for those with channels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table
from ..tiles import count
from . import kernel
from .layout import WIDE_COLUMNS, Shape, describe, plan
from .norm import Norm, unflatten

_PROGRAMS_PER_PROCESSOR = 4  # of a launch; memory is slow, and others work while one waits
UNITS, ITEMS = 16, 64  # tile of the statistics of channels
EXAMPLES, COLUMNS = 16, 32  # tile of the kernel that adds up


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

    def norm_of(i: int) -> Norm:
        return unflatten(norms, epsilons)[i]

    for i, (total, x, g) in enumerate(zip(totals, inputs, gradients, strict=True)):
        if total.dtype != torch.float32 or not total.is_contiguous():
            return f"totals[{i}] is {total.dtype} with strides {total.stride()}, and the kernel needs contiguous float32"
        if reason := runtime.unreadable(f"inputs[{i}]", x) or runtime.unreadable(f"gradients[{i}]", g):
            return reason
        if x.numel() >= 2**31 and x.numel() // norm_of(i).width(x.shape) >= 2**31:
            return f"inputs[{i}] has more positions than 32 bits can count"
    return None


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
) -> None:
    """The Triton implementation of `norm_fisher_diagonal_reference`, for a call that `can_use` accepts."""
    if not totals:
        return
    device = totals[0].device
    described = [
        describe(x, g, norm, mean is not None)
        for x, g, norm, mean in zip(inputs, gradients, unflatten(norms, epsilons), means, strict=True)
    ]
    order = sorted(range(len(totals)), key=lambda i: described[i][2].kind)
    running = [None if x is None else x.to(torch.float32).contiguous() for x in (*means, *variances)]
    rows = [
        (
            described[i][0].data_ptr(),
            described[i][1].data_ptr(),
            totals[i].data_ptr(),
            *(0 if x is None else x.data_ptr() for x in (running[i], running[i + len(totals)])),
            0,
        )
        for i in order
    ]
    shapes = [described[i][2] for i in order]
    planned = plan(tuple(shapes), tuple(order), _PROGRAMS_PER_PROCESSOR * runtime.target(device).processors)
    addresses, layers = device_table(tuple(rows), device), device_table(planned.rows, device)
    workspace = torch.empty(planned.partials, dtype=torch.float32, device=device)
    statistics = torch.empty(planned.statistics, dtype=torch.float32, device=device)

    def some(start: int, stop: int) -> tuple[Tensor, Tensor]:
        return addresses[start:stop], layers[start:stop]

    start = 0
    for _, members in groupby(shapes, key=lambda shape: shape.kind):
        stop = start + len(list(members))
        _launch_sums(*some(start, stop), workspace, statistics, shapes[start:stop], planned.programs[start:stop])
        start = stop
    with_channels = sum(shape.norm.has_channels for shape in shapes)
    start = 0
    for stop, has_channels in ((len(shapes) - with_channels, False), (len(shapes), True)):
        by_position = [shape.by_position for shape in shapes[start:stop]]
        if has_channels and start < stop:
            units = max(row[kernel.UNITS] for row in planned.rows[start:stop])
            kernel.channel_statistics_kernel[(max(1, count(units, UNITS)), stop - start)](
                *some(start, stop), workspace, statistics, UNITS=UNITS, ITEMS=ITEMS, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        # Only sums about a mean differ if positions are terms.
        cuts = sorted({start, stop, start + by_position.index(True) if has_channels and True in by_position else start})
        for first, last in pairwise(cuts):
            widest = max(shape.width for shape in shapes[first:last])
            kernel.fisher_kernel[(2 * count(widest, COLUMNS), last - first)](
                *some(first, last), workspace, statistics, alpha, beta,
                EXAMPLES=EXAMPLES, COLUMNS=COLUMNS, HAS_CHANNELS=has_channels,
                BY_POSITION=has_channels and shapes[first].by_position, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        start = stop


def _launch_sums(
    addresses: Tensor, layers: Tensor, workspace: Tensor, statistics: Tensor, shapes: list[Shape], programs: Sequence[int]
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
