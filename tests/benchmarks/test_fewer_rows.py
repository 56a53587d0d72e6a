"""`python -m benchmarks.convergence.fewer_rows`: what it compares, its statistics, and the program in miniature."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch.nn.functional as F

from benchmarks.convergence import choices, fewer_rows, problems, tasks
from benchmarks.convergence.choices import CONTROL, EVERYTHING
from benchmarks.convergence.contest import CONTEST
from benchmarks.convergence.differences import differences, student
from benchmarks.convergence.log import Log
from benchmarks.convergence.optimizers import KFAC_NAME, make_kfac
from benchmarks.convergence.training import train

COMPARED = [problems.BY_NAME[name] for name in fewer_rows.NAMES]
QUICK = {problem.name: problem.miniature() for problem in COMPARED}
MINIATURE = ["--quick", "--quiet", "--problem", "text-large", "--seeds", "0", "1"]


# What is compared.


@pytest.mark.parametrize("problem", COMPARED, ids=lambda problem: problem.name)
def test_choices_differ_and_start_with_the_reference(problem: problems.Problem) -> None:
    if not problem.is_text:
        pytest.importorskip("mlxtend")
    found = choices.choices(problem)
    assert found[0].name == EVERYTHING and CONTROL in [choice.name for choice in found]
    reference = found[0]
    assert (reference.rows, reference.block) == (choices.rows_of(problem), reference.size)
    assert len({choice.name for choice in found}) == len({str(sorted(c.config.items())) for c in found}) == len(found)
    assert min(choice.rows_per_size for choice in found) < 1, "too few rows is among what is tried"
    assert all(isinstance(choice.config[name], (int, float)) for choice in found for name in ("lr", "damping"))
    assert [choice.name for choice in found if choice.config["stats_fraction"] == "auto"] == [choices.DEFAULT]


@pytest.mark.parametrize("name", ["text-large", "vit-large"])
def test_the_reference_has_the_settings_of_the_race(name: str) -> None:
    """But for those that are stated beside its figures."""
    fixed, base = CONTEST[name][KFAC_NAME].fixed, choices.BASE[name]
    assert {key for key in base if base[key] != fixed.get(key)} <= {"lr", "damping", "weight_sharing"}
    assert (base["lr"], base["ema_decay"]) == (6e-3, 0.8 if name == "text-large" else 0.95)
    assert base["damping"] == (1e-3 if name == "text-large" else 3e-4)
    assert base.get("weight_sharing", "expand") == "expand"


@pytest.mark.parametrize("name", fewer_rows.NAMES)
def test_rows_and_blocks_are_those_of_kfac(name: str) -> None:
    problem = QUICK[name]
    if not problem.is_text:
        pytest.importorskip("mlxtend")
    inputs, targets = next(problem.batches(0))
    for choice in choices.choices(problem):
        model = problem.build(0)
        with make_kfac(model, choice.config) as optimizer:
            F.cross_entropy(model(inputs), targets).backward()
            engine = optimizer.engine
            number = [layer.name for layer in engine.layers].index("blocks.0.mlp.0")
            assert engine.collector.statistics[number].rows_taken == choice.rows, choice.name
            largest = max(p.size for p in engine.partition.parts if not p.diagonal)
            if choice.block < choice.size:
                assert largest <= choice.block or name == "vit-large", choice.name


# Statistics.


def test_quantiles_of_student() -> None:
    known = {4: 2.776, 6: 2.447, 10: 2.228, 24: 2.064, 60: 2.000}
    for freedom, quantile in known.items():
        assert student(0.975, freedom) == pytest.approx(quantile, rel=0.01)
    assert student(0.975, 10**9) == pytest.approx(1.959964, abs=1e-5)


def test_differences_are_relative_and_within_seeds() -> None:
    reference = [1.0, 2.0, 4.0]
    found = differences([reference, [1.1 * x for x in reference], [0.9 * x for x in reference]])
    assert found.means == pytest.approx([0.0, math.log(1.1), math.log(0.9)])
    assert found.spread == pytest.approx(math.log(2))
    assert found.detectable == pytest.approx(0.0, abs=1e-9), "the seeds alone differ"


def test_what_is_detectable_is_the_least_significant_difference() -> None:
    """By hand: residuals are +-d/4, their mean square is d^2/4 with one degree of freedom."""
    d = 0.02
    found = differences([[1.0, 1.0], [1.0, math.exp(d)]])
    assert found.means == pytest.approx([0.0, d / 2])
    assert found.detectable == pytest.approx(student(0.975, 1) * d / 2)


def test_diverged_choices_are_left_out_and_one_seed_tells_nothing() -> None:
    found = differences([[1.0, 2.0], [math.inf, 2.0], [1.0, 2.1]])
    assert found.means[1] is None and found.detectable is not None and math.isfinite(found.detectable)
    losses = [[1.0, 1.0], [1.0, 1.1], [1.0, 1.0]]
    assert differences(losses, uncounted=[2]).detectable == differences(losses[:2]).detectable
    alone = differences([[1.0], [2.0]])
    assert alone.means[1] == pytest.approx(math.log(2)) and alone.detectable is None and alone.spread == 0
    with pytest.raises(ValueError, match="the reference must have finite losses"):
        differences([[math.inf], [1.0]])


# The program.


def test_a_stopped_comparison_shows_what_is_finished_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple] = []
    stop_after = 5

    def counted(*arguments):
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(tasks, "train", counted)
    log = tmp_path / "log.json"
    assert fewer_rows.main([*MINIATURE, "--log", str(log)]) == fewer_rows.INTERRUPTED
    printed = capsys.readouterr().out
    assert "Stopped; 5 runs are in" in printed
    first, second, third = (choice.name for choice in choices.choices(QUICK["text-large"])[:3])
    assert first in printed and second in printed and third not in printed, "one seed of a choice is no row"

    made.clear()
    stop_after = -1
    assert fewer_rows.main([*MINIATURE, "--log", str(log)]) == 0
    printed = capsys.readouterr().out
    compared = choices.choices(QUICK["text-large"])
    assert len(made) == 2 * len(compared) - 5
    rows = {re.split(r"\s{2,}", line.strip())[0]: line for line in printed.splitlines()}
    assert all(choice.name in rows for choice in compared)
    for choice, row in ((choice, rows[choice.name]) for choice in compared):
        finals = [run.final for run in Log(log).runs if run.config == choice.config]
        assert ", ".join(f"{loss:.4g}" for loss in finals) in row
    assert "is told from chance (95 %) if it exceeds" in printed

    made.clear()
    assert fewer_rows.main([*MINIATURE, "--log", str(log)]) == 0
    assert not made and capsys.readouterr().out == printed


def test_differences_that_exceed_chance_are_marked() -> None:
    found = differences([[1.0, 2.0, 4.0], [1.5, 3.0, 6.01], [1.0, 2.001, 4.0]])
    assert found.detectable is not None
    assert fewer_rows._difference(found, 0) == ["", ""]
    assert fewer_rows._difference(found, 1)[0] == "+40.6 % *"
    assert fewer_rows._difference(found, 2)[0] == "+0.0 %"


def test_bad_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        fewer_rows.main(["--problem", "resnet"])
    assert "argument --problem: invalid choice: 'resnet'" in capsys.readouterr().err
