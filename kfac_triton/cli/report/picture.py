"""The picture of `kfac-triton report`: panels over the steps of a log; matplotlib is imported where it draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from ...curvature.inverse import ACCEPT
from ...scalars import as_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = Mapping[str, Any]
Series = Sequence[float | None]  # a value for each entry; None where the log has none

COLORS = ("#1f5f99", "#c0392b", "#7f8c8d", "#27ae60", "#8e44ad")
NAMED_LAYERS = 10
NOT_FINITE = "not finite"
STEP_RULES = ("kl_clip_scale", "reduction_ratio", "damping")
PER_LAYER = ("cosine", "update_norm")
_WIDE = 20  # largest over smallest value from which on an axis is logarithmic
_FEW = 40  # entries up to which each is marked: a single one has no line


@dataclass(frozen=True)
class Panel:
    """Lines over steps.

    Attributes:
        title: what they show.
        lines: label -> series.
        per_layer: whether the labels are layers, which share one legend.
        level: of a dashed line, if any.
        broken: for each entry, whether something that the lines leave out is not finite; may be empty.
    """

    title: str
    lines: Mapping[str, Series]
    per_layer: bool = False
    level: float | None = None
    broken: Sequence[bool] = ()


def draw(entries: Sequence[Entry], title: str, path: Path) -> None:
    """Writes the picture as a PNG; see `figure_of`."""
    figure_of(entries, title).savefig(path, format="png", dpi=110)


def figure_of(entries: Sequence[Entry], title: str) -> Figure:
    """The panels that the log has values for, memory last.

    Args:
        entries: of the log, in its order, with the layers to show.
        title: line on top.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from numpy import linspace

    panels, memory = panels_of(entries), last_memory(entries)
    count = len(panels) + bool(memory)
    columns = min(2, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(5.6 * columns, 0.8 + 2.5 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    steps, layers = steps_of(entries), layer_names(entries)
    depth = colormaps["viridis"](linspace(0, 0.92, len(layers)))  # its upper end is too pale on white
    colors = dict(zip(layers, depth, strict=True))
    for axis, panel in zip(axes, panels, strict=False):
        _draw_panel(axis, steps, panel, colors if panel.per_layer else dict(zip(panel.lines, cycle(COLORS), strict=False)))
    if memory:
        _draw_memory(axes[-1], memory)
    drawn = [axis for axis, panel in zip(axes, panels, strict=False) if panel.per_layer]
    if drawn:
        _draw_layer_legend(figure, drawn, layers)
    return figure


def panels_of(entries: Sequence[Entry]) -> list[Panel]:
    """What there is to draw over steps, without panels that would be empty."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    losses = {key: _top(entries, key) for key in keys if key.endswith("loss")}
    rules = {key: _top(entries, key) for key in STEP_RULES}
    condition = [_over_layers(entry, "condition") for entry in entries]
    residual = [_over_layers(entry, "residual") for entry in entries]
    panels = [
        Panel("loss", losses),
        Panel(", ".join(key for key, series in rules.items() if _drawable(series)), rules),
        Panel(
            "condition",
            {"largest": _reduced(condition, max), "median over layers": _reduced(condition, median)},
            broken=_broken(condition),
        ),
        Panel("residual", {"largest": _reduced(residual, max)}, level=ACCEPT, broken=_broken(residual)),
    ]
    for key in PER_LAYER:
        lines = {name: [as_number(_layer(entry, name).get(key)) for entry in entries] for name in layer_names(entries)}
        panels.append(Panel(key, lines, per_layer=True))
    lean = (replace(panel, lines={n: series for n, series in panel.lines.items() if _drawable(series)}) for panel in panels)
    return [panel for panel in lean if panel.lines]


def steps_of(entries: Sequence[Entry]) -> list[float]:
    """Where each entry lies: at its "step" or "steps", else where the one before lies; at its number if no entry has either."""
    known = [as_number(entry.get("step", entry.get("steps"))) for entry in entries]
    if not any(map(_is_finite, known)):
        return [float(number + 1) for number in range(len(entries))]
    steps: list[float] = []
    for step in known:
        steps.append(step if step is not None and math.isfinite(step) else steps[-1] if steps else 0.0)
    return steps


def layer_names(entries: Sequence[Entry]) -> list[str]:
    """Layers of all entries, in the order in which they appear."""
    return list(dict.fromkeys(name for entry in entries for name in entry.get("layers", {})))


def last_memory(entries: Sequence[Entry]) -> dict[str, float]:
    """Bytes by kind, of the last entry that says; kinds without any are left out."""
    for entry in reversed(entries):
        memory = entry.get("memory")
        if isinstance(memory, Mapping) and memory:
            sizes = {str(kind): as_number(size) for kind, size in memory.items()}
            return {kind: size for kind, size in sizes.items() if size}
    return {}


def as_size(count: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _top(entries: Sequence[Entry], key: str) -> Series:
    return [as_number(entry.get(key)) for entry in entries]


def _layer(entry: Entry, name: str) -> Mapping[str, Any]:
    layer: Mapping[str, Any] = entry.get("layers", {}).get(name, {})
    return layer


def _over_layers(entry: Entry, prefix: str) -> list[float]:
    """For each layer the largest of the values whose names begin so; not of layers that have no statistics yet."""
    worst = []
    for layer in entry.get("layers", {}).values():
        numbers = [as_number(value) for key, value in layer.items() if key.startswith(prefix)]
        values = [number for number in numbers if number is not None]
        if values and layer.get("updates") != 0:
            worst.append(math.nan if any(map(math.isnan, values)) else max(values))
    return worst


def _reduced(by_entry: Sequence[Sequence[float]], reduce: Callable[[Sequence[float]], float]) -> Series:
    """Over the finite values of each entry; NaN where there is none of them."""
    finite = [[value for value in values if math.isfinite(value)] for values in by_entry]
    return [reduce(good) if good else (math.nan if values else None) for good, values in zip(finite, by_entry, strict=True)]


def _broken(by_entry: Sequence[Sequence[float]]) -> list[bool]:
    return [not all(map(math.isfinite, values)) for values in by_entry]


def _drawable(series: Series) -> bool:
    return any(value is not None for value in series)


def _draw_panel(axes: Axes, steps: Sequence[float], panel: Panel, colors: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    marker = "." if len(steps) <= _FEW else None
    for label, series in panel.lines.items():
        axes.plot(*_with_breaks(steps, series), color=colors[label], label=label, linewidth=1.4, marker=marker)
    columns = zip(steps, panel.broken or [False] * len(steps), *panel.lines.values(), strict=True)
    broken = [step for step, hidden, *values in columns if hidden or any(v is not None and not _is_finite(v) for v in values)]
    if broken:
        # At the foot of the panel, since such a value has no height.
        foot = axes.get_xaxis_transform()
        axes.plot(broken, [0.03] * len(broken), "x", color=COLORS[1], transform=foot, label=NOT_FINITE, clip_on=False)
    values = [v for series in panel.lines.values() for v in series if v is not None and _is_finite(v)]
    if panel.level is not None:
        axes.axhline(panel.level, color=COLORS[2], linestyle="--", linewidth=1, label=f"accepted up to {panel.level:g}")
        values.append(panel.level)
    _choose_scale(axes, values)
    axes.set_title(panel.title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if not panel.per_layer:
        axes.legend(frameon=False, fontsize=8)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _with_breaks(steps: Sequence[float], series: Series) -> tuple[list[float], list[float]]:
    """Points of the line; it breaks where a resumed run went back to an earlier step. Missing values are passed over."""
    xs: list[float] = []
    ys: list[float] = []
    for step, value in zip(steps, series, strict=True):
        if value is None:
            continue
        if xs and step <= xs[-1]:
            xs.append(step)
            ys.append(math.nan)
        xs.append(step)
        ys.append(value if math.isfinite(value) else math.nan)
    return xs, ys


def _choose_scale(axes: Axes, values: Sequence[float]) -> None:
    sizes = [abs(value) for value in values if value]
    if not sizes or max(sizes) < _WIDE * min(sizes):
        return
    if min(values) > 0:
        axes.set_yscale("log")
    elif max(sizes) > 100:
        axes.set_yscale("symlog", linthresh=1)


def _draw_layer_legend(figure: Figure, drawn: Sequence[Axes], layers: Sequence[str]) -> None:
    """One for all panels of layers; of many layers it names some, evenly spaced: the color says the depth."""
    handles = {line.get_label(): line for axes in drawn for line in axes.get_lines()}
    shown = [name for name in layers if name in handles]
    if len(shown) > NAMED_LAYERS:
        shown = [shown[round(number * (len(shown) - 1) / (NAMED_LAYERS - 1))] for number in range(NAMED_LAYERS)]
    title = "layers" if len(layers) <= NAMED_LAYERS else f"some of {len(layers)} layers"
    style: dict[str, Any] = {"loc": "outside lower center", "ncols": min(5, len(shown)), "frameon": False, "fontsize": 8}
    figure.legend([handles[name] for name in shown], shown, title=title, title_fontsize=8, **style)


def _draw_memory(axes: Axes, memory: Mapping[str, float]) -> None:
    bars = axes.barh(list(memory), list(memory.values()), color=COLORS[0])
    axes.bar_label(bars, [f" {as_size(size)}" for size in memory.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("memory", fontsize=10, loc="left")
    axes.set_xlim(0, 1.25 * max(memory.values()))
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
