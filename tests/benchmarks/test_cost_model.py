"""Counts of benchmarks/kernels/cost_model.py against numbers worked out by hand, loops that count, and launches that happen."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.kernels import cost_model
from benchmarks.kernels.contestants import make_problem
from benchmarks.kernels.covariance_launches import Card, batches
from benchmarks.kernels.shapes import BY_NAME, FULL, QUICK, Images, Layer, Model, convolution
from kfac_triton.curvature import inverse
from kfac_triton.kernels import ops, runtime
from kfac_triton.kernels.factored_newton import tables
from kfac_triton.kernels.factored_newton.reference import POWER_STEPS

TINY = Model("tiny", "", (Layer(rows=4, inputs=3, outputs=2, count=2),), itemsize=4)


def test_statistics_by_hand() -> None:
    cost = cost_model.statistics(TINY)
    # A is 4 x 4: 12 numbers of X, 10 of the old factor, 16 written; G is 2 x 2: 8, 3 and 4. Two layers of 4-byte numbers.
    assert cost.bytes == 2 * 4 * (12 + 10 + 16 + 8 + 3 + 4)
    # X^T X of 3 columns: 6 entries of 4 multiply-adds, then 3 column sums of 4 rows; G: 3 entries of 4 multiply-adds.
    assert cost.operations == {"tf32": 2 * (48 + 12 + 24)}


def test_sixteen_bit_rows_move_half_the_bytes() -> None:
    full = cost_model.statistics(TINY)
    half = cost_model.statistics(Model("tiny", "", TINY.layers, itemsize=2))
    assert full.bytes - half.bytes == 2 * 2 * (12 + 8)
    assert half.operations == {"bf16": full.total}


def test_an_image_is_read_once_and_not_its_patches() -> None:
    model = QUICK[1]
    layer = model.layers[0]
    assert layer.images is not None and layer.rows * layer.inputs == 9 * 4 * 3 * 12 * 12
    alone = cost_model.statistics(Model("conv", "", (layer,), itemsize=2))
    # Images 4 x 3 x 12 x 12, gradients 4 x 16 x 12 x 12; A 28 x 28 and G 16 x 16.
    assert alone.bytes == 2 * (1728 + 9216) + 4 * (28 * 29 / 2 + 28 * 28 + 16 * 17 / 2 + 16 * 16)


def lower(i: int, k: int) -> bool:
    return k <= i


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_triangular_products_are_counted_as_loops_count_them(n: int) -> None:
    def multiply_adds(used: Callable[[int, int, int], bool]) -> int:
        return sum(used(i, j, k) for i in range(n) for j in range(n) for k in range(n))

    assert cost_model.triangular_times_full(n, n) == 2 * multiply_adds(lambda i, j, k: lower(i, k))
    both = multiply_adds(lambda i, j, k: lower(i, k) and lower(k, j))
    assert cost_model.triangular_times_triangular(n) == 2 * both
    # Lower half of Y T^T, where T ends at its row's diagonal.
    assert cost_model.triangular_times_triangular(n) == 2 * multiply_adds(lambda i, j, k: lower(i, j) and lower(j, k))
    assert cost_model.symmetric_rank_update(3, n) == 2 * 3 * sum(lower(i, j) for i in range(n) for j in range(n))


def test_inverses_and_preconditioning_by_hand() -> None:
    model = Model("one", "", (Layer(8, 16, 32, bias=False),))  # factors of 16 and 32, one gradient 32 x 16
    warm = cost_model.warm_inverses(model)
    assert warm.bytes == 4 * 3 * (136 + 528)
    # Before the step four triangles; in it Y twice, T rounded three times, T^T once, M once in halves and once whole.
    assert warm.scratch == 4 * ((4 + 2 + 3 + 1 + 1) * (136 + 528) + 16**2 + 32**2)
    assert cost_model.warm_inverses(model, ends=False).scratch - warm.scratch == 4 * 2 * (136 + 528)
    assert warm.scratch - cost_model.warm_inverses(model, keeps=False).scratch == 4 * (136 + 528)
    # A second step reads A and writes the root once more, and the first writes its operands.
    assert cost_model.warm_inverses(model, steps=2).scratch == 4 * ((4 + 2 * 7 + 2 + 2) * (136 + 528) + 2 * (16**2 + 32**2))
    cost = cost_model.preconditioning(model)
    assert cost.bytes == 4 * (2 * 512 + 136 + 528)
    assert cost.operations == {"tf32": 2 * (2 * 528 * 16 + 2 * 136 * 32)}
    cold = cost_model.cold_inverses(model)
    assert cold.bytes == 4 * (136 + 256 + 528 + 1024)
    # 8 doublings: 7 of two products, 7 times 2 and the certificate's; a product's triangle is 2 * n * n (n + 1) / 2.
    assert cost_model.cold_steps() == 8
    assert cold.operations == {"tf32x3": 15 * (16 * 16 * 17 + 32 * 32 * 33)}


@pytest.mark.parametrize("side", [16, 32, 48, 64, 80, 200, 256])
def test_products_of_the_refresh_are_counted_as_loops_over_tiles_count_them(side: int) -> None:
    block, chunk = cost_model.refresh_tiles(side)
    factor = energy = update = 0
    for i in range(0, side, block):
        for j in range(0, i + 1, block):
            factor += len(range(0, min(i + block, side), chunk))
            energy += len(range(0, min(j + block, side), chunk))
            update += len(range(j, min(i + block, side), chunk))
    tile = 2 * block * block * chunk
    assert cost_model.refresh_products(side) == (factor * tile, energy * tile, update * tile)


@pytest.mark.parametrize("side", [16, 80, 144])
def test_products_of_the_refresh_are_those_that_the_kernels_make(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dot of one step counted in the interpreter, which does not split operands: one pass of each product."""
    from triton.runtime.interpreter import InterpreterBuilder

    operations = 0
    create_dot = InterpreterBuilder.create_dot

    def counted(self: object, a: Any, b: Any, *rest: Any) -> Any:
        nonlocal operations
        operations += 2 * a.data.shape[0] * a.data.shape[1] * b.data.shape[1]
        return create_dot(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    identity, damping, residual = torch.eye(side).repeat(2, 1, 1), torch.ones(2), torch.empty(2)
    ops.factored_newton_refresh([0 * identity], [damping], [identity.clone()], [residual], 0.05, 1, backend="triton")
    assert operations == 2 * sum(cost_model.refresh_products(side, "interpreter"))


@pytest.mark.parametrize("side", [16, 64, 80, 784, 3072])
def test_programs_that_end_at_once_are_those_of_the_tables(side: int) -> None:
    """Three kernels of each step that is launched after the last one of a matrix."""
    block = cost_model.refresh_tiles(side)[0]
    programs = sum(len(tables._rows(((1, side),), block, order)) for order in ("factor", "energy", "update"))
    assert cost_model.idle_programs(side, 1) == (cost_model.BLIND_STEPS - 1) * programs
    assert cost_model.idle_programs(side, 1.5, 8) == 6.5 * programs
    assert cost_model.idle_programs(side, 4, 4) == 0


def test_two_passes_where_operands_are_split() -> None:
    model = Model("one", "", (Layer(8, 192, 192, bias=False),))
    factor, energy, update = cost_model.refresh_products(192)
    assert cost_model.warm_inverses(model).operations == {"tf32x2": 2 * (factor + energy), "tf32": 2 * update}
    assert cost_model.warm_inverses(model, steps=1.5).operations["tf32"] == 1.5 * 2 * update


def test_the_refresh_of_gpt2_is_less_than_with_the_whole_of_t_a() -> None:
    found = cost_model.warm_inverses(BY_NAME["gpt2"]).total
    exact = sum(
        count * (side * (side + 1) * (2 * side + 1) / 3 + 2 * cost_model.triangular_times_triangular(side))
        for side, count in BY_NAME["gpt2"].stacks.items()
    )
    whole = sum(
        count * (cost_model.triangular_times_full(side, side) + 2 * cost_model.triangular_times_triangular(side))
        for side, count in BY_NAME["gpt2"].stacks.items()
    )
    assert exact < found < whole


def test_launches_of_large_matrices_and_of_all_sides_together() -> None:
    sides = Model("three", "", (Layer(8, 1040, 1024, bias=False), Layer(8, 16, 16, bias=False)))
    assert cost_model.POWER_PRODUCTS == 2 * (POWER_STEPS + 1)
    assert cost_model.POWER_VECTORS == tables.PROBE_COUNT
    assert (cost_model.GRAPH_STEPS, cost_model.BLIND_STEPS) == (inverse._REFINEMENTS, inverse._BLIND_REFINEMENTS)
    first, each, power = 1, 4, 7
    assert cost_model.warm_inverses(sides).launches == first + 4 * each + power
    assert cost_model.warm_inverses(sides, launched=8).launches == first + 8 * each + power
    # Before: each side by itself, and above 1,024 nine launches more in every step.
    small, large = 1 + 4 * 4, 1 + 4 * 13
    assert cost_model.warm_inverses(sides, together=False).launches == large + 2 * small
    assert cost_model.warm_inverses(sides, launched=8, together=False, spread_above=0).launches == 3 * (1 + 8 * 13)


@pytest.mark.parametrize("products", [6, 8])
def test_each_product_of_the_power_iteration_reads_the_matrix(products: int) -> None:
    cost = cost_model.power_iteration(32, products)
    multiply_adds = sum(1 for _ in range(products) for _ in range(32) for _ in range(32) for _ in range(16))
    assert cost.operations == {"tf32": 2 * multiply_adds}
    assert cost.bytes == 4 * products * (32 * 32 + 2 * 16 * 32)
    assert cost_model.power_iteration(32) == cost_model.power_iteration(32, 6)


def test_the_number_of_doublings_is_that_of_the_schedule() -> None:
    """In double precision, on the smallest eigenvalue alone: M <- M (h0 + h1 M)."""
    from kfac_triton.kernels.newton_schulz.reference import chebyshev_step

    for condition in (1e1, 1e3, 1e5):
        steps = cost_model.cold_steps(condition)
        bound = eigenvalue = torch.tensor([1 / condition], dtype=torch.float64)
        history = []
        for _ in range(steps):
            h0, h1, bound = chebyshev_step(bound)
            eigenvalue = eigenvalue * (h0 + h1 * eigenvalue)
            history.append(abs(1 - eigenvalue.item()))
        assert history[-1] <= 1e-3 < history[-2]


def test_floor_is_the_longer_of_moving_and_multiplying() -> None:
    rates = cost_model.Rates("toy", "", 10.0, {"tf32": 4.0, "bf16": 8.0})
    assert rates.seconds(cost_model.Cost(100.0, {"tf32": 8.0, "bf16": 8.0}, 1)) == 10.0
    assert rates.limit(cost_model.Cost(100.0, {"tf32": 8.0}, 1)) == "memory"
    assert rates.seconds(cost_model.Cost(10.0, {"tf32": 8.0, "bf16": 8.0}, 1)) == 3.0
    assert rates.limit(cost_model.Cost(10.0, {"tf32": 8.0}, 1)) == "arithmetic"
    hopper = cost_model.DEVICES["H200"].operations
    assert hopper["tf32x3"] * 3 == pytest.approx(hopper["tf32"]) and hopper["bf16"] == 989e12


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("AMD EPYC", None),
    ],
)
def test_a_spec_sheet_is_for_its_module_alone(device: str, expected: str | None) -> None:
    rates = cost_model.rates_of(device)
    assert (rates.name if rates else None) == expected


def test_the_table_says_what_it_is_and_has_every_row() -> None:
    table = cost_model.table(cost_model.DEVICES["H100"])
    assert "A model, not a measurement" in table
    without_norms = sum(not model.norms for model in FULL)
    assert table.count("\n| ") == 1 + len(FULL) * (4 + 4) - without_norms
    assert "3.35 TB/s" in table and "bf16 989 TFLOP/s" in table


def launches_of(operation: str, model: Model, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kernels that run when an operation serves the layers of a model."""
    from triton.runtime.interpreter import GridExecutor

    problem = make_problem(operation, model, torch.device("cpu"))
    launches = []
    run = GridExecutor.__call__
    monkeypatch.setattr(GridExecutor, "__call__", lambda self, *a, **k: launches.append(1) or run(self, *a, **k))
    problem.run("triton")
    return len(launches)


@pytest.mark.parametrize("operation", [name for name in cost_model.OPERATIONS if name != "covariance_ema"])
def test_launches_are_those_that_happen(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted on a model with one fused stack and one tiled stack."""
    model = Model("m", "", (Layer(rows=1024, inputs=16, outputs=80, bias=False),))
    launches = launches_of(operation, model, monkeypatch)
    torch_launches = 1 if operation == "precondition" else 0  # of the sum of partial products
    assert runtime.INTERPRETED
    counted = cost_model.OPERATIONS[operation](model).launches
    if operation == "factored_newton_refresh":  # which an optimizer calls with fewer steps than the problem does
        steps = inspect.signature(ops.factored_newton_refresh).parameters["max_steps"].default
        counted = cost_model.warm_inverses(model, launched=steps).launches
    assert launches + torch_launches == counted


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ((Layer(64, 16, 80, bias=False),), 1),
        ((Layer(1024, 16, 80, bias=False),), 1),  # many tiles
        ((Layer(1024, 16, 16, bias=False),), 2),  # few: rows are split
        ((Layer(1024, 17, 16, bias=False),), 4),  # columns of two kinds
        ((convolution(Images(2, 8, 4, 3, 1, 1), 16),), 2),  # patches, and images as they lie
        ((convolution(Images(2, 8, 4, 1), 16), convolution(Images(2, 8, 3, 1), 16)), 2),  # 9 positions are copied one by one
    ],
)
def test_launches_of_covariances(layers: tuple[Layer, ...], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model("m", "", layers, itemsize=4)
    target = runtime.target(torch.device("cpu"))
    counted = cost_model.statistics(model, Card(target.arch, target.processors)).launches
    assert counted == launches_of("covariance_ema", model, monkeypatch) == expected


def test_rows_of_many_layers_wait_for_each_other_up_to_a_limit() -> None:
    """Rows of 2 * (16 + 16) numbers in 16 bits take 128 bytes."""
    layers = (Layer(2, 16, 16, count=5),)
    assert [len(batch) for batch in batches(layers, 2, 256)] == [3, 2]
    assert [len(batch) for batch in batches(layers, 2, 0)] == [1] * 5
    assert [len(batch) for batch in batches(layers, 2, 10**6)] == [5]
