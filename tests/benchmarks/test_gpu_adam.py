"""What `make gpu` measures of KFACAdam: its operations, a refresh, a step, training; on toys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adam_tiles import by_formula

from benchmarks.gpu import adam_tiles, checks, engines, merging, refreshes, report, steps, tables, training
from benchmarks.gpu.findings import Bench, is_bad
from benchmarks.gpu.others import Bases, compete
from benchmarks.gpu.training_problems import TrainingProblem
from kfac_triton.curvature.eigenvectors import Eigenvectors
from kfac_triton.kernels import ops

CPU = torch.device("cpu")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "a part", device="cpu", quick=True)


@pytest.fixture
def tiles() -> adam_tiles.AdamTiles:
    torch.manual_seed(0)
    return adam_tiles.AdamTiles("tiles", (5, 9), CPU)


# Checks.


def test_directions_are_compared_with_the_formula(tiles: adam_tiles.AdamTiles) -> None:
    """With the one that other tests have, a number at a time."""
    for i in (0, 1, 3):
        (m, n), stack, place = tiles.sizes[i], i // 2, i % 2
        given = [x[stack][place, :m, :n].tolist() for x in (tiles.rotated, *tiles.starts)]
        right = by_formula(*given, 3.0, tiles.noise[i].tolist(), tiles.options[i].tolist())
        torch.testing.assert_close(tiles.exact[i][0], right, rtol=1e-12, atol=1e-12)
    assert tiles.check("torch") <= tiles.allowed / 10


def test_what_is_wrong_with_tiles_is_seen(tiles: adam_tiles.AdamTiles) -> None:
    tiles.check("torch")
    right = tiles.error()
    for tensor, place, wrong in (
        (tiles.out[0], (0, 0, 0), 1.01),
        (tiles.means[1], (1, 2, 3), 1.01),  # of the tile that is not accepted
        (tiles.squares[0], (1, 4, 8), math.nan),
    ):
        kept = float(tensor[place])
        tensor[place] *= wrong
        assert not tiles.is_right(tiles.error())
        tensor[place] = kept
        assert tiles.error() == right
    tiles.out[0][0, 6, 0] = 1e-30
    assert tiles.error() == math.inf, "padding"
    tiles.check("torch")
    tiles.steps[-1] += 1
    assert tiles.error() == math.inf, "a step more of a tile that is not accepted"


def test_both_operations_are_checked(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "kernel_obstacle", lambda problem: "no kernels here")  # other tests have the interpreter
    checks.run(bench, ["bases", "adam"])
    assert [line["what"] for line in bench.said] == ["orthogonal_iteration of stacks", "adam_direction of tiles"]
    assert all(line["verdict"] == "right" and line["repeats"] for line in bench.said)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_engines_of_kfacadam_agree(bench: Bench, monkeypatch: pytest.MonkeyPatch, is_wrong: bool) -> None:
    """A step in the wrong direction is too short to be seen in factors or loss."""
    monkeypatch.setattr(engines, "STEPS", 2)
    direct, backends = ops.adam_direction, set()

    def other_way(*arguments: Any, backend: str) -> None:
        direct(*arguments, backend=backend)
        backends.add(backend)
        if is_wrong and backend == "auto":
            torch._foreach_neg_(arguments[3])

    monkeypatch.setattr(ops, "adam_direction", other_way)
    checks.run(bench, ["engine:adam"])
    (line,) = bench.said
    assert backends == {"auto", "torch"} and line["factors_off"] < engines.ALLOWED_FACTORS
    assert line["verdict"] == ("WRONG" if is_wrong else "right")


# A refresh.


def test_a_refresh_is_raced_by_the_library(bench: Bench) -> None:
    refreshes.run(bench, ["of no account where sizes are toys"])
    assert not any(is_bad(line) for line in bench.said)
    timed = {line["what"].partition(": ")[2] for line in bench.said if "ms" in line}
    others = {"QR of A Q", "QR of A Q, loop", "Cholesky-QR twice", "eigh", "inverse by Cholesky"}
    assert timed >= others | {tables.REFERENCE}
    found = tables.races([line | {"part": "ops", "run": "1"} for line in bench.said])
    assert set(found) == {("orthogonal_iteration", "quick_perceptron"), ("orthogonal_iteration", "quick_convolutions")}


def test_wrong_contestants_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library whose results are a hundredth too large."""
    torch.manual_seed(0)
    problem = Bases("toy", {16: 2}, CPU)
    contestants = list(refreshes.library(problem))
    assert not any("not_timed" in row for row in compete(problem, contestants, 0.0))
    qr, eigh, divide, invert = torch.linalg.qr, torch.linalg.eigh, torch.linalg.solve_triangular, torch.cholesky_inverse
    monkeypatch.setattr(torch.linalg, "qr", lambda x: [1.01 * q for q in qr(x)])
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: [1.01 * q for q in eigh(x)])
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *given, **options: 1.01 * divide(*given, **options))
    monkeypatch.setattr(torch, "cholesky_inverse", lambda x: 1.01 * invert(x))
    rows = compete(problem, contestants, 0.0)
    assert len(rows) == 5 and all("the result is wrong" in row["not_timed"] for row in rows)


def test_measures_of_the_library() -> None:
    turn = torch.tensor([[[0.8, -0.6], [0.6, 0.8]]])
    assert refreshes.off_diagonal(torch.diag(torch.tensor([1.0, 0.0]))[None], turn) == pytest.approx(0.48 * 2**0.5)
    assert refreshes.off_diagonal(torch.eye(2)[None], 2 * turn) == pytest.approx(3 * 2**0.5), "not orthonormal"
    matrix = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    assert refreshes.of_inverse(matrix, 2 * torch.linalg.inv(matrix)) == pytest.approx(1.0)
    assert torch.equal(refreshes.shifted(matrix, 0.5), torch.tensor([[[3.0, 1.0], [1.0, 3.0]]]))


# A step.


def test_steps_without_and_with_a_refresh(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 2, 12 and 4 ms: one refresh in ten steps takes 4.8."""
    times, seen, refreshed = iter((2.0, 12.0, 4.0)), [], []
    refresh = Eigenvectors.refresh
    monkeypatch.setattr(Eigenvectors, "refresh", lambda *arguments: (refreshed.append(1), refresh(*arguments)))

    def clock(bench: Bench, step: Any, seconds: float) -> tuple[float, float]:
        refreshed.clear()
        for _ in range(3):
            step()
        seen.append(len(refreshed))
        return next(times), 1.0

    monkeypatch.setattr(steps, "clock", clock)
    steps.run_adam(bench, ["autoencoder"])
    assert seen == [0, 3, 0]
    _, fresh, plain, tenth = bench.said
    assert fresh["first_step_s"] > 0 and "worst_residual" in fresh
    assert [line["ms"] for line in bench.said] == [2.0, 12.0, 4.0, pytest.approx(4.8)]
    assert [line["over_AdamW"] for line in bench.said] == [1.0, 6.0, 2.0, pytest.approx(2.4)]
    assert tenth["what"] == "autoencoder: KFACAdam, tf32, a refresh in 10 steps" and tenth["part"] == "step"
    (group,) = tables.step_groups([line | {"run": "1"} for line in bench.said]).values()
    assert [line["over"] for line in group] == [1.0, 6.0, 2.0, pytest.approx(2.4)]
    assert plain["what"] == "autoencoder: KFACAdam, tf32, no refresh"


def test_a_step_that_fails_leaves_the_other_tasks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = steps._measure_adam

    def fail(bench: Bench, what: str, *arguments: Any) -> None:
        if what.startswith("autoencoder"):
            raise RuntimeError("out of memory")
        measure(bench, what, *arguments)

    monkeypatch.setattr(steps, "_measure_adam", fail)
    steps.run_adam(bench, ["autoencoder", "gpt"])
    assert [line["what"] for line in bench.said if "FAILED" in line] == ["autoencoder: KFACAdam, tf32"]
    assert bench.said[-1]["what"] == "gpt: KFACAdam, tf32, a refresh in 10 steps"


# Training.


def test_kfacadam_races_against_the_adamw_of_an_earlier_part(bench: Bench) -> None:
    training.run_adam(bench, ["text"])
    assert "skipped" in bench.said[-1] and not is_bad(bench.said[-1])
    training.run(bench, ["text"])
    before = len(bench.said)
    training.run_adam(bench, ["text"])
    goal = next(line["loss"] for line in bench.said if line["what"] == "text: best AdamW")
    runs = json.loads((bench.folder / "train_text.json").read_text())
    own = [run for run in runs if run["kind"] == "KFACAdam"]
    assert [run["config"] for run in own] == [{"lr": 0.016}] * 2 and {"AdamW", "K-FAC"} <= {run["kind"] for run in runs}
    verdicts = [line for line in bench.said[before:] if line["what"].startswith("text: KFACAdam to")]
    for line, run in zip(verdicts, own, strict=True):
        hit = training.reached([tuple(point) for point in run["curve"]], goal)
        assert (line["of_steps"] == hit[0] / 6) if hit else (line["reached"] == "no")


def test_the_best_adamw_is_that_with_the_least_last_loss() -> None:
    ends = {"AdamW": (2.0, math.nan, 1.0, 3.0), "K-FAC": (0.5,)}
    kept = [{"kind": kind, "curve": [(6, 1.0, 0.1), (12, 2.0, end)]} for kind, losses in ends.items() for end in losses]
    assert training.best_of(kept) == [(6, 1.0, 0.1), (12, 2.0, 1.0)]
    assert training.best_of(kept[-1:]) is None and training.best_of([]) is None


def test_training_that_fails_is_said_and_the_next_problem_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    training.run(bench, ["text", "text_large"])
    before = len(bench.said)
    make, calls = TrainingProblem.optimizer, iter(range(10))

    def fail(self: TrainingProblem, *arguments: Any) -> torch.optim.Optimizer:
        if next(calls) < 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return make(self, *arguments)

    monkeypatch.setattr(TrainingProblem, "optimizer", fail)
    training.run_adam(bench, ["text", "text_large"])
    failed = [line["what"] for line in bench.said[before:] if "FAILED" in line]
    assert failed == ["text: KFACAdam {'lr': 0.016}"] * 2
    assert sum(line["what"].startswith("text_large: KFACAdam {") for line in bench.said[before:]) == 2


# The report.


def test_the_report_has_kfacadam_beside_the_others(bench: Bench, tmp_path: Path) -> None:
    """In the tables of the parts that its findings belong to."""
    for part, what, facts in (
        ("ops", "orthogonal_iteration gpt2: kernel", {"ms": 2.0, "eager_ms": 3.0, "error": 1e-6}),
        ("ops", "orthogonal_iteration gpt2: eigh", {"not_timed": "takes too long"}),
        ("ops", "orthogonal_iteration gpt2: QR of A Q", {"ms": 9.0, "eager_ms": 9.0, "error": 1e-6}),
        ("train", "vit: best AdamW", {"loss": 0.5, "steps": 100, "s": 2.0}),
        ("train", "vit: KFACAdam {'lr': 0.016}", {"steps": 50, "s": 1.5, "ms_a_step": 30.0, "loss": 0.3, "least": 0.3}),
        ("train", "vit: KFACAdam to 0.5", {"of_steps": 0.3, "of_seconds": 0.45}),
        ("smoke", "engine adam", {"factors_off": 1e-4, "way_off": 0.1, "parameters_off": 1e-3, "loss": 1.0, "loss_torch": 1.0}),
    ):
        bench.say(what, part=part, **facts)
    page = report.markdown(merging.merge([tmp_path / "hour.jsonl"]), "Some GPU 9000", "2030-01-03")
    run = tmp_path.name
    assert f"| gpt2 | 2 | - | - | 9 (4.5) | {run} |" in page and "- gpt2, eigh: none: takes too long" in page
    assert "| KFACAdam {'lr': 0.016} | 50 | 1.5 | 30 | 0.3 | 0.3 | 0.3 | 0.45 | - |" in page
    assert "| engine adam | 1.0e-04 | 0.001 | 1 | 1 |" in page
