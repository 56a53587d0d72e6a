"""What the curves say: steps and seconds to AdamW's final loss, their ratios, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from kfac_triton.cli.demo.training import steps_to
from kfac_triton.cli.output import table

from .contest import ADAMW, KFAC_NAME, Config
from .problems import Problem
from .race import Outcome, horizons
from .training import Run


def reached(run: Run, target: float) -> tuple[int, float] | None:
    """Steps and seconds until the first evaluation at or below the target; None if there is none."""
    number = steps_to(run.losses, target)
    return None if number is None else (run.steps[number - 1], run.seconds[number - 1])


@dataclass(frozen=True)
class Comparison:
    """AdamW and K-FAC at one seed; the target is AdamW's final loss.

    AdamW's own steps and seconds count until it is first at or below the target: its end, or earlier.
    """

    adamw: Run
    kfac: Run

    @property
    def comparable(self) -> bool:
        """Whether AdamW has a finite loss to compare with."""
        return math.isfinite(self.adamw.final)

    @property
    def steps_ratio(self) -> float:
        """K-FAC's steps over AdamW's; infinite if K-FAC does not get there, not a number without a target."""
        return self._ratio(0)

    @property
    def seconds_ratio(self) -> float:
        """K-FAC's seconds over AdamW's, in the same way."""
        return self._ratio(1)

    def _ratio(self, which: int) -> float:
        theirs, ours = reached(self.adamw, self.adamw.final), reached(self.kfac, self.adamw.final)
        if not self.comparable or theirs is None or theirs[which] <= 0:
            return math.nan
        return math.inf if ours is None else ours[which] / theirs[which]


def compare(adamw: Outcome, kfac: Outcome) -> dict[int, list[Comparison]]:
    """K-FAC's horizon to the comparisons, one a seed."""
    theirs = {seed: run for (seed, _), run in adamw.finals.items()}
    found: dict[int, list[Comparison]] = {}
    for (seed, horizon), run in kfac.finals.items():
        found.setdefault(horizon, []).append(Comparison(theirs[seed], run))
    return found


def median_ratios(comparisons: Sequence[Comparison]) -> tuple[float, float]:
    """Medians over the seeds of the ratios of steps and of seconds; a seed without a target leaves none."""
    pairs = [(c.steps_ratio, c.seconds_ratio) for c in comparisons]
    if any(math.isnan(value) for pair in pairs for value in pair):
        return math.nan, math.nan
    return median(steps for steps, _ in pairs), median(seconds for _, seconds in pairs)


def render(problem: Problem, outcomes: dict[str, Outcome]) -> str:
    """All that is known of one problem, as text."""
    lines = [f"{problem.name}: {problem.title}", *(_tuning(problem, name, found) for name, found in outcomes.items())]
    for name, outcome in outcomes.items():
        lines += [f"Warning: {name}'s {edge} of its grid: a better one may lie beyond." for edge in outcome.edges]
    if set(outcomes) < {ADAMW, KFAC_NAME}:
        return "\n".join([*lines, "", table([_ALONE, *_alone(outcomes)])])
    rows = [_COMPARED]
    comparisons = compare(outcomes[ADAMW], outcomes[KFAC_NAME])
    for horizon, group in comparisons.items():
        rows += [_row(horizon, comparison) for comparison in group]
    lines += ["", f"Target: AdamW's final {problem.loss_name}. K-FAC's steps and seconds to it, over AdamW's:", table(rows)]
    for horizon, group in comparisons.items():
        steps, seconds = median_ratios(group)
        lines.append(
            f"{problem.name}, K-FAC over {horizon} steps, AdamW over {problem.steps}: "
            f"median over {len(group)} seeds {_ratio(steps)} of the steps, {_ratio(seconds)} of the seconds."
        )
    return "\n".join(lines)


_COMPARED = [
    *("seed", "horizon", "AdamW loss", "K-FAC loss", "steps", "ratio", "seconds", "ratio", "ms a step"),
    *("held-out loss", "held-out accuracy"),
]
_ALONE = ["", "seed", "horizon", "loss", "ms a step", "held-out loss", "held-out accuracy"]


def _row(horizon: int, comparison: Comparison) -> list[str]:
    adamw, kfac = comparison.adamw, comparison.kfac
    theirs, ours = reached(adamw, adamw.final), reached(kfac, adamw.final)
    if not comparison.comparable:
        steps, seconds = "no target", "no target"
    else:
        assert theirs is not None
        steps = f"{theirs[0]} -> {'never' if ours is None else ours[0]}"
        seconds = f"{theirs[1]:.1f} -> {'never' if ours is None else format(ours[1], '.1f')}"
    return [
        str(kfac.seed),
        str(horizon),
        number(adamw.final),
        number(kfac.final),
        steps,
        _ratio(comparison.steps_ratio),
        seconds,
        _ratio(comparison.seconds_ratio),
        f"{adamw.ms_per_step:.1f} -> {kfac.ms_per_step:.1f}",
        f"{number(adamw.held_out_loss)} -> {number(kfac.held_out_loss)}",
        f"{adamw.held_out_accuracy:.3f} -> {kfac.held_out_accuracy:.3f}",
    ]


def _alone(outcomes: dict[str, Outcome]) -> list[list[str]]:
    """RowSource of a contestant that races alone."""
    return [
        [
            name,
            str(seed),
            str(horizon),
            number(run.final),
            f"{run.ms_per_step:.1f}",
            number(run.held_out_loss),
            f"{run.held_out_accuracy:.3f}",
        ]
        for name, outcome in outcomes.items()
        for (seed, horizon), run in outcome.finals.items()
    ]


def _tuning(problem: Problem, name: str, outcome: Outcome) -> str:
    """The tuning budget, the winner, and how every trial ended."""
    varied = [key for key in outcome.winner if len({str(run.config[key]) for run in outcome.trials}) > 1]
    trials = "; ".join(f"{settings({key: run.config[key] for key in varied})}: {number(run.final)}" for run in outcome.trials)
    return (
        f"{name}: {settings(outcome.winner)}. Tuned on seed {outcome.trials[0].seed}: {len(outcome.trials)} configurations, "
        f"each over its whole schedule of {horizons(problem, name)[0]} steps ({outcome.tuning_steps} steps in all), "
        f"by the final {problem.loss_name}: {trials}."
    )


def settings(config: Config) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in config.items())


def number(loss: float) -> str:
    """A loss with four digits."""
    return f"{loss:.4g}" if math.isfinite(loss) else "diverged"


def _ratio(ratio: float) -> str:
    if math.isnan(ratio):
        return "-"
    return f"{ratio:.2f}" if math.isfinite(ratio) else "never"
