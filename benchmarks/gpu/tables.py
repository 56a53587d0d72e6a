"""Findings as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from .findings import Line, is_bad
from .merging import without_annotations

OURS, REFERENCE, LIBRARY = "kernel", "torch reference", "auto (library, TF32)"  # among the contestants of an operation
BASE, FUSED, COMPILED = "AdamW", "AdamW fused, tf32", "AdamW fused, compiled"  # among the variants of a step
_KERNELS = 12  # of a profile that are shown


def number(value: Any, digits: int = 3) -> str:
    """A number with so many digits, or a dash."""
    if not isinstance(value, (int, float)):
        return "-" if value is None else str(value)
    if isinstance(value, float) and value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.1e}"
    if isinstance(value, int) or not value:
        return f"{value:g}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.0f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first column is words; nothing if it has no rows."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if not cells:
        return []
    head = [list(header), ["---", *["--:"] * (len(header) - 1)]]
    return ["", *("| " + " | ".join(row) + " |" for row in [*head, *cells]), ""]


def section(title: str, *lines: str) -> list[str]:
    """A heading with what stands below it; nothing if nothing does."""
    return ["", f"## {title}", *lines] if any(lines) else []


def of(lines: list[Line], part: str) -> list[Line]:
    """Findings of a part."""
    return [line for line in lines if line["part"] == part]


def why_not(line: Line) -> str | None:
    """Why a finding has no figures, if it has none."""
    for key in ("FAILED", "not_timed", "skipped"):
        if key in line:
            return f"{'failed' if key == 'FAILED' else 'none'}: {line[key]}"
    return None


def ceilings(lines: list[Line]) -> list[str]:
    """Rates of the machine."""
    units = {"TFLOPs": "TFLOP/s", "TBs": "TB/s", "us": "microseconds"}
    rows = [
        [line["what"], f"{number(line[key])} {unit}", line["run"]]
        for line in of(lines, "env")
        for key, unit in units.items()
        if key in line
    ]
    return section("Rates of the machine", *table(("", "best", "run"), rows))


def checks(lines: list[Line]) -> list[str]:
    """Verdicts."""
    kernels, engines, others = [], [], []
    for line in of(lines, "smoke"):
        verdict = line.get("verdict", why_not(line) or "-")
        if "allowed" in line:
            again = "yes" if line.get("repeats") else "NO"
            how = f" (PyTorch: {line['torch_only']})" if "torch_only" in line else ""
            kernels.append(
                [line["what"] + how, number(line["error"], 2), number(line["allowed"], 2), again, verdict, line["run"]]
            )
        elif "factors_off" in line:
            figures = (number(line[key], 2) for key in ("factors_off", "parameters_off"))
            losses = (number(line[key], 5) for key in ("loss", "loss_torch"))
            engines.append([line["what"], *figures, *losses, verdict, line["run"]])
        elif "summary" in line:
            summary = line["summary"] if isinstance(line["summary"], str) else "; ".join(line["summary"])
            found = f"{line['checked']} problems right; {summary.replace('=', '').strip()}"
            others.append([line["what"], found, line["run"]])
        else:
            others.append([line["what"], why_not(line) or f"{number(line.get('s'))} s", line["run"]])
    return section(
        "Checks",
        *table(("against float64", "error", "allowed", "same again", "verdict", "run"), kernels),
        *table(
            ("kernels against PyTorch, six steps", "factors off", "parameters off", "loss", "PyTorch's", "", "run"), engines
        ),
        *table(("", "found", "run"), others),
    )


def races(lines: list[Line]) -> dict[tuple[str, str], dict[str, Line]]:
    """(operation, layer set) -> contestant -> its finding, with its time over the kernel's of the same run as `over`."""
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for line in of(lines, "ops"):
        where, colon, contestant = line["what"].partition(": ")
        operation, _, layers = where.partition(" ")
        if colon and layers:
            found.setdefault((operation, layers), {})[contestant] = line
    for contestants in found.values():
        ours = contestants.get(OURS, {})
        for name, line in contestants.items():
            if "ms" in line and "ms" in ours and line["run"] == ours["run"]:
                contestants[name] = line | {"over": line["ms"] / ours["ms"]}
    return found


def operations(lines: list[Line]) -> list[str]:
    """One table an operation: a row for each layer set, a column for each contestant."""
    result: list[str] = []
    found = races(lines)
    for operation in dict.fromkeys(operation for operation, _ in found):
        sets = {layers: contestants for (name, layers), contestants in found.items() if name == operation}
        names = list(dict.fromkeys(name for contestants in sets.values() for name in contestants if name != OURS))
        rows, remarks = [], []
        for layers, contestants in sets.items():
            ours = contestants.get(OURS, {})
            runs = dict.fromkeys(line["run"] for line in contestants.values())
            floor = ours["floor_ms"] / ours["ms"] if "ms" in ours and "floor_ms" in ours else None
            share = "-" if floor is None else f"{floor:.0%}"
            cells = [_race_cell(contestants.get(name, {})) for name in names]
            rows.append([layers, number(ours.get("ms")), share, *cells, ", ".join(runs)])
            for name, line in contestants.items():
                if reason := why_not(line):
                    remarks.append(f"- {layers}, {name}: {reason}")
        header = ("layers", "kernel", "of the floor", *names, "run")
        result += ["", f"### {operation}", *table(header, rows), *remarks]
    explained = (
        "Milliseconds; in brackets, times the kernel's. The floor is that of `cost_model.py`: its share of the kernel's time."
    )
    return section("Operations", "", explained, *result) if result else []


def _race_cell(line: Line) -> str:
    if "ms" not in line:
        return "-"
    return number(line["ms"]) + (f" ({number(line['over'])})" if "over" in line else "")


def step_groups(lines: list[Line]) -> dict[str, list[Line]]:
    """Task -> its findings, each with its time over AdamW's (`over`) and over fused AdamW's of its kind (`over_fused`)."""
    groups: dict[str, list[Line]] = {}
    for line in of(lines, "step"):
        task, colon, variant = line["what"].partition(": ")
        if colon:
            groups.setdefault(task, []).append(line | {"variant": variant})
    for group in groups.values():
        times = {(line["run"], line["variant"]): line["ms"] for line in group if "ms" in line}
        for line in group:
            fused = COMPILED if "compiled" in line["variant"] else FUSED
            for key, base in (("over", BASE), ("over_fused", fused)):
                if "ms" in line and (line["run"], base) in times:
                    line[key] = line["ms"] / times[line["run"], base]
    return groups


def steps(lines: list[Line]) -> list[str]:
    """One table a task."""
    header = ("", "ms", "host ms", "over AdamW", "over fused AdamW", "GiB", "refused inverses", "worst residual", "loss", "run")
    keys = ("ms", "host_ms", "over", "over_fused", "GiB", "fallbacks", "worst_residual")
    result: list[str] = []
    for task, group in step_groups(lines).items():
        rows = []
        for line in group:
            if (reason := why_not(line)) is not None:
                rows.append([line["variant"], reason, *[""] * 7, line["run"]])
            else:
                figures = (number(line.get(key)) for key in keys)
                rows.append([line["variant"], *figures, number(line.get("loss"), 5), line["run"]])
        result += ["", f"### {task}", *table(header, rows)]
    explained = (
        "Each line with an ellipsis adds a setting to the one above it. Host: until the last call has returned, the device may "
        "work on. Fused AdamW: with TF32 products, and compiled for the compiled lines. Ratios are within a run. KFACAdam's "
        "residual is ||Q^T Q - I|| of its eigenvectors, and its time with a refresh in ten steps the mean of the lines above."
    )
    return section("Training steps", "", explained, *result) if result else []


def graphs(lines: list[Line]) -> list[str]:
    """Replays against eager steps."""
    merged: dict[tuple[str, str], Line] = {}
    for line in of(lines, "graph"):  # eager steps come first, in a line of their own
        key = line["what"], line["run"]
        merged[key] = merged.get(key, {}) | line
    rows = []
    for line in merged.values():
        eager = [number(line[key]) if key in line else "" for key in ("eager_ms", "eager_host_ms")]
        if "ms" not in line:
            rows.append([line["what"], why_not(line) or "-", "", *eager, *[""] * 3, line["run"]])
            continue
        times = [number(line[key]) for key in ("ms", "host_ms")]
        apart = [number(line["off"], 2), number(line["moved"], 2)]
        rows.append([line["what"], *times, *eager, *apart, line["verdict"], line["run"]])
    header = ("200 replays", "ms", "host ms", "eager ms", "eager host ms", "apart", "moved", "verdict", "run")
    explained = "Apart: largest difference between parameters after replays and after eager steps; moved: largest way of one."
    return section("CUDA graphs", "", explained, *table(header, rows)) if rows else []


def profiles(lines: list[Line]) -> list[str]:
    """The kernels of a step that take longest."""
    result: list[str] = []
    found = of(lines, "profile")
    for model in dict.fromkeys(line["subject"] for line in found):
        group = without_annotations([line for line in found if line["subject"] == model])
        rows = []
        for line in group:
            if "busy_ms" in line or "ms" not in line:
                hidden = ("part", "what", "subject", "run")
                facts = (f"{key} {number(value)}" for key, value in line.items() if key not in hidden)
                result += ["", f"### {model}, {line['run']}", "", ", ".join(facts)]
            else:
                rows.append([f"`{line['what'].strip()}`", number(line["ms"]), number(line["calls"]), line.get("share", "-")])
        result += table(("kernel", "ms a step", "launches a step", "of the busy time"), rows[:_KERNELS])
    return section("Profile of a K-FAC step", *result)


def training(lines: list[Line]) -> list[str]:
    """Every run of the race to AdamW's loss; a line about what a run needs stands below the run's."""
    result: list[str] = []
    found = of(lines, "train")
    header = ("", "steps", "s", "ms a step", "loss", "least", "of the steps", "of the seconds", "refused inverses")
    for problem in dict.fromkeys(line["subject"] for line in found):
        rows: list[list[str]] = []
        best, run = "", ""
        for line in (line for line in found if line["subject"] == problem):
            run = line["run"]
            what = line["what"].partition(": ")[2] or "all"
            if what == "best AdamW":
                best = f"AdamW's best loss: {number(line['loss'], 4)}, after {line['steps']} steps and {number(line['s'])} s."
            elif "of_steps" in line or "reached" in line:
                if rows:
                    shares = [number(line[key], 2) if key in line else "missed" for key in ("of_steps", "of_seconds")]
                    rows[-1][6:8] = shares
            elif (reason := why_not(line)) is not None:
                rows.append([what, reason, *[""] * 7])
            else:
                times = [number(line.get(key)) for key in ("steps", "s", "ms_a_step")]
                losses = [number(line.get(key), 4) for key in ("loss", "least")]
                rows.append([what, *times, *losses, "", "", number(line.get("refused"))])
        result += ["", f"### {problem}, {run}", *(["", best] if best else []), *table(header, rows)]
    explained = (
        "Steps and seconds until an optimizer is at the loss that the best AdamW ends with, over those of that AdamW. KFACAdam "
        "has its defaults, but a refresh in every step, because steps are recorded."
    )
    return section("Training", "", explained, *result) if result else []


def tuned(lines: list[Line]) -> list[str]:
    """What the search of tile configurations found."""
    rows = []
    for line in of(lines, "tune"):
        found = line.get("found") or [why_not(line) or str(line.get("reason", "-"))]
        rows.append([line["what"], "<br>".join(found), line["run"]])
    return section("Tile configurations", *table(("", "found", "run"), rows))


def bad(lines: list[Line]) -> list[str]:
    """What failed or is wrong."""
    hidden = ("part", "what", "run", "subject")
    rows = (
        [
            f"{line['part']}, {line['what'].strip()}",
            "; ".join(f"{k} {v}" for k, v in line.items() if k not in hidden),
            line["run"],
        ]
        for line in lines
        if is_bad(line)
    )
    return section("Failures", *table(("", "", "run"), rows))
