"""The race's picture: a panel for each problem, with each contestant's loss over the steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from kfac_triton.cli.output import tidy

from .optimizers import ADAMW, KFAC_ADAM, KFAC_NAME, MUON, SGD, SHAMPOO, SOAP
from .problems import Problem
from .race import DEFAULT, Outcome, Standing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colors of Okabe and Ito, which the colour-blind can tell apart; the dashes tell the same without colors.
STYLES = {
    ADAMW: ("#000000", "-"),
    SGD: ("#999999", (0, (1, 1))),
    MUON: ("#0072b2", (0, (6, 1.5))),
    SOAP: ("#009e73", (0, (3, 1, 1, 1))),
    SHAMPOO: ("#cc79a7", (0, (6, 1, 1, 1, 1, 1))),
    KFAC_NAME: ("#e69f00", "-"),
    KFAC_ADAM: ("#d55e00", "-"),
    KFAC_ADAM + DEFAULT: ("#d55e00", (0, (2, 1.5))),
}
COLUMNS = 3
EARLY = 0.15  # part of the steps whose losses may lie above a panel


def draw(standings: Sequence[Standing], path: Path) -> None:
    """Write the picture as a PNG.

    Args:
        standings: Problems, and what became of each contestant on them.
        path: File to write.
    """
    # Imported here: matplotlib is an extra.
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(standings))
    rows = math.ceil(len(standings) / columns)
    figure = Figure(figsize=(max(6.4, 4.2 * columns), 3.3 * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, (problem, outcomes) in zip(panels, standings, strict=False):
        _draw_problem(axes, problem, outcomes)
    for axes in panels[len(standings) :]:
        axes.set_axis_off()
    handles = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    names = [name for name in STYLES if name in handles]
    figure.suptitle("Loss over training steps, lower is better. Dotted: AdamW's final loss", fontsize=12)
    ncols = len(names) if columns == COLUMNS else 4
    figure.legend([handles[name] for name in names], names, loc="outside lower center", ncols=ncols, frameon=False)
    figure.savefig(path, format="png", dpi=130)


def _draw_problem(axes: Axes, problem: Problem, outcomes: dict[str, Outcome]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    shown: list[float] = []
    for name, outcome in outcomes.items():
        color, dashes = STYLES[name]
        steps, losses = mean_curve(outcome)
        width = 2.6 if name.removesuffix(DEFAULT) == KFAC_ADAM else 1.4
        axes.plot(steps, losses, color=color, linestyle=dashes, linewidth=width, label=name)
        shown += [loss for step, loss in zip(steps, losses, strict=True) if step >= EARLY * problem.steps]
    if ADAMW in outcomes:
        axes.axhline(mean_curve(outcomes[ADAMW])[1][-1], color=STYLES[ADAMW][0], linewidth=0.8, linestyle=":", label="_")
    finite = [loss for loss in shown if math.isfinite(loss)]
    if finite:
        axes.set_ylim(min(finite) * 0.93, _quantile(finite, 0.97) * 1.05)
    if not problem.is_text:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0, problem.steps)
    axes.set_title(f"{problem.name}: {problem.title}", fontsize=10)
    axes.set(xlabel="steps", ylabel=problem.loss_name)
    tidy(axes)


def mean_curve(outcome: Outcome) -> tuple[list[int], list[float]]:
    """Mean over the seeds at each evaluation; it ends where a run diverged."""
    runs = list(outcome.finals.values())
    length = min(sum(map(math.isfinite, run.losses)) for run in runs)
    return runs[0].steps[:length], [fmean(run.losses[i] for run in runs) for i in range(length)]


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[round(part * (len(values) - 1))]
