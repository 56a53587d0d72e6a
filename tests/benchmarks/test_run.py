"""The benchmark runner from end to end on toy sizes: what it writes, and what gets no time."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from benchmarks import report, run
from benchmarks.kernels import contestants as kernel_contestants
from benchmarks.kernels import timing as kernel_timing
from benchmarks.kernels.contestants import Contestant, contestants, make_problem
from benchmarks.kernels.cost_model import DEVICES, OPERATIONS
from benchmarks.kernels.shapes import QUICK, Model
from benchmarks.steps import timing as step_timing
from kfac_triton.cli.tuning.checks import Problem
from kfac_triton.kernels import operators

CPU = torch.device("cpu")
RATES = DEVICES["H100"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    assert run.main(["--device", "cpu", "--quick", "--output", str(folder)]) == 0
    return folder


def test_everything_is_written(results: Path) -> None:
    written = {path.name for path in results.iterdir()}
    assert written == {"results.json", "results.md"} | ({"kernels.png"} if importlib.util.find_spec("matplotlib") else set())


def test_every_operation_of_every_model_is_raced(results: Path) -> None:
    found = json.loads((results / "results.json").read_text())
    assert [(group["model"], group["operation"]) for group in found["kernels"]] == [
        (model.name, operation) for model in QUICK for operation in OPERATIONS
    ]
    for group in found["kernels"]:
        for row in group["rows"]:
            assert ("best_seconds" in row) != ("not_timed" in row)
            if "best_seconds" in row:
                assert row["error"] <= row["allowed"] and row["eager_seconds"] > 0
        assert next(row for row in group["rows"] if row["contestant"] == "torch reference")["share_of_floor"] > 0


def test_nothing_is_called_a_gpu_figure(results: Path) -> None:
    found = json.loads((results / "results.json").read_text())
    assert found["machine"]["kind"].startswith("CPU")
    page = (results / "results.md").read_text()
    assert "Measured on this CPU" in page and "graph_seconds" not in json.dumps(found)
    for group in found["kernels"]:  # the interpreter's times mean nothing
        kernel = next(row for row in group["rows"] if row["contestant"] == "kernel")
        assert "interpreter" in kernel["not_timed"]


def test_kernels_are_checked_first(results: Path) -> None:
    checks = json.loads((results / "results.json").read_text())["checks"]
    assert len(checks) == 10
    assert all(": right, error" in line for line in checks)


def test_steps_are_raced_against_adamw(results: Path) -> None:
    found = json.loads((results / "results.json").read_text())
    assert [group["task"] for group in found["steps"]] == ["autoencoder", "gpt"]
    for group in found["steps"]:
        rows = {row["contestant"]: row for row in group["rows"]}
        assert rows["AdamW"]["over_baseline"] == 1.0
        assert rows["K-FAC, all every step"]["step_seconds"] > 0 and rows["K-FAC, all every 10"]["step_seconds"] > 0
        assert len({row["first_loss"] for row in rows.values() if "first_loss" in row}) == 1, "different starts"


def test_all_contestants_are_right_on_every_layer_set() -> None:
    """What a user would write computes the same as the operation."""
    for operation in OPERATIONS:
        for model in QUICK:
            problem = make_problem(operation, model, CPU)
            names = []
            for contestant in contestants(problem):
                if contestant.obstacle is None:
                    if contestant.prepare is not None:
                        contestant.prepare()
                    contestant.run()
                    assert problem.is_right(contestant.error()), (operation, model.name, contestant.name)
                    names.append(contestant.name)
            assert len(names) >= 3


def test_what_a_call_takes_by_itself_races_too_where_it_is_not_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = dataclasses.replace(operators.OPERATORS["precondition"], prefers_library=lambda device: True)
    problem = make_problem("precondition", QUICK[0], CPU)
    assert kernel_contestants.LIBRARY not in {contestant.name for contestant in contestants(problem)}
    monkeypatch.setitem(operators.OPERATORS, "precondition", operator)
    calls: list[str] = []
    monkeypatch.setattr(Problem, "run", lambda problem, backend="auto": calls.append(backend))
    found = {contestant.name: contestant for contestant in contestants(problem)}
    found[kernel_contestants.LIBRARY].run()
    assert calls == ["auto"]


def race_of(monkeypatch: pytest.MonkeyPatch, *others: Contestant) -> dict[str, kernel_timing.Row]:
    def with_others(problem: Problem) -> list[Contestant]:
        return [*kernel_contestants.contestants(problem), *others]

    monkeypatch.setattr(kernel_timing, "contestants", with_others)
    rows = kernel_timing.race("precondition", QUICK[0], CPU, RATES, seconds=0.01)
    return {row["contestant"]: row for row in rows}


def fail() -> None:
    raise RuntimeError("no such solver\nwith details")


@pytest.mark.parametrize("error", [1.0, float("nan"), float("inf")])
def test_no_time_for_a_wrong_result(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = race_of(monkeypatch, Contestant("wrong", lambda: None, lambda: error))
    assert "the result is wrong" in rows["wrong"]["not_timed"]
    assert not any(key.endswith("seconds") for key in rows["wrong"] if key != "floor_seconds")
    line = next(line for line in report.kernel_table(list(rows.values())).splitlines() if line.startswith("| wrong"))
    assert "not timed: the result is wrong" in line
    assert rows["bmm"]["best_seconds"] > 0


def test_the_others_race_on_when_one_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    unable = Contestant("unable", lambda: pytest.fail("was run"), lambda: 0.0, obstacle="too large")
    rows = race_of(monkeypatch, Contestant("failing", fail, lambda: 0.0), unable)
    assert rows["failing"]["not_timed"] == "RuntimeError: no such solver"
    assert rows["unable"]["not_timed"] == "too large"
    assert rows["matmul loop"]["best_seconds"] > 0


def test_an_error_while_a_graph_is_recorded_leaves_the_eager_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(run: object, device: torch.device) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nwith details")

    monkeypatch.setattr(kernel_timing, "captured", refuse)
    rows = race_of(monkeypatch)
    assert rows["bmm"]["no_graph"] == "RuntimeError: operation not permitted when stream is capturing"
    assert rows["bmm"]["best_seconds"] == rows["bmm"]["eager_seconds"] > 0
    line = next(line for line in report.kernel_table(list(rows.values())).splitlines() if line.startswith("| bmm"))
    assert "operation not permitted" in line and f"{1e3 * rows['bmm']['eager_seconds']:.3f}" in line


def test_a_replay_that_fails_leaves_the_eager_time_and_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_timing, "captured", lambda run, device: fail)
    rows = race_of(monkeypatch)
    assert rows["bmm"]["no_graph"] == "RuntimeError: no such solver"
    assert "graph_seconds" not in rows["bmm"] and rows["bmm"]["rounds"] >= 3 and rows["matmul loop"]["eager_seconds"] > 0


def test_one_that_fails_later_keeps_the_times_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def fail_in_the_fourth() -> None:
        calls.append(1)
        if len(calls) == 4:  # the check, two rounds, and this
            fail()

    rows = race_of(monkeypatch, Contestant("tiring", fail_in_the_fourth, lambda: 0.0))
    assert len(calls) == 4
    assert rows["tiring"]["rounds"] == 2 and rows["tiring"]["eager_seconds"] > 0
    assert rows["tiring"]["not_timed"] == "RuntimeError: no such solver"
    assert rows["bmm"]["rounds"] >= 3


def test_results_are_written_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in one race ends no other, and one that ends the process leaves what was measured before."""
    monkeypatch.setattr(run, "_check", lambda device, report: False)
    monkeypatch.setattr(run.step_timing, "race", lambda task, seconds: fail())
    seen: list[list[str]] = []

    def race(operation: str, *rest: object) -> list[kernel_timing.Row]:
        found = json.loads((tmp_path / "results.json").read_text())
        seen.append([group["operation"] for group in found["kernels"]])
        if operation == "precondition":
            raise KeyboardInterrupt
        return [{"contestant": "kernel", "allowed": 1.0, "not_timed": "not here"}]

    monkeypatch.setattr(run.kernel_timing, "race", race)
    arguments = ["--device", "cpu", "--quick", "--models", QUICK[0].name, "--output", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        run.main(arguments)
    operations = list(OPERATIONS)
    assert seen == [operations[:i] for i in range(len(operations))]
    left_out = json.loads((tmp_path / "results.json").read_text())["left_out"]
    assert left_out[-2:] == [f"training step of {name}: RuntimeError: no such solver" for name in ("autoencoder", "gpt")]
    assert run.main([*arguments, "--operations", "covariance_ema"]) == 1, "an error must be an exit status"


def test_a_start_is_set_back_before_every_run_that_changes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    contestant = Contestant("c", lambda: events.append("run"), lambda: 0.0, lambda: events.append("prepare"), resets=True)
    race_of(monkeypatch, contestant)
    assert events == ["prepare", "run"] * (len(events) // 2) and len(events) >= 6


def test_a_loss_that_is_not_finite_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(task: step_timing.Task) -> step_timing.Step:
        return lambda: torch.tensor(float("nan"))

    monkeypatch.setattr(step_timing, "CONTESTANTS", {"AdamW": step_timing._adamw, "wild": diverge, "broken": fail})
    rows = step_timing.race(step_timing.autoencoder(CPU, quick=True), seconds=0.01)
    assert rows[0]["over_baseline"] == 1.0
    assert rows[1]["not_timed"] == "its loss is not finite" and "step_seconds" not in rows[1]
    assert rows[2]["not_timed"].startswith("TypeError")
    assert "not timed: its loss is not finite" in report.step_table(rows)


def test_what_does_not_fit_the_budget_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_check", lambda device, report: False)
    assert run.main(["--device", "cpu", "--quick", "--budget", "0", "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["kernels"] == found["steps"] == []
    left_out = " ".join(found["left_out"])
    assert "training step of gpt" in left_out and "precondition on quick_convolutions" in left_out


def test_a_wrong_kernel_is_an_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_check", lambda device, report: True)
    assert run.main(["--device", "cpu", "--quick", "--budget", "0", "--output", str(tmp_path)]) == 1


def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        run.parse(["--device", "cuda"])
    assert "no GPU here; give --device cpu --quick" in capsys.readouterr().err


def test_full_sizes_are_not_started_on_a_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.parse(["--device", "cpu"])
    assert "give --quick, or --models" in capsys.readouterr().err


def test_measured_rates_fit_every_cost() -> None:
    rates = kernel_timing.measured_rates(CPU, side=64, repeats=2)
    toy = Model("toy", "", QUICK[1].layers, itemsize=2)
    assert all(0 < rates.seconds(count(toy)) < float("inf") for count in OPERATIONS.values())
    assert "measured in this run" in rates.source
