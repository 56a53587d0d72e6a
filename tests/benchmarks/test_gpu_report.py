"""Findings of `make gpu`, and the report of made-up ones."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import merging, picture, report, tables
from benchmarks.gpu.findings import ERRORS, FILE, Bench, is_bad, read


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path, "a part", device="cpu", quick=True)


def test_a_finding_is_a_line_at_once(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    bench.say("speed", ms=1.23456, note="x")
    bench.say("other", part="step", error=math.nan)
    first, second = read(bench.folder / FILE)
    assert first == {"part": "a part", "what": "speed", "ms": 1.23456, "note": "x"}
    assert second["part"] == "step" and math.isnan(second["error"])
    assert capsys.readouterr().out.splitlines()[0] == "[a part] speed: ms 1.235, note x"


def test_an_exception_is_a_finding_and_the_next_one_goes_on(bench: Bench) -> None:
    def fail() -> None:
        raise ValueError("no luck\nwith details")

    assert bench.attempt("first", fail) is None
    assert bench.attempt("second", lambda: 3) == 3
    (line,) = read(bench.folder / FILE)
    assert line["FAILED"] == "ValueError: no luck" and line["what"] == "first"
    assert "with details" in (bench.folder / ERRORS).read_text()


@pytest.mark.parametrize(
    ("facts", "bad"),
    [
        ({"FAILED": "x"}, True),
        ({"verdict": "WRONG"}, True),
        ({"repeats": False}, True),
        ({"verdict": "right", "repeats": True}, False),
    ],
)
def test_what_is_bad(facts: dict[str, Any], bad: bool) -> None:
    assert is_bad({"part": "p", "what": "w", **facts}) is bad


def test_a_last_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / FILE
    file.write_text('{"part": "env", "what": "copy"}\n{"part": "env", "wh')
    assert [line["what"] for line in read(file)] == ["copy"]
    file.write_text('{"part": "env", "wh\n{"part": "env", "what": "copy"}\n')
    with pytest.raises(ValueError, match="line 1, is no finding"):
        read(file)


# The report.

FIRST = (
    {"part": "env", "what": "machine", "gpu": "Some GPU 9000", "torch": "2.0", "date": "2030-01-02"},
    {"part": "env", "what": "copy", "TBs": 4.0},
    {
        "part": "smoke",
        "what": "precondition of inverses ",
        "verdict": "WRONG",
        "error": 0.5,
        "allowed": 0.1,
        "repeats": True,
        "s": 1.0,
    },
    {"part": "ops", "what": "precondition gpt2: kernel", "ms": 2.0, "floor_ms": 0.5, "of_ours": 1.0},
    {"part": "ops", "what": "precondition gpt2: torch reference", "ms": 9.0},
    {"part": "ops", "what": "precondition gpt2: bmm", "ms": 5.0},
    {"part": "ops", "what": "precondition gpt2: matmul loop", "ms": 8.0},
    {"part": "ops", "what": "precondition gpt2: eigh", "not_timed": "takes too long"},
    {"part": "step", "what": "gpt: AdamW", "ms": 40.0, "host_ms": 30.0, "over_AdamW": 1.0, "loss": 3.0},
    {"part": "step", "what": "gpt: AdamW fused, tf32", "ms": 20.0, "host_ms": 15.0, "over_AdamW": 0.5, "loss": 3.0},
    {"part": "step", "what": "gpt: K-FAC", "ms": 50.0, "host_ms": 45.0, "over_AdamW": 1.25, "loss": 2.5, "fallbacks": 3},
    {"part": "step", "what": "gpt: AdamW fused, compiled", "ms": 10.0, "host_ms": 5.0, "over_AdamW": 1.0, "loss": 3.0},
    {"part": "step", "what": "gpt: K-FAC, compiled, tf32", "ms": 30.0, "host_ms": 5.0, "over_AdamW": 3.0, "loss": 2.5},
    {"part": "profile", "what": "gpt", "busy_ms": 30.0, "kernels": 7.0},
    {"part": "profile", "what": "  Optimizer.step#KFAC.step", "ms": 20.0, "calls": 1.0, "share": "67%"},
    {"part": "profile", "what": "  plan_kernel", "ms": 4.0, "calls": 2.0, "share": "13%"},
    {"part": "train", "what": "vit: AdamW {'lr': 0.1}", "steps": 100, "s": 2.0, "ms_a_step": 20.0, "loss": 0.5, "least": 0.4},
    {"part": "train", "what": "vit: best AdamW", "loss": 0.5, "steps": 100, "s": 2.0},
    {
        "part": "train",
        "what": "vit: K-FAC {'lr': 1}",
        "steps": 50,
        "s": 1.5,
        "ms_a_step": 30.0,
        "loss": 0.3,
        "least": 0.3,
        "refused": 0,
    },
    {"part": "train", "what": "vit: K-FAC to 0.5", "of_steps": 0.3, "of_seconds": 0.45},
    {
        "part": "train",
        "what": "vit: K-FAC {'lr': 1}",
        "steps": 33,
        "s": 1.0,
        "ms_a_step": 30.0,
        "loss": 0.6,
        "least": 0.6,
        "refused": 0,
    },
    {"part": "train", "what": "vit: K-FAC to 0.5", "reached": "no"},
)
SECOND = (
    {"part": "env", "what": "machine", "device": "Some GPU 9000", "torch": "2.1", "date": "2030-01-03"},
    {
        "part": "smoke",
        "what": "precondition of inverses",
        "verdict": "right",
        "error": 0.01,
        "allowed": 0.1,
        "repeats": True,
        "s": 1.0,
    },
    {"part": "step", "what": "gpt: K-FAC", "ms": 44.0, "host_ms": 45.0, "over_AdamW": 1.1, "loss": 2.5},
    {"part": "ops", "what": "precondition gpt2: bmm", "ms": 6.0},
    {"part": "train", "what": "vit: AdamW {'lr': 0.1}", "FAILED": "RuntimeError: no memory"},
    {"part": "graph", "what": "autoencoder K-FAC", "FAILED": "RuntimeError: cannot capture"},
)


def write(folder: Path, *lines: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / FILE
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def rows_of(page: str, first: str) -> list[list[str]]:
    """Cells of the rows whose first cell is this one."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    return [row for row in rows if row[0] == first]


def page_of(*files: Path) -> str:
    return report.markdown(merging.merge(files), "Some GPU 9000", "2030-01-03")


def test_ratios_in_the_tables(tmp_path: Path) -> None:
    page = page_of(write(tmp_path / "first", *FIRST))
    (race,) = rows_of(page, "gpt2")
    assert race == ["gpt2", "2", "25%", "9 (4.5)", "5 (2.5)", "8 (4)", "-", "first"]
    assert "- gpt2, eigh: none: takes too long" in page
    (kfac,) = rows_of(page, "K-FAC")
    assert kfac == ["K-FAC", "50", "45", "1.25", "2.5", "-", "3", "-", "2.5", "first"]
    (compiled,) = rows_of(page, "K-FAC, compiled, tf32")
    assert compiled[3:5] == ["0.75", "3"], "over AdamW, over fused AdamW compiled too"
    (kernel,) = rows_of(page, "`plan_kernel`")
    assert kernel == ["`plan_kernel`", "4", "2", "40%"], "of 30 ms the profiler's own range is 20"
    assert "busy_ms 10" in page and "KFAC.step" not in page
    assert "AdamW's best loss: 0.5, after 100 steps and 2 s." in page
    half, third = rows_of(page, "K-FAC {'lr': 1}")
    assert half == ["K-FAC {'lr': 1}", "50", "1.5", "30", "0.3", "0.3", "0.3", "0.45", "0"]
    assert third[6:8] == ["missed", "missed"]


def test_a_later_run_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    files = [write(tmp_path / "first", *FIRST), write(tmp_path / "second", *SECOND)]
    page = page_of(*files)
    (kfac,) = rows_of(page, "K-FAC")
    assert kfac[1] == "44" and kfac[-1] == "second"
    assert kfac[3:5] == ["-", "-"], "ratios are within a run, and AdamW was not in this one"
    assert rows_of(page, "AdamW")[0][-1] == "first"
    (race,) = rows_of(page, "gpt2")
    assert race == ["gpt2", "2", "25%", "9 (4.5)", "6", "8 (4)", "-", "first, second"], "no ratio across runs"
    (check,) = rows_of(page, "precondition of inverses")
    assert check[-2:] == ["right", "second"]
    assert "missed" not in page, "a training problem is replaced as a whole"
    assert [row[0] for row in rows_of(page, "graph, autoencoder K-FAC")] == ["graph, autoencoder K-FAC"]
    assert "first: torch 2.0" not in page and "second: torch 2.1" in page


def test_a_part_that_was_run_again_counts_once(tmp_path: Path) -> None:
    (kfac,) = rows_of(page_of(write(tmp_path / "first", *FIRST, SECOND[2])), "K-FAC")
    assert kfac[1] == "44" and kfac[3:5] == ["1.1", "2.2"], "over the run's AdamW"


def test_runs_in_folders_of_one_name_are_numbered(tmp_path: Path) -> None:
    files = [tmp_path / "a" / "out" / FILE, tmp_path / "b" / "out" / FILE, tmp_path / "last" / FILE]
    assert merging.run_names(files) == ["out 1", "out 2", "last"]


def test_everything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    not_a_number = {"part": "step", "what": "gpt: K-FAC", "ms": 1.0, "loss": math.nan}
    assert command.main(["report", str(write(tmp_path / "first", *FIRST)), str(write(tmp_path / "new", not_a_number))]) == 0
    folder = tmp_path / "results" / "some-gpu-9000-2030-01-02"
    picture_too = {"results.png"} if importlib.util.find_spec("matplotlib") else set()
    assert {path.name for path in folder.iterdir()} == {"results.md", "results.json"} | picture_too
    found = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    assert found["device"] == "Some GPU 9000" and len(found["findings"]) == len(FIRST)
    assert {"run": "new", "part": "step", "what": "gpt: K-FAC", "ms": 1.0, "loss": None} in found["findings"]


def test_bars_are_ratios(tmp_path: Path) -> None:
    library = {"part": "ops", "what": f"precondition gpt2: {tables.LIBRARY}", "ms": 1.0}
    lines = merging.merge([write(tmp_path / "first", *FIRST, library)])
    assert picture.step_bars(lines) == [("gpt: K-FAC", 1.25), ("gpt: K-FAC, compiled, tf32", 0.75)]
    assert picture.operation_bars(lines) == [("precondition, gpt2: bmm", 2.5)]


def test_runs_on_different_devices_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"part": "env", "what": "machine", "device": "Another"}
    with pytest.raises(SystemExit, match="2"):
        report.main([str(write(tmp_path / "a", *FIRST)), str(write(tmp_path / "b", other))])
    assert "figures belong to one device" in capsys.readouterr().err


def test_numbers_are_short() -> None:
    shown = [tables.number(value) for value in (0.0, 1234.5, 12.345, 0.00012, None, 7, 123456.0, "x")]
    assert shown == ["0", "1234", "12.3", "1.2e-04", "-", "7", "1.2e+05", "x"]
