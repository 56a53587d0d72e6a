"""The picture of `kfac-triton report`: panels over the steps of a log; matplotlib is imported where it draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle
from statistics import median
from typing import TYPE_CHECKING, Any

from ...curvature.inverse import ACCEPT
from ...scalars import as_number
from ..output import COLORS, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Entry = Mapping[str, Any]
Series = Sequence[float | None]  # a value for each entry; None where the log has none

NAMED_LAYERS = 10
NOT_FINITE = "not finite"
STEP_RULES = ("kl_clip_scale", "reduction_ratio", "damping")
PER_LAYER = ("cosine", "update_norm")  # panels of a line for each layer; these share one legend
_WIDE = 20  # largest over smallest value from which on an axis is logarithmic
_FEW = 40  # entries up to which each is marked: a single one has no line


def figure_of(entries: Sequence[Entry], name: str) -> Figure:
    """The panels that the log has values for, memory last.

    Args:
        entries: of the log, in its order, with the layers to show.
        name: of the log, for the line on top.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels, memory, layers = panels_of(entries), last_memory(entries), layer_names(entries)
    count = len(panels) + bool(memory)
    rows, columns = math.ceil(count / 2), min(2, count)
    figure = Figure(figsize=(5.6 * columns, 0.8 + 2.5 * rows), layout="constrained")
    steps = steps_of(entries)
    figure.suptitle(f"{name}, steps {min(steps):g} to {max(steps):g}", fontsize=12)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    # The upper end of this color map is too pale on white.
    depth = {name: colormaps["viridis"](0.85 * number / max(1, len(layers) - 1)) for number, name in enumerate(layers)}
    handles: dict[str, Any] = {}
    for axis, (panel, lines) in zip(axes, panels.items(), strict=False):
        colors = depth if panel in PER_LAYER else dict(zip(lines, cycle(COLORS), strict=False))
        _draw_panel(axis, panel, steps, lines, colors)
        if panel in PER_LAYER:
            handles |= {str(line.get_label()): line for line in axis.get_lines()}
        else:
            axis.legend(frameon=False, fontsize=8)
    if memory:
        _draw_memory(axes[-1], memory)
    # One legend for all panels of layers; of many layers it names some, evenly spaced: the color says the depth.
    shown = [name for name in layers if name in handles]
    if shown:
        places = sorted({round(n * (len(shown) - 1) / (NAMED_LAYERS - 1)) for n in range(NAMED_LAYERS)})
        shown = [shown[place] for place in places]
        title = "layers" if len(layers) <= NAMED_LAYERS else f"some of {len(layers)} layers"
        style: dict[str, Any] = {"loc": "outside lower center", "ncols": min(5, len(shown)), "frameon": False, "fontsize": 8}
        figure.legend([handles[name] for name in shown], shown, title=title, title_fontsize=8, **style)
    return figure


def panels_of(entries: Sequence[Entry]) -> dict[str, dict[str, Series]]:
    """Title -> label -> series: what there is to draw over steps, without panels that would be empty."""
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    condition = [_over_layers(entry, "condition") for entry in entries]

    layers = {name: [entry.get("layers", {}).get(name, {}) for entry in entries] for name in layer_names(entries)}

    def series(key: str, places: Sequence[Mapping[str, Any]] = entries) -> Series:
        return [as_number(place.get(key)) for place in places]

    panels: dict[str, dict[str, Series]] = {
        "loss": {key: series(key) for key in keys if key.endswith("loss")},
        "": {key: series(key) for key in STEP_RULES},
        "condition": {
            "largest": [max(values, default=None) for values in condition],
            "median over layers": [median(values) if values else None for values in condition],
        },
        "residual": {"largest": [max(_over_layers(entry, "residual"), default=None) for entry in entries]},
        **{key: {name: series(key, places) for name, places in layers.items()} for key in PER_LAYER},
    }
    for title, lines in panels.items():
        panels[title] = {label: values for label, values in lines.items() if any(value is not None for value in values)}
    return {title or ", ".join(lines): lines for title, lines in panels.items() if lines}


def steps_of(entries: Sequence[Entry]) -> list[float]:
    """Where each entry lies: at its "step" or "steps", else where the one before lies; at its number if no entry has either."""
    values = [as_number(entry.get("step", entry.get("steps"))) for entry in entries]
    known = [math.nan if value is None else value for value in values]
    if not any(map(math.isfinite, known)):
        return [float(number + 1) for number in range(len(entries))]
    return list(accumulate(known, lambda last, step: step if math.isfinite(step) else last, initial=0.0))[1:]


def layer_names(entries: Sequence[Entry]) -> list[str]:
    """Layers of all entries, in the order in which they appear."""
    return list(dict.fromkeys(name for entry in entries for name in entry.get("layers", {})))


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The numbers among some values."""
    numbers = {str(key): as_number(value) for key, value in values.items()}
    return {key: number for key, number in numbers.items() if number is not None}


def last_memory(entries: Sequence[Entry]) -> dict[str, float]:
    """Bytes by kind, of the last entry that says; kinds without any are left out."""
    memories = [entry["memory"] for entry in entries if entry.get("memory") and isinstance(entry["memory"], Mapping)]
    return {kind: size for kind, size in numbers_of(memories[-1]).items() if size} if memories else {}


def as_size(count: float) -> str:
    """Bytes in a unit that leaves few digits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def _over_layers(entry: Entry, prefix: str) -> list[float]:
    """For each layer the largest of the values whose names begin so, NaN as infinity; not of layers without statistics."""
    layers = [numbers_of(layer) for layer in entry.get("layers", {}).values() if layer.get("updates") != 0]
    values = [[value for key, value in layer.items() if key.startswith(prefix)] for layer in layers]
    return [max(math.inf if math.isnan(value) else value for value in of_layer) for of_layer in values if of_layer]


def _draw_panel(axes: Axes, title: str, steps: Sequence[float], lines: Mapping[str, Series], colors: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    marker = "." if len(steps) <= _FEW else None
    for label, series in lines.items():
        axes.plot(*_with_breaks(steps, series), color=colors[label], label=label, linewidth=1.4, marker=marker)
    points = [
        (step, value) for series in lines.values() for step, value in zip(steps, series, strict=True) if value is not None
    ]
    broken = sorted({step for step, value in points if not math.isfinite(value)})
    if broken:
        # At the foot of the panel, since such a value has no height.
        foot = axes.get_xaxis_transform()
        axes.plot(broken, [0.03] * len(broken), "kx", transform=foot, label=NOT_FINITE, clip_on=False)
    values = [value for _, value in points if math.isfinite(value)]
    if title == "residual":
        axes.axhline(ACCEPT, color="gray", linestyle="--", linewidth=1, label=f"accepted up to {ACCEPT:g}")
        values.append(ACCEPT)
    sizes = [abs(value) for value in values if value]
    if sizes and max(sizes) >= _WIDE * min(sizes):
        if min(values) > 0:
            axes.set_yscale("log")
        elif max(sizes) > 100:
            axes.set_yscale("symlog", linthresh=1)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(labelsize=8)
    tidy(axes)


def _with_breaks(steps: Sequence[float], series: Series) -> tuple[list[float], list[float]]:
    """Points of the line; it breaks where a resumed run went back to an earlier step. Missing values are passed over."""
    points: list[tuple[float, float]] = []
    for step, value in zip(steps, series, strict=True):
        if value is None:
            continue
        if points and step <= points[-1][0]:
            points.append((step, math.nan))
        points.append((step, value if math.isfinite(value) else math.nan))
    return [step for step, _ in points], [value for _, value in points]


def _draw_memory(axes: Axes, memory: Mapping[str, float]) -> None:
    bars = axes.barh(list(memory), list(memory.values()), color=COLORS[1])
    axes.bar_label(bars, [f" {as_size(size)}" for size in memory.values()], fontsize=8)
    axes.invert_yaxis()
    axes.set_title("memory", fontsize=10, loc="left")
    axes.set_xlim(0, 1.25 * max(memory.values()))
    axes.set_xticks([])
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
