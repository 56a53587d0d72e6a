"""`kfac-triton report`: the table, the panels, and what it says of logs that are none."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from support.helpers import batch_for_mlp, mlp
from torch import nn

from kfac_triton import KFAC
from kfac_triton.cli import arguments, main
from kfac_triton.cli.report import command as report
from kfac_triton.cli.report.command import columns_of, render, select_layers, signs
from kfac_triton.cli.report.picture import NOT_FINITE, as_size, figure_of, panels_of, steps_of
from kfac_triton.scalars import append_log, read_log

HEALTHY = {
    "trace_A": 4.0,
    "trace_G": 2.0,
    "damping_A": 0.1,
    "damping_G": 0.2,
    "condition_A": 41.0,
    "condition_G": 11.0,
    "residual_A": 1e-3,
    "residual_G": 2e-3,
    "cosine": 0.7,
    "pi": 1.5,
    "update_norm": 0.3,
    "gradient_norm": 0.2,
    "fallbacks_A": 0,
    "fallbacks_G": 0,
    "dropped_statistics": 0,
    "updates": 5,
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of four steps of training."""
    path = tmp_path_factory.mktemp("log") / "run.jsonl"
    torch.manual_seed(0)
    model = mlp()
    optimizer = KFAC(model, lr=0.1)
    for step in range(4):
        x, y = batch_for_mlp(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        append_log(path, optimizer.diagnostics(), loss=loss)
    return path


def entries(*layers: dict, **top: float) -> list[dict]:
    """One entry a layer state, of two layers of which the second stays healthy."""
    return [{"steps": n + 1, **top, "layers": {"in": layer, "out": HEALTHY}} for n, layer in enumerate(layers)]


def panels(figure) -> dict:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def lines(axes) -> dict:
    return {line.get_label(): line for line in axes.get_lines()}


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit, match="2"):
        main(["report", *arguments])
    return capsys.readouterr().err


def test_report_of_a_real_run(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("matplotlib.image")
    picture = tmp_path / "report.png"
    assert main(["report", str(log), "--output", str(picture)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "run.jsonl: step 4, entry 4 of 4" in printed.out
    assert re.search(r"^loss \S+, .*kl_clip_scale", printed.out, re.MULTILINE)
    table = {row.split()[0]: row.split() for row in printed.out.splitlines() if re.match(r"\d ", row)}
    last = read_log(log).entries[-1]["layers"]
    assert table.keys() == last.keys()
    for name, row in table.items():
        assert float(row[1]) == pytest.approx(last[name]["trace_A"], rel=0.01)
        assert float(row[3]) == pytest.approx(max(last[name]["condition_A"], last[name]["condition_G"]), rel=0.01)
    assert image.imread(picture).shape[0] > 500


def test_panels_of_a_real_run_hold_its_values(log: Path) -> None:
    pytest.importorskip("matplotlib")
    found = read_log(log).entries
    layers = [list(entry["layers"].values()) for entry in found]
    drawn = panels(figure_of(found, "title"))
    assert {"loss", "kl_clip_scale, damping", "condition", "residual", "cosine", "update_norm", "memory"} <= drawn.keys()
    loss = lines(drawn["loss"])["loss"]
    assert loss.get_xdata().tolist() == [1, 2, 3, 4]
    assert loss.get_ydata().tolist() == [entry["loss"] for entry in found]
    largest = [max(max(layer["residual_A"], layer["residual_G"]) for layer in entry) for entry in layers]
    assert lines(drawn["residual"])["largest"].get_ydata().tolist() == largest
    assert list(lines(drawn["residual"])["accepted up to 0.3"].get_ydata()) == [0.3, 0.3]
    condition = [sorted(max(layer["condition_A"], layer["condition_G"]) for layer in entry) for entry in layers]
    assert lines(drawn["condition"])["largest"].get_ydata().tolist() == [values[-1] for values in condition]
    assert lines(drawn["condition"])["median over layers"].get_ydata().tolist() == [values[1] for values in condition]
    for key in ("cosine", "update_norm"):
        for name, line in lines(drawn[key]).items():
            assert line.get_ydata().tolist() == [entry["layers"][name][key] for entry in found]
    bars = {bar.get_width() for bar in drawn["memory"].patches}
    assert bars == {size for size in found[-1]["memory"].values() if size}


def test_absent_keys_leave_no_panel() -> None:
    pytest.importorskip("matplotlib")
    bare = [{"layers": {"a": {"cosine": 0.5}}}, {"layers": {"a": {"cosine": 0.6}}}]
    assert list(panels(figure_of(bare, ""))) == ["cosine"]
    assert list(panels_of(entries(HEALTHY, damping=0.1))) == [
        "damping",
        "condition",
        "residual",
        "cosine",
        "update_norm",
    ]


def test_future_values_join_their_panels() -> None:
    """A loss of any name, the reduction ratio, a new condition and a new kind of memory."""
    pytest.importorskip("matplotlib")
    found = entries({**HEALTHY, "condition_joint": 99.0}, reduction_ratio=-0.5, held_out_loss=2.0)
    found[0]["memory"] = {"novel": 2048, "none": 0}
    drawn = panels(figure_of(found, ""))
    assert list(lines(drawn["loss"])) == ["held_out_loss"]
    assert list(lines(drawn["reduction_ratio"])) == ["reduction_ratio"]
    assert lines(drawn["condition"])["largest"].get_ydata().tolist() == [99.0]
    assert [label.get_text() for label in drawn["memory"].get_yticklabels()] == ["novel"]


def test_values_that_are_not_finite_are_marked_and_leave_the_others_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "run.jsonl"
    for loss, residual in ((1.0, 0.1), (math.nan, math.inf), (0.5, 0.2)):
        append_log(path, entries({**HEALTHY, "residual_A": residual})[0], loss=loss)
    found = read_log(path).entries
    drawn = panels(figure_of([{**entry, "steps": n} for n, entry in enumerate(found)], ""))
    assert lines(drawn["loss"])[NOT_FINITE].get_xdata() == [1]
    assert lines(drawn["residual"])[NOT_FINITE].get_xdata() == [1]
    assert lines(drawn["residual"])["largest"].get_ydata().tolist() == pytest.approx([0.1, math.nan, 0.2], nan_ok=True)
    assert NOT_FINITE not in lines(drawn["condition"])
    assert all(math.isfinite(bound) for bound in drawn["loss"].get_ylim())


def test_a_layer_without_statistics_is_not_marked() -> None:
    assert panels_of(entries({"updates": 0, "residual_A": math.inf}))["residual"] == {"largest": [0.002]}


def test_the_legend_of_many_layers_is_short() -> None:
    pytest.importorskip("matplotlib")
    many = [{"layers": {f"block.{n}": HEALTHY for n in range(100)}}] * 2
    figure = figure_of(many, "")
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert (names[0], names[-1], len(names)) == ("block.0", "block.99", 10)
    assert legend.get_title().get_text() == "some of 100 layers"


def test_a_layer_has_one_color_in_all_panels() -> None:
    pytest.importorskip("matplotlib")
    drawn = panels(figure_of(entries({"update_norm": 1.0}), ""))
    assert "in" not in lines(drawn["cosine"])
    assert lines(drawn["cosine"])["out"].get_color() == lines(drawn["update_norm"])["out"].get_color()


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1, 10], "linear"), ([1, 20], "log"), ([0, 1, 20], "linear"), ([-0.01, 0.9], "linear"), ([-1, 200], "symlog")],
)
def test_scales(values: list[float], scale: str) -> None:
    """Zeros and negative values are not lost on a logarithmic axis."""
    pytest.importorskip("matplotlib")
    found = [{"reduction_ratio": value, "layers": {"a": HEALTHY}} for value in values]
    assert panels(figure_of(found, ""))["reduction_ratio"].get_yscale() == scale
    assert panels(figure_of(found, ""))["residual"].get_yscale() == "log", "the dashed line at 0.3 counts too"


def test_steps() -> None:
    assert steps_of([{"steps": 5}, {"eval_loss": 1}, {"steps": 7, "step": 10}]) == [5, 5, 10]
    assert steps_of([{}, {}]) == [1, 2]


def test_a_line_breaks_where_a_run_was_resumed() -> None:
    pytest.importorskip("matplotlib")
    found = [{"steps": step, "loss": float(step), "layers": {"a": HEALTHY}} for step in (1, 2, 3, 2, 3)]
    loss = lines(panels(figure_of(found, ""))["loss"])["loss"]
    assert loss.get_xdata().tolist() == [1, 2, 3, 2, 2, 3]
    assert [math.isnan(value) for value in loss.get_ydata()] == [False, False, False, True, False, False]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, []),
        ({"residual_A": 0.4}, ["residual_A above 0.3"]),
        ({"residual_A": math.inf}, ["residual_A not finite"]),
        ({"cosine": -0.1}, ["update points uphill"]),
        ({"cosine": 0.995}, ["close to gradient descent: cosine above 0.99"]),
        ({"damping_A": 5.0}, ["damping_A exceeds trace_A"]),
        ({"damping_A": 5.0, "damping_G": 5.0}, ["close to gradient descent: damping exceeds the trace"]),
        ({"damping_A": 5.0, "condition_A": 1.0}, []),  # a constant input has nothing to damp
        ({"trace_G": 0.0}, ["trace_G is zero"]),
        ({"gradient_norm": 0.0, "cosine": 0.0}, ["gradient is zero"]),
        ({"raised_G": 2, "fallbacks_G": 3}, ["damping_G raised tenfold, 2 times", "fallbacks G: 3"]),
        ({"dropped_gradients": 4, "residual_G": 0.5}, ["residual_G above 0.3", "dropped gradients: 4"]),
        ({"updates": 0, "residual_A": math.inf}, ["no statistics yet"]),
    ],
)
def test_signs(change: dict, words: list[str]) -> None:
    assert [text for _, text in signs(HEALTHY | change)] == words


def test_the_worst_layer_comes_first() -> None:
    layers = {"fine": HEALTHY, "damped": HEALTHY | {"damping_A": 9.0}, "broken": HEALTHY | {"residual_A": math.inf}}
    text = render([{"layers": layers}, {"eval_loss": 1.0, "layers": {}}], "run.jsonl")
    rows = text.splitlines()
    header = next(number for number, row in enumerate(rows) if row.startswith("layer "))
    assert [row.split()[0] for row in rows[header + 1 : header + 4]] == ["broken", "damped", "fine"]
    assert rows[-3:] == [
        "Layers with a bad sign: 2 of 3.",
        "  broken: residual_A not finite",
        "  damped: damping_A exceeds trace_A",
    ]
    assert max(map(len, rows)) <= 100
    assert "step 1, entry 1 of 2" in text
    assert "No layer has a bad sign." in render([{"layers": {"fine": HEALTHY}}], "")


def test_the_table_has_columns_for_what_is_there() -> None:
    novel = HEALTHY | {"novel": 7.0, "text": "no number", "dropped_gradients": 2, "dropped_statistics": 1}
    columns = columns_of([HEALTHY, novel])
    assert {title: columns[title] for title in ("residual", "dropped", "novel", "trace A")} == {
        "residual": [0.002, 0.002],
        "dropped": [0, 3],
        "novel": [None, 7.0],
        "trace A": [4.0, 4.0],
    }
    assert "text" not in columns
    assert list(columns_of([{"cosine": 0.5}])) == ["cosine"]


def test_the_head_says_what_lies_beside_the_layers() -> None:
    entry = {
        "steps": 3,
        "loss": math.nan,
        "memory": {"factors": 2048, "sums": 0, "inverses": 1024},
        "skipped": {"norm": "not supported", "": "frozen"},
        "without_statistics": [f"l{n}" for n in range(7)],
        "groups": {"first": 0.25},
        "empty": {},
        "layers": {"a": HEALTHY},
    }
    head = render([entry], "run.jsonl").split("\n\n")[0].splitlines()
    assert head == [
        "run.jsonl: step 3, entry 1 of 1",
        "loss nan",
        "memory: 3 KiB (factors 2 KiB, inverses 1 KiB)",
        "skipped: 2: norm (not supported), root (frozen)",
        "without statistics: 7: l0, l1, l2, l3, l4, and 2 more",
        "groups: first 0.25",
    ]


def test_sizes() -> None:
    assert [as_size(n) for n in (12, 2048, 5 * 2**30, 2**42)] == ["12 B", "2 KiB", "5 GiB", "4 TiB"]


def test_pattern_and_last(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "figure_of", lambda *_: pytest.fail("drew"))
    assert main(["report", str(log), "--layers", "[24]", "--last"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"^(\d) ", printed, re.MULTILINE) == ["2", "4"]
    assert list(tmp_path.iterdir()) == []
    assert main(["report", str(log), "--output", "none"]) == 0
    root = select_layers([{"layers": {"": HEALTHY, "child": HEALTHY}}], "root")
    assert list(root[0]["layers"]) == ["root"]


def test_the_half_line_of_a_killed_run_is_left_out(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut = tmp_path / "cut.jsonl"
    cut.write_bytes(log.read_bytes()[:-200])
    assert main(["report", str(cut), "--last"]) == 0
    printed = capsys.readouterr().out
    assert "step 3, entry 3 of 3" in printed
    assert "Note: line 4, the last, is half-written and left out" in printed


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_log(tmp_path / "run.jsonl", {"layers": {"a": {"novel": 1.0}}})
    assert main(["report", str(tmp_path / "run.jsonl"), "--output", str(tmp_path / "report.png")]) == 0
    assert "nothing to draw" in capsys.readouterr().out
    assert not (tmp_path / "report.png").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            None,
            r"argument LOG: '.*' cannot be read \(No such file or directory\); give a file that kfac_triton.scalars.append_log",
        ),
        ("", r"argument LOG: '.*' is empty; let the training log a step first"),
        ('{"layers": {', r"argument LOG: '.*' has no complete line; let the training log"),
        ('{"layers": {}}\nepoch 3\n', r"argument LOG: '.*': line 2 is not JSON \(.*\); remove the line"),
        ('{"loss": 1}\n{"layers": 3}\n', r"argument LOG: '.*' has no layers; pass optimizer.diagnostics\(\) to append_log"),
    ],
)
def test_a_bad_log_is_said(text: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.jsonl"
    if text is not None:
        path.write_text(text)
    assert re.search(message, failure(capsys, str(path), "--last"))


def test_bad_arguments_are_said(log: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    assert re.search(r"argument LOG: .* cannot be read \(.*\); give a file", failure(capsys, str(tmp_path)))
    wrong = failure(capsys, str(log), "--layers", "encoder.*")
    assert "argument --layers: 'encoder.*' matches no layer of the log; it has 0, 2, 4" in wrong
    assert "does not end in .png" in failure(capsys, str(log), "--output", "report.jpg")
    assert "not allowed with" in failure(capsys, str(log), "--last", "--output", "report.png")
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    assert re.search(r"matplotlib.*kfac-triton\[demo\].*--output none", failure(capsys, str(log)))
    assert main(["report", str(log), "--last"]) == 0
