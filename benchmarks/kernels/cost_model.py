"""What the parts of a step must move and multiply for the layers of a model: a model of the cost, not a measurement.

Bytes are those of every operand read once and every result written once; of a symmetric or triangular matrix half is read,
and a symmetric one is written whole. What passes between the kernels of one operation is counted apart, because a cache may
hold it. Operations are those of the algorithm that the kernels run (a multiply-add counts as two), products of symmetric
results counted as triangles, and those of the warm refresh by whole tiles. So a kernel of this algorithm can be slower than its
floor and never faster, and another algorithm may need less.

The four operations of `OPERATIONS` can be timed alone; those of `REST` move data.

    python -m benchmarks.kernels.cost_model --device H100
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

from kfac_triton.kernels import tuning

from . import covariance_launches
from .cost import FLOAT, Cost
from .covariance_launches import Card
from .data_movement import REST
from .shapes import FULL, Model

TENSOR_CORES_BY_ITEMSIZE = {4: "tf32", 2: "bf16"}
# The state that the inverses are counted for.
CONDITION = 1e3  # Frobenius norm of a damped factor over its damping
COLD_TOLERANCE = 1e-3
# Launches are made for this many steps; a matrix that is done leaves the later ones at once. A warm refresh outside of a CUDA
# graph launches BLIND_STEPS, and GRAPH_STEPS in one.
COLD_MOST_STEPS, BLIND_STEPS, GRAPH_STEPS = 40, 4, 8
COLD_FUSED_UP_TO = 64  # padded side that one program inverts in one launch
# The power iteration of a refresh, in its first step alone: a launch for each product, and one that ends it.
POWER_PRODUCTS, POWER_VECTORS = 6, 16
# Before launches were shared: in each step, and in launches of its own for larger sides.
EARLIER_PRODUCTS, EARLIER_SPREAD_ABOVE = 8, 1024


@dataclass(frozen=True)
class Rates:
    """What a device can do at best: bytes a second and dense operations a second, and where the figures are from.

    Operations go by the way they are done: "bf16", "tf32", and float32 products of more digits in two or three TF32 passes,
    "tf32x2" and "tf32x3".
    """

    name: str
    source: str
    bandwidth: float
    operations: dict[str, float]

    def seconds(self, cost: Cost) -> float:
        """The floor: the longer of moving everything and multiplying everything, launches left out."""
        multiplying = sum(count / self.operations[unit] for unit, count in cost.operations.items())
        return max(cost.bytes / self.bandwidth, multiplying)

    def limit(self, cost: Cost) -> str:
        """Which of the two that is."""
        return "memory" if cost.bytes / self.bandwidth == self.seconds(cost) else "arithmetic"


def passes(tf32: float) -> dict[str, float]:
    """Rates of TF32 products in one, two and three passes."""
    return {"tf32": tf32, "tf32x2": tf32 / 2, "tf32x3": tf32 / 3}


_HOPPER = {"bf16": 989e12} | passes(494e12)
_SHEET = "spec sheet of the SXM module, dense"
DEVICES = {
    "H100": Rates("H100", _SHEET, 3.35e12, _HOPPER),
    "H200": Rates("H200", _SHEET, 4.8e12, _HOPPER),
}


def rates_of(device_name: str) -> Rates | None:
    """The rates of a device by the name that its driver gives; None for one that is not in the table, or another module."""
    words = re.split(r"[^A-Za-z0-9]+", device_name)
    if {"PCIe", "NVL", "MIG"} & set(words):
        return None
    return next((rates for name, rates in DEVICES.items() if name in words), None)


def triangle(side: int) -> float:
    """Elements on and below the diagonal."""
    return side * (side + 1) / 2


def symmetric_rank_update(rows: int, side: int) -> float:
    """Operations of the lower triangle of X^T X."""
    return 2 * rows * triangle(side)


def triangular_times_full(side: int, columns: int) -> float:
    """Operations of T B with lower triangular T: row i has i + 1 terms."""
    return 2 * triangle(side) * columns


def triangular_times_triangular(side: int) -> float:
    """Operations of a triangle of side^3 / 6 multiply-adds: T S with both lower, or the lower half of T^T T or Y T^T."""
    return side * (side + 1) * (side + 2) / 3


def statistics(model: Model, card: Card | None = None) -> Cost:
    """A <- beta A + alpha X^T X for A and G of every layer, in one call."""
    moved, operations = 0.0, 0.0
    for layer in model.layers:
        images = layer.images
        elements = images.batch * images.channels * images.side**2 if images else layer.rows * layer.inputs
        for side, numbers in ((layer.a_side, elements), (layer.g_side, layer.rows * layer.outputs)):
            moved += layer.count * (model.itemsize * numbers + FLOAT * (triangle(side) + side**2))
        for side, ones in ((layer.inputs, layer.bias), (layer.outputs, False)):
            # The border of a bias is column sums, one addition an element.
            operations += layer.count * (symmetric_rank_update(layer.rows, side) + ones * layer.rows * side)
    launches = covariance_launches.launches(model.layers, model.itemsize, card or Card())
    return Cost(moved, {TENSOR_CORES_BY_ITEMSIZE[model.itemsize]: operations}, launches)


def cold_steps(condition: float = CONDITION, tolerance: float = COLD_TOLERANCE) -> int:
    """Doublings of the cold start, from the recursion of its own coefficients.

    Args:
        condition: bound on the largest eigenvalue over that on the smallest.
        tolerance: distance from 1 of the smallest eigenvalue at the end.
    """
    import torch

    from kfac_triton.kernels.newton_schulz.reference import chebyshev_step

    lower, steps = torch.tensor([1 / condition], dtype=torch.float64), 0
    while 1 - lower.item() > tolerance:
        lower = chebyshev_step(lower)[2]
        steps += 1
    return steps


def cold_inverses(model: Model) -> Cost:
    """Coupled Newton-Schulz: X M and M M, lower triangles, in three TF32 passes each; the certificate's product is a fourth."""
    steps = cold_steps()
    moved, operations, launches = 0.0, 0.0, 0
    for side, count in model.stacks.items():
        moved += count * FLOAT * (triangle(side) + side**2)
        # The first step starts from multiples of A and of the identity, and the last leaves out M, which nobody asks for.
        operations += count * (2 * (steps - 1) + 1) * 2 * side * triangle(side)
        launches += 1 if side <= COLD_FUSED_UP_TO else 5 + COLD_MOST_STEPS  # three before the steps, two after
    return Cost(moved, {"tf32x3": operations}, launches)


def refresh_tiles(side: int, arch: str = "sm_90") -> tuple[int, int]:
    """BLOCK and BLOCK_K of the warm refresh for matrices of this side, as shipped for an architecture."""
    entries = tuning.load(tuning.SHIPPED / f"{arch}.json")["factored_newton"]
    entry = next(entry for entry in entries if entry["up_to"] is None or side <= entry["up_to"])
    return entry["BLOCK"], entry["BLOCK_K"]


def refresh_products(side: int, arch: str = "sm_90") -> tuple[float, float, float]:
    """Operations of one Newton step for one matrix, by whole tiles: T A and (T A) T^T, of which each has two passes, and Phi T.

    Of T A the lower tiles alone are needed. T ends at its diagonal, and Phi T begins at the column's tile.
    """
    block, chunk = refresh_tiles(side, arch)
    tiles = -(-side // block)

    def chunks(length: int) -> int:
        return -(-length // chunk) * chunk

    ends = [min((i + 1) * block, side) for i in range(tiles)]
    factor = sum((i + 1) * chunks(ends[i]) for i in range(tiles))
    energy = sum((tiles - j) * chunks(ends[j]) for j in range(tiles))
    update = sum(chunks(ends[i] - j * block) for i in range(tiles) for j in range(i + 1))
    area = 2.0 * block * block
    return area * factor, area * energy, area * update


def warm_inverses(
    model: Model,
    steps: float = 1.0,
    launched: int = BLIND_STEPS,
    together: bool = True,
    keeps: bool = True,
    ends: bool = True,
    spread_above: int = EARLIER_SPREAD_ABOVE,
) -> Cost:
    """Factored Newton: T A and T A T^T in two TF32 passes, Phi T in one; see `power_iteration` for the rest.

    Args:
        model: whose factors.
        steps: that a matrix takes, on average.
        launched: steps that are launched.
        together: whether one launch of each kernel serves the stacks of all sides, as it does; else each has its own, and the
            power iteration of the stacks with launches for it has them in every step.
        keeps: whether the first kernel copies T, for refused inverses to be put back; else that is left to the caller.
        ends: whether the last step of a matrix leaves out the operands of another one.
        spread_above: where stacks have launches of their own, side above which the power iteration has some.
    """
    moved, scratch, twice, once = 0.0, 0.0, 0.0, 0.0
    for side, count in model.stacks.items():
        moved += count * FLOAT * 3 * triangle(side)
        # Before the steps T rounded, T^T and the copy of T are written, and zeros above the root. In a step Y is written and
        # read; M is written whole, and its lower half is read; T rounded is read three times (for T A, M and the sum) and T^T
        # once, and both are written anew if the matrix goes on.
        scratch += count * FLOAT * ((3 + keeps) * triangle(side) + steps * (7 * triangle(side) + side**2))
        scratch += count * FLOAT * max(0.0, steps - ends) * 2 * triangle(side)
        # Only the first step's A and the last step's root are in the operands above.
        scratch += count * FLOAT * max(0.0, steps - 1) * 2 * triangle(side)
        factor, energy, update = refresh_products(side)
        twice += count * steps * (factor + energy)
        once += count * steps * update
    if together:
        launches = 1 + 4 * launched + POWER_PRODUCTS + 1 if model.stacks else 0
    else:
        per_step = (4 + (1 + EARLIER_PRODUCTS) * (side > spread_above) for side in model.stacks)
        launches = sum(1 + launched * kernels for kernels in per_step)
    return Cost(moved, {"tf32x2": twice, "tf32": once}, launches, scratch)


def idle_programs(side: int, steps: float, launched: int = BLIND_STEPS) -> float:
    """Programs that end at once, for one matrix that is done after some of the launched steps: a tile each of three kernels."""
    tiles = -(-side // refresh_tiles(side)[0])
    return 3 * triangle(tiles) * max(0.0, launched - steps)


def power_iteration(side: int, products: int = POWER_PRODUCTS) -> Cost:
    """What finds the spectrum of a matrix M where a refresh needs it: products with sixteen vectors, each of which reads M."""
    moved = products * FLOAT * (side**2 + 2 * POWER_VECTORS * side)
    return Cost(moved, {"tf32": 2.0 * products * POWER_VECTORS * side**2}, 0)


def preconditioning(model: Model) -> Cost:
    """Tg^T (Tg W Ta^T) Ta with triangular roots, in one TF32 pass."""
    moved, operations = 0.0, 0.0
    launches = 5 * len(model.gradients)  # four products, and the sum of <V, W>
    for (m, n), count in model.gradients.items():
        moved += count * FLOAT * (2 * m * n + triangle(m) + triangle(n))
        operations += count * 2 * (triangular_times_full(m, n) + triangular_times_full(n, m))
    return Cost(moved, {"tf32": operations}, launches)


OPERATIONS: dict[str, Callable[[Model], Cost]] = {
    "covariance_ema": statistics,
    "newton_schulz_inverse": cold_inverses,
    "factored_newton_refresh": warm_inverses,
    "precondition": preconditioning,
}


def table(rates: Rates, models: tuple[Model, ...] = FULL) -> str:
    """The costs of all operations and models in Markdown."""
    per_second = ", ".join(f"{unit} {count / 1e12:.0f} TFLOP/s" for unit, count in rates.operations.items() if "x" not in unit)
    lines = [
        f"**A model, not a measurement.** Floors at the rates of {rates.name} ({rates.source}): {rates.bandwidth / 1e12:.2f} "
        f"TB/s, {per_second}.",
        f"Cold inverses: condition {CONDITION:.0f}, {cold_steps()} doublings. Warm ones: one step, {BLIND_STEPS} launched.",
        "",
        "| model | operation | MB | … between its kernels | GFLOP | launches | floor, ms | limited by |",
        "|---|---|--:|--:|--:|--:|--:|---|",
    ]
    for model in models:
        for operation, count in (OPERATIONS | REST).items():
            cost = count(model)
            if not cost.launches:
                continue
            lines.append(
                f"| {model.name} | {operation} | {cost.bytes / 1e6:,.1f} | {cost.scratch / 1e6:,.1f} | {cost.total / 1e9:,.1f} "
                f"| {cost.launches} | {1e3 * rates.seconds(cost):.3f} | {rates.limit(cost)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="H100", help="whose peak rates to assume (default: %(default)s)")
    print(table(DEVICES[parser.parse_args().device]))


if __name__ == "__main__":
    main()
