"""The parts of a modelled step: seconds of the device for each, and what the host launches. See `step_model`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from benchmarks.kernels import cost_model, covariance_launches, data_movement
from benchmarks.kernels.cost import FLOAT
from benchmarks.kernels.covariance_launches import Card
from benchmarks.kernels.shapes import Layer, Model, padded
from kfac_triton.kernels.precondition.library import panels
from kfac_triton.settings import Settings

from .step_constants import OPERATORS, Machine
from .workload import DENSE_UP_TO, Workload, sampled

PRODUCT_KERNEL_UP_TO = 512  # sides that the Triton kernel preconditioned, before the library did it in TF32
# PyTorch operators of a step where kernels serve all tensors at once: fixed, for gradients of one shape (the library's four
# products and two views), where there are norms, and for their gradients of one width. `host_time` counts 129 for its GPT, 123
# for the autoencoder, 140 for the ViT and 213 for the ResNet; this formula gives 131, 123, 131 and 223.
FIXED_OPERATORS, SHAPE_OPERATORS, NORM_OPERATORS, WIDTH_OPERATORS = 75, 6, 12, 6


def statistics(work: Workload, machine: Machine) -> float:
    """Lower triangles of X^T X, by rows or by patches."""
    seconds, options = 0.0, work.options
    for x in work.layers:
        layer, images = x.layer, x.layer.images
        is_gathered = covariance_launches.kinds_of(layer, work.model.itemsize)[0].source == "patches"
        for sides, is_rows in ((x.a, not is_gathered), (x.g, True)):
            as_rows = images is None or (options.without_gather and is_rows)
            rate = machine.covariance if as_rows else machine.patches
            operations = layer.count * sum(cost_model.symmetric_rank_update(layer.rows, side) for side in sides)
            seconds += operations * options.stats_fraction / rate
            # The sum, or the factor, is read and written once whatever the rows.
            seconds += layer.count * FLOAT * sum(1.5 * side**2 for side in sides) / machine.bandwidth
    return seconds


def newton_steps(work: Workload, machine: Machine) -> float:
    """Products at a share of the peak, what the kernels read and write, and programs for matrices that are done."""
    seconds = 0.0
    launched = cost_model.GRAPH_STEPS if work.in_graph else cost_model.BLIND_STEPS
    kept = {"keeps": work.options.kept_in_kernels, "ends": work.options.no_idle_writes}
    for side, count in work.stacks.items():
        one = Model("", "", (Layer(1, side, side, bias=False),))  # two factors of this side
        cost = cost_model.warm_inverses(one, work.refreshes.steps, **kept)
        multiplying = (2 * cost.operations["tf32x2"] + cost.operations["tf32"]) / (machine.newton * machine.tf32)
        seconds += count / 2 * (multiplying + (cost.bytes + cost.scratch) / machine.bandwidth)
        seconds += count * cost_model.idle_programs(side, work.refreshes.steps, launched) * machine.idle_program
    return seconds


def power_iteration(work: Workload, machine: Machine) -> float:
    """In one program a matrix, a stack takes as long as one matrix if any needs it; over the grid, those that need it share.

    It is spread over the grid with grouped launches; before, with free scale above a certain side, and first of all nowhere.
    """
    seconds, share, options = 0.0, work.refreshes.iterated, work.options
    for side, count in work.stacks.items():
        if options.grouped:
            seconds += share * count * cost_model.power_iteration(side).bytes / machine.bandwidth
            continue
        moved = cost_model.power_iteration(side, cost_model.EARLIER_PRODUCTS).bytes
        if options.free_scale and side > cost_model.EARLIER_SPREAD_ABOVE:
            seconds += share * count * moved / machine.bandwidth
        else:
            seconds += (1 - (1 - share) ** count) * moved / machine.one_program
    return seconds


def preconditioning(work: Workload, machine: Machine) -> float:
    """Four products with roots, two for each dense side; a diagonal side multiplies elements.

    A product reads a root and a matrix, and writes another. In p panels it multiplies, and reads of the root, (1 + 1/p) / 2 of
    the whole, and (1 + p) / 2 times the matrix. <V, W> has a kernel of its own with fused updates, which `gradients` counts.
    """
    operations, moved = 0.0, 0.0
    for (rows, columns, m, n), count in _gradients(work).items():
        for side, across in ((m, columns), (n, rows)):
            if not side:
                moved += count * FLOAT * 2 * rows * columns
                continue
            of_root = panels(count, side, across) if work.options.in_panels else 1
            share = (1 + 1 / of_root) / 2
            operations += count * 4 * rows * columns * side * share
            moved += 2 * count * FLOAT * (side**2 * share + rows * columns * (1 + (1 + of_root) / 2))
        moved += count * FLOAT * rows * columns * (0 if work.options.fused_updates else 2)
    rate = machine.tf32_products if work.options.tf32 else machine.fp32_products
    return operations / rate + moved / machine.bandwidth


def _gradients(work: Workload) -> dict[tuple[int, ...], int]:
    """Rows and columns of the parts of gradients, with the sides of their factors (zero for a diagonal) -> number of them.

    Padded: one product serves all with the same four numbers, padding included.
    """
    found: Counter[tuple[int, ...]] = Counter()
    for x in work.layers:
        for m, n in x.tiles():
            sides = m or x.layer.g_side, n or x.layer.a_side, m, n
            found[tuple(map(padded, sides))] += x.layer.count
    return dict(found)


def blending(work: Workload, machine: Machine) -> float:
    """See `data_movement.blending`, of blocks."""
    moved = 0.0
    for x in work.layers:
        numbers = x.layer.count * sum(padded(side) ** 2 for side in x.a + x.g)
        waits = x in work.waiting
        moved += numbers * FLOAT * ((2 if waits else 4) if work.options.kept_in_kernels else 7 + (3 if waits else 7))
    return moved / machine.bandwidth


def norms(work: Workload, machine: Machine) -> float:
    """See `data_movement.norms`."""
    cost = data_movement.norms(work.norms, by_pytorch=not work.options.fused_norms)
    return (cost.bytes + cost.scratch) / machine.bandwidth


def gradients(work: Workload, machine: Machine) -> float:
    """Gradients into stacks and out of them, and their products with the updates."""
    return data_movement.gradients(work.model).bytes / machine.bandwidth


def updates(work: Workload, machine: Machine) -> float:
    """Updates of parameters beside those of AdamW, whose time holds them as PyTorch's multi-tensor operators move numbers.

    Before fused updates they are AdamW's, and copies of parameters and momentum. With them, the rule is one kernel, which moves
    less: the difference is taken off, for the parameters of these layers and norms alone.
    """
    fused = data_movement.ADAMW_NUMBERS - data_movement.FOREACH_ADAMW_NUMBERS
    numbers = data_movement.parameters(work.model)[1] * (fused if work.options.fused_updates else 4)
    return FLOAT * numbers / machine.bandwidth


def covariances(work: Workload) -> int:
    """Launches for all layers that wait for the step, and for the others: those of a batch of them, or two for each layer."""
    itemsize, card, fraction = work.model.itemsize, Card(), work.options.stats_fraction

    def count(layers: Iterable[Layer]) -> int:
        return covariance_launches.launches([sampled(layer, fraction) for layer in layers], itemsize, card)

    triton = count(x.layer for x in work.waiting)
    if not work.options.grouped:
        return triton + 2 * sum(x.layer.count for x in work.summed)
    # A fraction of the rows is a view of all of them, which are kept.
    batches = covariance_launches.batches([x.layer for x in work.summed], itemsize, Settings.max_kept_bytes)
    return triton + sum(map(count, batches))


def launches(work: Workload) -> tuple[int, int]:
    """Triton launches of a step, and PyTorch operators of the engine; those of norms' statistics are not among them."""
    options, shapes, norm_count = work.options, work.shapes, work.norm_count
    of_sides = Model("", "", tuple(Layer(1, side, side, bias=False) for side in work.stacks))
    launched = cost_model.GRAPH_STEPS if work.in_graph else cost_model.BLIND_STEPS
    spread_above = cost_model.EARLIER_SPREAD_ABOVE if options.free_scale else DENSE_UP_TO
    triton = covariances(work)
    triton += cost_model.warm_inverses(of_sides, 1.0, launched, options.grouped, spread_above=spread_above).launches
    if options.grouped:
        # Squares of the rows that wait, traces of the factors for their dampings, sums and diagonals blended into the factors.
        triton += bool(work.waiting) + 2 + data_movement.blending(work.model).launches
    else:
        triton += 1 + len(work.stacks) * bool(work.summed or norm_count)
    if options.fused_updates:
        triton += data_movement.gradients(work.model).launches + data_movement.parameter_updates(work.model).launches
    else:
        triton += len(shapes) + bool(norm_count) + 1  # gradients of one shape in a stack; and what restores parameters
    if not options.tf32:
        triton += 4 * sum(max(shape) <= PRODUCT_KERNEL_UP_TO for shape in shapes)
    return triton + norm_launches(work), operators(work)


def norm_launches(work: Workload) -> int:
    """Triton launches for statistics of norms."""
    return data_movement.norms(work.model).launches if work.options.fused_norms else 0


def operators(work: Workload) -> int:
    """PyTorch operators: as they were counted with everything in kernels, and fitted to the time of the host before."""
    options, count, shapes, norm_count = work.options, OPERATORS, len(work.shapes), work.norm_count
    if options.grouped and options.fused_updates:
        widths = len({norm.width for norm in work.model.norms})
        fixed = FIXED_OPERATORS + SHAPE_OPERATORS * shapes + NORM_OPERATORS * bool(norm_count) + WIDTH_OPERATORS * widths
        return fixed + (panel_operators(work) if options.in_panels else 0)
    of_stack = count.stack - count.copies * options.kept_in_kernels
    updates = data_movement.parameter_updates(work.model, by_pytorch=True).launches
    return (
        count.fixed + count.shape * shapes + count.norm * norm_count
        + of_stack * (1 if options.grouped else len(work.stacks))
        + (updates if options.dense else count.tensor * data_movement.parameters(work.model)[0])
    )  # fmt: skip


def panel_operators(work: Workload) -> int:
    """Further products for panels of roots; their views are not counted, as they launch nothing."""
    parts = _gradients(work).items()
    return sum(
        2 * (panels(count, side, across) - 1)
        for (rows, columns, m, n), count in parts for side, across in ((m, columns), (n, rows)) if side
    )  # fmt: skip


def host(work: Workload, machine: Machine) -> float:
    """Seconds of the host for launches, operators and hooks, those of norms with their operators."""
    triton, operators = launches(work)
    slow = 0 if work.options.grouped else sum(x.layer.count for x in work.summed)
    fast = sum(x.layer.count for x in work.layers) - slow
    hooks = slow * machine.layer_sum + fast * machine.hook
    hooks += work.norm_count * (machine.hook if work.options.fused_norms else machine.norm)
    return triton * machine.triton_launch + operators * machine.operator + hooks
