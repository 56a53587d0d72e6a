"""Findings of one run or several as a Markdown page, JSON, and a picture where matplotlib is installed."""

from __future__ import annotations

import argparse
import datetime
import json
import re
from collections.abc import Sequence
from pathlib import Path

from . import picture, tables
from .findings import Line, without_nan
from .merging import merge
from .processes import ROOT

RESULTS = ROOT / "benchmarks" / "results"


def main(arguments: list[str]) -> int:
    """Writes the report."""
    about = "Turns findings into a page, JSON and a picture."
    parser = argparse.ArgumentParser("python -m benchmarks.gpu report", description=about)
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="hour.jsonl of runs on one device, the oldest first"
    )
    parser.add_argument("--output", type=Path, help="folder for the report (default: benchmarks/results/DEVICE-DATE)")
    parser.add_argument("--date", help="of the measurement, as 2030-12-31 (default: what the findings say, or the file's date)")
    options = parser.parse_args(arguments)
    try:
        lines = merge(options.files)
        device = device_of(options.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    said = [line["date"] for line in lines if "date" in line]
    changed = datetime.date.fromtimestamp(options.files[-1].stat().st_mtime).isoformat()
    date = options.date or max(said, default=changed)
    # The folder's name says what was measured.
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    for path in write(options.output or RESULTS / f"{name}-{date}", lines, device, date):
        print(f"Written: {path}")
    return 0


def device_of(files: Sequence[Path]) -> str:
    """The device that all runs were on.

    Raises:
        ValueError: if there is more than one.
    """
    machines = [line for file in files for line in merge([file]) if line["what"] == "machine"]
    names = {line.get("device") or line.get("gpu") or "unknown device" for line in machines}
    if len(names) > 1:
        raise ValueError(f"figures belong to one device, and these are of {' and '.join(sorted(names))}")
    return names.pop() if names else "unknown device"


def markdown(lines: list[Line], device: str, date: str) -> str:
    """The page."""
    hidden = ("part", "what", "run", "subject", "date", "device", "gpu")
    machines = [
        f"- {line['run']}: " + ", ".join(f"{key} {value}" for key, value in line.items() if key not in hidden)
        for line in lines
        if line["what"] == "machine"
    ]
    runs = dict.fromkeys(line["run"] for line in lines)
    page = [
        f"# {device}, {date}",
        "",
        f"{len(lines)} findings by `python -m benchmarks.gpu`. Runs, the later in place of the earlier: {', '.join(runs)}.",
        "",
        *machines,
        *tables.bad(lines),
        *tables.ceilings(lines),
        *tables.checks(lines),
        *tables.operations(lines),
        *tables.steps(lines),
        *tables.graphs(lines),
        *tables.profiles(lines),
        *tables.training(lines),
        *tables.tuned(lines),
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(page)).strip() + "\n"


def write(folder: Path, lines: list[Line], device: str, date: str) -> list[Path]:
    """Writes what can be written and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    page, data, image = folder / "results.md", folder / "results.json", folder / "results.png"
    found = [{key: value for key, value in line.items() if key != "subject"} for line in lines]
    # One finding a line, so that two results can be compared by eye.
    body = ",\n".join(json.dumps(without_nan(line)) for line in found)
    head = json.dumps({"device": device, "date": date})[:-1]
    data.write_text(f'{head}, "findings": [\n{body}\n]}}\n', encoding="utf-8")
    page.write_text(markdown(lines, device, date), encoding="utf-8")
    return [page, data, *([image] if picture.draw(lines, f"{device}, {date}", image) else [])]
