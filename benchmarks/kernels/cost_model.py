"""What the four operations must move and multiply for the layers of a model: a model of the cost, not a measurement.

Bytes are those of every operand read once and every result written once; of a symmetric or triangular matrix half is read,
and a symmetric one is written whole. Operations are those of the algorithm that the kernels run (a multiply-add counts as
two), products of symmetric results counted as triangles. So a kernel of this algorithm can be slower than its floor and never
faster, and another algorithm may need less.

    python -m benchmarks.kernels.cost_model --device H100
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass

from .shapes import FULL, Images, Model

FLOAT = 4  # bytes of a float32 number, which factors, inverses and gradients are kept in
TENSOR_CORES_BY_ITEMSIZE = {4: "tf32", 2: "bf16"}
# The state that the inverses are counted for.
CONDITION = 1e3  # Frobenius norm of a damped factor over its damping
COLD_TOLERANCE = 1e-3
# Launches are made for this many steps; a matrix that is done leaves the later ones at once.
COLD_MOST_STEPS, WARM_MOST_STEPS = 40, 8
COLD_FUSED_UP_TO = 64  # padded side that one program inverts in one launch


@dataclass(frozen=True)
class Cost:
    """Bytes moved, operations by how they are done (see `Rates`), and launches of the kernels."""

    bytes: float
    operations: dict[str, float]
    launches: int

    @property
    def total(self) -> float:
        """Operations of every unit together."""
        return sum(self.operations.values())


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


def statistics(model: Model) -> Cost:
    """A <- beta A + alpha X^T X for A and G of every layer."""
    moved, operations = 0.0, 0.0
    kinds = set()
    for layer in model.layers:
        images = layer.images
        elements = images.batch * images.channels * images.side**2 if images else layer.rows * layer.inputs
        for side, numbers in ((layer.a_side, elements), (layer.g_side, layer.rows * layer.outputs)):
            moved += layer.count * (model.itemsize * numbers + FLOAT * (triangle(side) + side**2))
        for side, ones in ((layer.inputs, layer.bias), (layer.outputs, False)):
            # The border of a bias is column sums, one addition an element.
            operations += layer.count * (symmetric_rank_update(layer.rows, side) + ones * layer.rows * side)
        kinds |= {_kind(images, layer.inputs), _kind(images, layer.outputs)}
    # One launch for every way to read the rows, and one more that adds the shares where rows are split: at most.
    return Cost(moved, {TENSOR_CORES_BY_ITEMSIZE[model.itemsize]: operations}, 2 * len(kinds))


def _kind(images: Images | None, columns: int) -> tuple[bool, bool]:
    """How rows are read: as patches, or as a matrix whose rows can be copied 16 bytes at a time or not."""
    return images is not None, images is None and columns % 8 == 0


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


def warm_inverses(model: Model) -> Cost:
    """One step of factored Newton: T A and T A T^T in two TF32 passes, Phi T in one."""
    moved, launches, twice, once = 0.0, 0, 0.0, 0.0
    for side, count in model.stacks.items():
        launches += 1 + 4 * WARM_MOST_STEPS
        moved += count * FLOAT * 3 * triangle(side)
        twice += count * (triangular_times_full(side, side) + triangular_times_triangular(side))
        once += count * triangular_times_triangular(side)
    return Cost(moved, {"tf32x2": twice, "tf32": once}, launches)


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
        f"Cold inverses: condition {CONDITION:.0f}, {cold_steps()} doublings. Warm ones: a single step.",
        "",
        "| model | operation | MB | GFLOP | launches | floor, ms | limited by |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for model in models:
        for operation, count in OPERATIONS.items():
            cost = count(model)
            lines.append(
                f"| {model.name} | {operation} | {cost.bytes / 1e6:,.1f} | {cost.total / 1e9:,.1f} | {cost.launches} "
                f"| {1e3 * rates.seconds(cost):.3f} | {rates.limit(cost)} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=DEVICES, default="H100", help="whose peak rates to assume (default: %(default)s)")
    print(table(DEVICES[parser.parse_args().device]))


if __name__ == "__main__":
    main()
