"""Results of a run as JSON, as Markdown tables, and as a picture where matplotlib is installed."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch

from kfac_triton import __version__
from kfac_triton.kernels import runtime

from .kernels.cost_model import Rates

Row = dict[str, Any]


def machine(device: torch.device) -> dict[str, str]:
    """What the figures depend on."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "device": name,
        "kind": "GPU" if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": str(runtime.triton.__version__),
        "cuda": str(torch.version.cuda or torch.version.hip or "none"),
        "python": platform.python_version(),
        "kfac_triton": __version__,
    }


def kernel_table(rows: list[Row]) -> str:
    """Contestants of one operation on one model."""
    lines = [
        "| contestant | error | allowed | eager ms | graph ms | times ours | share of floor |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        error = f"{row['error']:.1e}" if "error" in row else "-"
        if "best_seconds" not in row:
            lines.append(f"| {row['contestant']} | {error} | {row['allowed']:.1e} | not timed: {row['not_timed']} | | | |")
            continue
        graph = f"{1e3 * row['graph_seconds']:.3f}" if "graph_seconds" in row else row.get("no_graph", "-")
        ratio = f"{row['over_ours']:.2f}" if "over_ours" in row else "-"
        share = f"{row['share_of_floor']:.1%}" if "share_of_floor" in row else "-"
        eager = f"{1e3 * row['eager_seconds']:.3f}" if "eager_seconds" in row else row["not_timed"]
        lines.append(f"| {row['contestant']} | {error} | {row['allowed']:.1e} | {eager} | {graph} | {ratio} | {share} |")
    return "\n".join(lines)


def step_table(rows: list[Row]) -> str:
    """Contestants of one training task."""
    lines = ["| optimizer | step ms | range | over AdamW |", "|---|--:|--:|--:|"]
    for row in rows:
        if "step_seconds" not in row:
            lines.append(f"| {row['contestant']} | not timed: {row['not_timed']} | | |")
            continue
        low, high = (f"{1e3 * value:.2f}" for value in row["range"])
        ratio = f"{row['over_baseline']:.2f}" if "over_baseline" in row else "-"
        lines.append(f"| {row['contestant']} | {1e3 * row['step_seconds']:.2f} | {low} to {high} | {ratio} |")
    return "\n".join(lines)


def markdown(report: dict[str, Any], rates: Rates) -> str:
    """Everything in one page."""
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items() if key != "device")
    units = ", ".join(f"{unit} {count / 1e12:.2f} TFLOP/s" for unit, count in rates.operations.items() if "x" not in unit)
    lines = [
        f"# {report['machine']['device']}, {report['date']}",
        "",
        f"Measured on this {report['machine']['kind']} ({facts}).",
        f"Floors: {rates.bandwidth / 1e12:.3f} TB/s, {units} ({rates.source}); `benchmarks/kernels/cost_model.py` counts them.",
        "A result that is wrong by more than what is allowed, against float64, gets no time. Times are medians.",
        "",
        "## Checks",
        "",
        *(f"- {line}" for line in report["checks"]),
    ]
    for group in report["kernels"]:
        lines += ["", f"## {group['operation']}, {group['model']}", "", group["description"], "", kernel_table(group["rows"])]
    for group in report["steps"]:
        lines += ["", f"## Training step, {group['description']}", "", step_table(group["rows"])]
    if report["left_out"]:
        lines += ["", "## Left out", "", *(f"- {line}" for line in report["left_out"])]
    return "\n".join(lines) + "\n"


def draw(report: dict[str, Any], path: Path) -> bool:
    """A bar for every time; False without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    groups = [group for group in report["kernels"] if any("best_seconds" in row for row in group["rows"])]
    figure = Figure(figsize=(9, 1 + 1.6 * max(1, len(groups))), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{report['machine']['device']} ({report['machine']['kind']}), {report['date']}: milliseconds")
    for axes, group in zip(figure.subplots(max(1, len(groups)), squeeze=False)[:, 0], groups, strict=False):
        timed = [row for row in group["rows"] if "best_seconds" in row]
        axes.barh([row["contestant"] for row in timed], [1e3 * row["best_seconds"] for row in timed], color="#1f5f99")
        axes.axvline(1e3 * timed[0]["floor_seconds"], color="#c0392b", linewidth=1)
        axes.set_xscale("log")
        axes.invert_yaxis()
        axes.set_title(f"{group['operation']}, {group['model']} (red: floor)", fontsize=9, loc="left")
        axes.tick_params(which="both", labelsize=7)
    figure.savefig(path, format="png", dpi=110)
    return True


def write(folder: Path, report: dict[str, Any], rates: Rates, picture: bool = True) -> list[Path]:
    """Writes what can be written and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    table, data, drawn = folder / "results.md", folder / "results.json", folder / "kernels.png"
    data.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    table.write_text(markdown(report, rates), encoding="utf-8")
    return [table, data, *([drawn] if picture and draw(report, drawn) else [])]
