"""The race's picture: for each problem its loss over steps, and below over seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from kfac_triton.cli.output import tidy

from .contest import ADAMW, KFAC_NAME
from .problems import Problem
from .race import Outcome
from .training import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Standing = tuple[Problem, dict[str, Outcome]]
COLORS = {ADAMW: ("#1f5f99",), KFAC_NAME: ("#c0392b", "#e59866")}


def draw(standings: Sequence[Standing], path: Path) -> None:
    """Write the picture as a PNG.

    Args:
        standings: Problems, and what became of each contestant on them.
        path: File to write.
    """
    # Imported here: matplotlib is an extra.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(standings), 7.2), layout="constrained")
    panels = figure.subplots(2, len(standings), squeeze=False)
    for (problem, outcomes), (by_steps, by_seconds) in zip(standings, panels.T, strict=True):
        by_steps.set_title(problem.title, fontsize=10)
        by_steps.set(xlabel="steps", ylabel=problem.loss_name)
        by_seconds.set(xlabel="seconds of training", ylabel=problem.loss_name)
        _draw_problem(by_steps, by_seconds, outcomes)
        if not problem.is_text:
            by_steps.set_yscale("log")
            by_seconds.set_yscale("log")
        by_steps.legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=130)


def _draw_problem(by_steps: Axes, by_seconds: Axes, outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        colors = dict(zip(sorted({horizon for _, horizon in outcome.finals}), COLORS[name], strict=False))
        labelled = set()
        for (_, horizon), run in outcome.finals.items():
            label = None if horizon in labelled else f"{name}, {horizon} steps"
            labelled.add(horizon)
            losses = [loss if math.isfinite(loss) else math.nan for loss in run.losses]
            by_steps.plot(run.steps, losses, color=colors[horizon], label=label, linewidth=1.3, alpha=0.85)
            by_seconds.plot(run.seconds, losses, color=colors[horizon], linewidth=1.3, alpha=0.85)
    for axes in (by_steps, by_seconds):
        target = _target(list(outcomes[ADAMW].finals.values())) if ADAMW in outcomes else math.inf
        if math.isfinite(target):
            axes.axhline(target, color=COLORS[ADAMW][0], linewidth=0.9, linestyle=":")
        tidy(axes)


def _target(runs: Sequence[Run]) -> float:
    """AdamW's final loss, the median over the seeds."""
    return median(run.final for run in runs)
