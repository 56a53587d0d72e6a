"""The findings as a picture: steps over AdamW, and what a user would write over the kernels."""

from __future__ import annotations

from pathlib import Path

from .findings import Line
from .tables import LIBRARY, OURS, REFERENCE, races, step_groups

Bar = tuple[str, float]


def step_bars(lines: list[Line]) -> list[Bar]:
    """Each K-FAC step over AdamW's."""
    return [
        (f"{task}: {line['variant']}", line["over"])
        for task, group in step_groups(lines).items()
        for line in group
        if "over" in line and not line["variant"].startswith("AdamW")
    ]


def operation_bars(lines: list[Line]) -> list[Bar]:
    """For each operation and layer set the fastest of those that a user would write, over the kernel."""
    bars = []
    for (operation, layers), contestants in races(lines).items():
        own = (OURS, REFERENCE, LIBRARY)
        peers = {n: line["over"] for n, line in contestants.items() if n not in own and "over" in line}
        if peers:
            fastest = min(peers, key=peers.__getitem__)
            bars.append((f"{operation}, {layers}: {fastest}", peers[fastest]))
    return bars


def draw(lines: list[Line], title: str, path: Path) -> bool:
    """Writes the picture; False without matplotlib or without anything to show."""
    panels = [
        ("Training step, times AdamW's", step_bars(lines), "#1f5f99"),
        ("Fastest of what a user would write, times the kernel", operation_bars(lines), "#5b8c3a"),
    ]
    panels = [panel for panel in panels if panel[1]]
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        return False
    if not panels:
        return False
    heights = [len(bars) for _, bars, _ in panels]
    figure = Figure(figsize=(9, 1.2 * len(panels) + 0.24 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    places = figure.subplots(len(panels), squeeze=False, gridspec_kw={"height_ratios": [max(2, h) for h in heights]})[:, 0]
    for axes, (name, bars, color) in zip(places, panels, strict=True):
        # From 1 to the right for what takes longer, to the left for what takes less.
        drawn = axes.barh(range(len(bars)), [value - 1 for _, value in bars], left=1, color=color)
        axes.set_yticks(range(len(bars)), [label for label, _ in bars])
        axes.bar_label(drawn, [f"{value:.2g}" for _, value in bars], fontsize=7, padding=2)
        axes.axvline(1, color="#c0392b", linewidth=1)
        axes.set_xscale("log")
        for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatter(FuncFormatter(lambda value, _: f"{value:g}" if f"{value:g}".strip("0.")[:1] in ("1", "2", "5") else ""))
        axes.margins(x=0.15)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=9, loc="left")
        axes.tick_params(which="both", labelsize=7)
    figure.savefig(path, format="png", dpi=110)
    return True
