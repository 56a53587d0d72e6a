"""The model of whole steps: its counts against loops and against the optimizer, its first column, its goals, its labels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.kernels import cost_model
from benchmarks.kernels.shapes import BY_NAME, Images, Layer, Model, Norm, autoencoder, convolution, padded
from benchmarks.steps import step_model, step_parts
from benchmarks.steps.step_constants import AFTER, BEFORE, ESTIMATES, GOALS, H100, H200, MEASURED, MS
from benchmarks.steps.workload import Options, Workload
from kfac_triton import KFACPreconditioner
from kfac_triton.kernels.precondition import library

COLUMNS = dict(step_model.columns())
EVERYTHING = COLUMNS["blocks to 1,024"]
SMALL = Model("small", "", (Layer(50, 20, 48, count=2), Layer(50, 48, 8, bias=False)), norms=(Norm(50, 48, count=3),))


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_first_column_is_what_was_estimated(name: str) -> None:
    found = step_model.step(name, COLUMNS["before"], H100).seconds / MS
    assert found == pytest.approx(ESTIMATES[name][0], rel=0.1)


@pytest.mark.parametrize("name", GOALS)
def test_the_goals_are_met_in_the_last_column(name: str) -> None:
    assert step_model.step(name, EVERYTHING, H100).seconds / MS <= GOALS[name]


def test_gpt2_does_not_meet_its_goal_without_blocks() -> None:
    """What the pages say: change them if this changes."""
    assert step_model.step("gpt2", COLUMNS["no idle writes"], H100).seconds / MS > GOALS["gpt2"]


def test_columns_switch_on_one_item_after_another() -> None:
    found = list(COLUMNS.values())
    assert found[0] == Options() and len(found) == len(step_model.ITEMS) + 1
    for earlier, later in pairwise(found):
        changed = [key for key in vars(later) if getattr(earlier, key) != getattr(later, key)]
        assert len(changed) == 1
    assert all(getattr(EVERYTHING, key) != value for key, value in vars(Options()).items())


@pytest.mark.parametrize("largest", [None, 64])
def test_factors_are_divided_as_the_optimizer_divides_them(largest: int | None) -> None:
    model = nn.Sequential(nn.Linear(192, 130), nn.Linear(130, 64, bias=False), nn.Conv2d(8, 72, 3))
    layers = (Layer(1, 192, 130), Layer(1, 130, 64, bias=False), convolution(Images(1, 8, 8, 3), 72, bias=True))
    ours = KFACPreconditioner(model, max_factor_size=largest, oversize="block")
    found = Workload(Model("m", "", layers), Options(largest=largest))
    expected: dict[int, int] = {}
    for part in ours.engine.partition.parts:
        expected[padded(part.size)] = expected.get(padded(part.size), 0) + 1
    assert found.stacks == expected
    tiles = [tuple(x.shape[1:]) for x in (stack.gradient for stack in ours.engine.curvature.gradients)]
    assert found.shapes == set(tiles)
    ours.close()


def test_a_side_above_the_default_limit_is_diagonal() -> None:
    work = Workload(BY_NAME["wide_block"], Options())
    assert work.stacks == {4096: 11}
    assert (4096, 0) in work.shapes and (0, 4096) in work.shapes
    assert Workload(BY_NAME["wide_block"], Options(largest=1024)).stacks == {1024: 44, 1008: 33}


def test_rows_that_wait_are_those_of_the_optimizer() -> None:
    """Few rows wait for the step, many are summed in the backward pass, and less of them wait again."""
    layer = nn.Linear(16, 32, bias=False)
    for rows, waits in ((26, True), (27, False)):
        ours = KFACPreconditioner(layer, inverse="factored", backend="triton")
        layer.zero_grad()
        # Rows of the user's own would be summed at once; those of a module before are the model's.
        x = torch.randn(rows, 16, requires_grad=True) * 1.0
        layer(x).square().mean().backward()
        assert bool(ours.engine.statistics[0].deferred) == waits
        ours.close()
        model = Model("m", "", (Layer(rows, 16, 32, bias=False),), itemsize=4)
        assert bool(Workload(model, Options()).waiting) == waits
        assert Workload(model, Options(stats_fraction=1 / 8)).waiting


def test_statistics_as_loops_count_them() -> None:
    work = Workload(SMALL, Options(stats_fraction=1 / 2))
    operations = elements = 0
    for layer in SMALL.layers:
        for _ in range(layer.count):
            for side in (layer.a_side, layer.g_side):
                operations += sum(2 * layer.rows for i in range(side) for j in range(i + 1))
                elements += side * side
    expected = operations / 2 / H100.covariance + 4 * 1.5 * elements / H100.bandwidth
    assert step_parts.statistics(work, H100) == pytest.approx(expected)


def test_convolutions_by_patches_and_by_rows() -> None:
    """A 3 x 3 kernel keeps its patches, a 1 x 1 kernel does not."""
    many = 10**6  # rows: what the factors themselves move is then nothing
    for kernel, share in ((3, 1.0), (1, 0.0)):
        layer = replace(convolution(Images(1, 16, 8, kernel), 16), rows=many)
        model = Model("m", "", (layer,))
        a, g = (cost_model.symmetric_rank_update(many, side) for side in (layer.a_side, layer.g_side))
        by_patches = step_parts.statistics(Workload(model, Options()), H100)
        by_rows = step_parts.statistics(Workload(model, Options(without_gather=True)), H100)
        assert by_patches == pytest.approx((a + g) / H100.patches, rel=0.01)
        assert by_rows == pytest.approx(share * a / H100.patches + ((1 - share) * a + g) / H100.covariance, rel=0.01)


def test_the_power_iteration_in_one_program_or_over_the_grid() -> None:
    model = Model("m", "", (Layer(10**6, 2048, 512, bias=False, count=3),))
    moved = {side: cost_model.power_iteration(side, 8).bytes for side in (2048, 512)}
    before = step_parts.power_iteration(Workload(model, Options()), H100)
    one_of_three = 1 - (1 - BEFORE.iterated) ** 3
    assert before == pytest.approx(one_of_three * sum(moved.values()) / H100.one_program)
    after = step_parts.power_iteration(Workload(model, Options(free_scale=True)), H100)
    rare = 1 - (1 - AFTER.iterated) ** 3
    spread = 3 * AFTER.iterated / H100.bandwidth
    assert after == pytest.approx(moved[2048] * spread + moved[512] * rare / H100.one_program)
    grouped = step_parts.power_iteration(Workload(model, Options(free_scale=True, grouped=True)), H100)
    assert grouped == pytest.approx(6 / 8 * sum(moved.values()) * spread)


def test_products_of_preconditioning_as_loops_count_them() -> None:
    work = Workload(BY_NAME["wide_block"], Options())
    gate, back = work.layers[1], work.layers[2]
    assert list(gate.tiles()) == [(0, 4096)] and list(back.tiles()) == [(4096, 0)]
    alone = Workload(replace(work.model, layers=(gate.layer,)), Options())
    operations = sum(2 * 11008 * 4096 * 4096 for _ in range(2)) * gate.layer.count  # V T^T and its product with T
    numbers = 11008 * 4096 * gate.layer.count
    # Two products read the root and a matrix and write another; so does the diagonal side, and <V, W> reads two.
    moved = 4 * (2 * 2 * numbers + 2 * 4096 * 4096 * gate.layer.count + 2 * numbers + 2 * numbers)
    expected = operations / H100.fp32_products + moved / H100.bandwidth
    assert step_parts.preconditioning(alone, H100) == pytest.approx(expected)
    fused = replace(alone, options=Options(fused_updates=True))
    assert step_parts.preconditioning(fused, H100) == pytest.approx(expected - 4 * 2 * numbers / H100.bandwidth)


def test_products_in_panels_are_those_that_are_asked_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operations and bytes of every product, of equal panels, and how many products there are."""
    found = {"operations": 0, "numbers": 0, "products": 0}
    bmm = torch.bmm

    def counted(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result = bmm(a, b) if out is None else bmm(a, b, out=out)
        found["operations"] += 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
        found["numbers"] += a.numel() + b.numel() + result.numel()
        found["products"] += 1
        return result

    monkeypatch.setattr(library, "_WORTH", 1e4)
    monkeypatch.setattr(library, "_MULTIPLE", 16)
    monkeypatch.setattr(torch, "bmm", counted)
    model = Model("m", "", (Layer(8, 64, 48, bias=False, count=2),))
    options = Options(tf32=True, grouped=True, fused_updates=True, in_panels=True)
    work = Workload(model, options)
    assert (library.panels(2, 48, 64), library.panels(2, 64, 48)) == (3, 4)
    gradient, left, right = torch.randn(2, 48, 64), torch.randn(2, 48, 48).tril(), torch.randn(2, 64, 64).tril()
    library.precondition_by_roots(gradient, left, right, torch.empty_like(gradient), None)
    expected = found["operations"] / H100.tf32_products + 4 * found["numbers"] / H100.bandwidth
    assert step_parts.preconditioning(work, H100) == pytest.approx(expected)
    assert found["products"] == 4 + step_parts.panel_operators(work)
    whole = replace(work, options=replace(options, in_panels=False))
    assert step_parts.operators(work) - step_parts.operators(whole) == step_parts.panel_operators(work)


def test_newton_steps_by_hand() -> None:
    """One factor of 80 and one of 48, with tiles of 64: three tiles and one."""
    model = Model("m", "", (Layer(8, 80, 48, bias=False),))
    steps = AFTER.steps
    for in_graph, launched in ((False, 4), (True, 8)):
        work = Workload(model, replace(EVERYTHING, largest=None), in_graph)
        cost = cost_model.warm_inverses(model, steps)
        multiplying = (2 * cost.operations["tf32x2"] + cost.operations["tf32"]) / (H100.newton * H100.tf32)
        moving = (cost.bytes + cost.scratch) / H100.bandwidth
        idle = (launched - steps) * 3 * (3 + 1) * H100.idle_program
        assert step_parts.newton_steps(work, H100) == pytest.approx(multiplying + moving + idle)


def test_a_fused_update_moves_less_than_adamws_operators() -> None:
    """Before, parameters and momentum were copied beside; now the difference of 20 and 7 numbers is taken off."""
    numbers = 2 * 48 * 21 + 8 * 48 + 3 * 2 * 48
    copied, fused = (step_parts.updates(Workload(SMALL, Options(fused_updates=x)), H100) for x in (False, True))
    assert copied == pytest.approx(4 * 4 * numbers / H100.bandwidth)
    assert fused == pytest.approx(-4 * 13 * numbers / H100.bandwidth)


def test_a_graph_has_no_host_and_more_launches() -> None:
    eager, graph = (step_model.step(name, Options(), H100) for name in ("autoencoder", "autoencoder, graph"))
    assert graph.host == 0 < eager.host
    assert graph.launches - eager.launches == len(Workload(autoencoder(), Options()).stacks) * 4 * 4
    assert eager.seconds == max(eager.device, eager.host) and graph.seconds == graph.device


def test_grouped_launches_do_not_grow_with_the_number_of_sides() -> None:
    def refresh(*sides: int) -> int:
        model = Model("m", "", tuple(Layer(8, side, side, bias=False) for side in sides))
        return step_parts.launches(Workload(model, EVERYTHING))[0]

    assert refresh(64) == refresh(64, 128, 2048)


def test_tables_say_that_they_are_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    step_model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("**A model, not a measurement.**")
    for name in ESTIMATES:
        assert f"| {name} | " in printed
    assert step_model.table(H200).count("\n| ") == len(H200.adamw_device)
    assert step_model.measured_table(H200).count("\n| ") == sum(map(len, MEASURED.values()))
    for block in printed.split("\n\n"):
        if block.startswith("|"):  # a table has as many cells in each row
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_page_has_the_figures_of_the_table() -> None:
    page = (Path(step_model.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    for line in step_model.table(H100).splitlines()[2:]:
        assert line.partition(" | ")[2] in page, "benchmarks/README.md has other figures: copy those of the program"
