"""Diagnostics as flat numbers for loggers, and as lines of strict JSON."""

from __future__ import annotations

import json
import math
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import backward_of_mlp, mlp
from torch import nn

import kfac_triton.scalars
from kfac_triton import KFAC
from kfac_triton.scalars import Log, append_log, read_log, scalars


class Writer:
    """As strict as a logger may be."""

    def __init__(self) -> None:
        self.written: dict[str, float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert type(tag) is str and type(value) is float and type(step) is int
        self.written[tag] = value


def trained() -> KFAC:
    model = mlp()
    optimizer = KFAC(model, lr=0.1)
    backward_of_mlp(model)
    optimizer.step()
    return optimizer


def strictly(line: str) -> dict:
    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_every_number_of_a_run_reaches_a_writer() -> None:
    diagnostics = trained().diagnostics()
    writer = Writer()
    for tag, value in scalars(diagnostics).items():
        writer.add_scalar(tag, value, diagnostics["steps"])
    for name, layer in diagnostics["layers"].items():
        for key, value in layer.items():
            assert writer.written[f"layers/{name}/{key}"] == value
    assert writer.written["kl_clip_scale"] == diagnostics["kl_clip_scale"]
    assert (writer.written["skipped"], writer.written["without_statistics"]) == (0, 0)


def test_unknown_keys_flow_through_and_texts_are_counted() -> None:
    diagnostics = {
        "novel": 3,
        "flag": True,
        "on_device": torch.tensor(2.5),
        "mode": "fast",
        "nothing": None,
        "memory": {"factors": 10, "shards": {"first": 4}},
        "skipped": {"norm": "not supported", "table": "frozen"},
        "without_statistics": ["a", "b", "c"],
        "layers": {"encoder.0": {"trace_A": 1.2, "novel": math.inf, "rows": [1, 2]}},
    }
    assert scalars(diagnostics) == {
        "novel": 3,
        "flag": 1,
        "on_device": 2.5,
        "memory/factors": 10,
        "memory/shards/first": 4,
        "skipped": 2,
        "without_statistics": 3,
        "layers/encoder.0/trace_A": 1.2,
        "layers/encoder.0/novel": math.inf,
        "layers/encoder.0/rows": 2,
    }


def test_a_model_that_is_itself_a_layer_has_a_name() -> None:
    diagnostics = KFAC(nn.Linear(3, 2)).diagnostics()
    assert list(diagnostics["layers"]) == [""]
    assert "layers/root/trace_A" in scalars(diagnostics)
    assert not [name for name in scalars(diagnostics) if "//" in name]


def test_a_log_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    optimizer = trained()
    append_log(path, KFAC(mlp()).diagnostics(), step=0)  # residuals are still infinite
    append_log(str(path), optimizer.diagnostics(), step=1, loss=torch.tensor(0.5), losses=[math.nan, -math.inf, 1.0])
    first, second = map(strictly, path.read_text().splitlines())
    assert first["layers"]["0"]["residual_A"] is None
    assert ["layers", "0", "residual_A"] in first["non_finite"]["inf"]
    assert second["losses"] == [None, None, 1.0]

    log = read_log(path)
    assert log.unfinished is None
    assert log.entries[0]["layers"]["0"]["residual_A"] == math.inf
    losses = log.entries[1].pop("losses")
    assert math.isnan(losses[0]) and losses[1:] == [-math.inf, 1.0]
    assert log.entries[1] == {"step": 1, "loss": 0.5, **optimizer.diagnostics()}


@pytest.mark.parametrize(
    ("extra", "error", "message"),
    [
        ({"steps": 3}, ValueError, "extra: 'steps' would replace a value of the diagnostics; choose another name"),
        ({"non_finite": 3}, ValueError, "extra: 'non_finite' would replace"),
        ({"outputs": torch.ones(2)}, TypeError, "outputs is a tensor of 2 numbers, which cannot be logged; give"),
        ({"model": {"inner": mlp}}, TypeError, "model/inner is of type function, which cannot be logged; give"),
    ],
)
def test_what_cannot_be_logged_leaves_the_log_alone(tmp_path: Path, extra: dict, error: type, message: str) -> None:
    path = tmp_path / "run.jsonl"
    with pytest.raises(error, match=message):
        append_log(path, {"steps": 1}, **extra)
    assert not path.exists()


@pytest.mark.parametrize("function", [scalars, lambda given: append_log("run.jsonl", given)])
def test_the_optimizer_in_place_of_its_diagnostics_is_named(
    function: Callable[[Any], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match=r"diagnostics must be a dict, but is KFAC; pass optimizer.diagnostics\(\)"):
        function(KFAC(mlp()))
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: the folder of .* does not exist; create it first"):
        append_log(tmp_path / "missing" / "run.jsonl", {"steps": 1})


def test_names_of_the_arguments_are_free_for_values(tmp_path: Path) -> None:
    append_log(tmp_path / "run.jsonl", {"steps": 1}, path="a", diagnostics=2)
    assert read_log(tmp_path / "run.jsonl").entries == [{"path": "a", "diagnostics": 2, "steps": 1}]


def test_a_resumed_run_replaces_the_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text('{"steps": 1}\n{"steps": 2, "lay')
    assert read_log(path) == Log([{"steps": 1}], unfinished=2)
    append_log(path, {"steps": 2})
    assert path.read_text() == '{"steps": 1}\n{"steps": 2}\n'

    path.write_text('{"steps": 1}')  # whole, but for its end
    assert read_log(path) == Log([{"steps": 1}])
    append_log(path, {"steps": 2})
    assert read_log(path) == Log([{"steps": 1}, {"steps": 2}])

    path.write_text("not a log")  # and not to be destroyed
    append_log(path, {"steps": 2})
    assert path.read_text() == 'not a log\n{"steps": 2}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\nloss 3\n{"a": 2}\n', r"line 2 is not JSON \(.*\); remove the line, or give a file that append_log wrote"),
        ('{"a": 1}\n\n{"a": \n', "line 3 is not JSON"),  # ended: not the work of a killed run
        ('{"a": 1}\nhello', "line 2 is not JSON"),
        ("3\n", "line 1 is not a JSON object; remove the line"),
        ('{"a": 1, "non_finite": {"inf": [["b", "c"]]}}\n', "line 1: 'non_finite' names values that the line does not have"),
        ('{"a": 1, "non_finite": 3}\n', "line 1: 'non_finite' names values"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log(tmp_path / "run.jsonl")


def test_no_logger_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)
    assert runpy.run_path(kfac_triton.scalars.__file__)["scalars"]({"steps": 1}) == {"steps": 1.0}
