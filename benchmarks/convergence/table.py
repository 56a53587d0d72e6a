"""What the curves say: steps and seconds to AdamW's final loss, relative to AdamW's, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from textwrap import wrap

from kfac_triton.cli.demo.training import steps_to
from kfac_triton.cli.output import table

from .optimizers import ADAMW, Config
from .problems import HELD_OUT, Problem
from .race import DEFAULT, Outcome
from .training import Run

WIDTH = 80
NEVER = "-"


def reached(run: Run, target: float) -> tuple[int, float] | None:
    """Steps and seconds until the first evaluation at or below the target; None if there is none."""
    number = steps_to(run.losses, target)
    return None if number is None else (run.steps[number - 1], run.seconds[number - 1])


def shares(run: Run, adamw: Run) -> tuple[float, float]:
    """Steps and seconds until AdamW's final loss, as shares of all of AdamW's at the same seed.

    Infinite if the run does not get there, and not a number if AdamW diverged.
    """
    if not math.isfinite(adamw.final):
        return math.nan, math.nan
    found = reached(run, adamw.final)
    return (math.inf, math.inf) if found is None else (found[0] / adamw.steps[-1], found[1] / adamw.seconds[-1])


def cost(run: Run, adamw: Run) -> float:
    """Time of a step, relative to AdamW's at the same seed."""
    return run.ms_per_step / adamw.ms_per_step if adamw.ms_per_step else math.nan


def render(problem: Problem, outcomes: dict[str, Outcome]) -> str:
    """All that is known of one problem, as text of at most 80 columns for three seeds."""
    seeds = ", ".join(str(seed) for seed in next(iter(outcomes.values())).finals)
    heading = f"{problem.name}: {problem.title}; {problem.steps} steps of {problem.batch}"
    rows = [["held-out loss:", "mean", f"seeds {seeds}", "steps", "a step", "time"]]
    rows += [_row(name, outcome, outcomes.get(ADAMW)) for name, outcome in outcomes.items()]
    of_target = "" if problem.target == HELD_OUT else f"{problem.target} "
    notes = [
        f"steps: until AdamW's final {of_target}loss, as shares of AdamW's steps, at each seed ({NEVER}: never); a step: its "
        "time in units of AdamW's; time: until that loss, in units of AdamW's whole time; medians over the seeds."
    ]
    notes += _tuning(problem, outcomes)
    return "\n".join(
        [heading, "", table(rows), "", *(line for note in notes for line in wrap(note, WIDTH, subsequent_indent="  "))]
    )


def _row(name: str, outcome: Outcome, adamw: Outcome | None) -> list[str]:
    losses = [run.held_out_loss for run in outcome.finals.values()]
    cells = [name, short(fmean(losses)), " ".join(map(short, losses))]
    if adamw is None:
        return [*cells, "", "", ""]
    pairs = [(run, adamw.finals[seed]) for seed, run in outcome.finals.items()]
    found = [shares(run, theirs) for run, theirs in pairs]
    steps = " ".join(_share(of_steps) for of_steps, _ in found)
    return [*cells, steps, _share(median(cost(*pair) for pair in pairs)), _share(_median([seconds for _, seconds in found]))]


def _tuning(problem: Problem, outcomes: dict[str, Outcome]) -> list[str]:
    """The tuning budgets, the winners, and between what the trials ended."""
    tuned = {name: outcome for name, outcome in outcomes.items() if not name.endswith(DEFAULT)}
    counts = {len(outcome.trials) for outcome in tuned.values()}
    seed = next(iter(tuned.values())).trials[0].seed
    number_of = f"{counts.pop()} configurations each" if len(counts) == 1 else "unequal numbers of configurations"
    lines = [f"Tuned on seed {seed}, {number_of}, every one over all steps, by the final {problem.loss_name}:"]
    for name, outcome in tuned.items():
        varied = [key for key in outcome.winner if len({str(run.config[key]) for run in outcome.trials}) > 1]
        finals = [run.final for run in outcome.trials]
        lines.append(
            f"  {name}: {settings({key: outcome.winner[key] for key in varied})} "
            f"({len(finals)} trials: {short(min(finals))} to {short(max(finals))})"
            + "".join(f"; {edge} of its grid" for edge in outcome.edges)
        )
    return lines


def settings(config: Config) -> str:
    """Settings in words."""
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in config.items())


def number(loss: float) -> str:
    """A loss with four digits."""
    return f"{loss:.4g}" if math.isfinite(loss) else "diverged"


def short(loss: float) -> str:
    """A loss in at most six characters, diverged runs apart: four digits, or three behind a leading zero."""
    if not math.isfinite(loss):
        return "inf"
    digits = max(0, 3 - math.floor(math.log10(loss))) if loss >= 1 else 3 if loss >= 0.1 else 4
    return f"{loss:.{digits}f}"


def _share(ratio: float) -> str:
    if math.isnan(ratio):
        return "?"
    return f"{ratio:.2f}" if math.isfinite(ratio) else NEVER


def _median(values: Sequence[float]) -> float:
    """Not a number if one of the values is none."""
    return math.nan if any(map(math.isnan, values)) else median(values)
