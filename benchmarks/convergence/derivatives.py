"""K-FAC against tuned Adam on losses that contain derivatives by the input: Poisson's equation, and energies with forces.

    python -m benchmarks.convergence.derivatives  # ten minutes on one idle core; continues if it was interrupted
    python -m benchmarks.convergence.derivatives --problem poisson --seeds 0 1

Each contestant is tuned on seed 0 over two or three configurations; the best one then runs with every seed. K-FAC has a fifth
of Adam's steps, and the target is Adam's final loss.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from kfac_triton.cli.arguments import NO_FILE, at_least, writable_file
from kfac_triton.cli.output import COLORS, progress, table, tidy

from .derivative_problems import PROBLEMS, QUICK, DerivativeProblem
from .derivative_runs import ADAM, CONTEST, KFAC_PART, TUNING_SEED, DerivativeLog, DerivativeRun, horizon, train
from .log import LogError
from .optimizers import Config
from .table import number, settings

INTERRUPTED = 130
_COLUMNS = ("", "seed", "final loss", "final error", "steps to the target", "of Adam's", "seconds", "of Adam's", "ms a step")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="derivatives", description=__doc__.splitlines()[0])
    shown = "(default: %(default)s)"
    names = [problem.name for problem in PROBLEMS]
    parser.add_argument("--problem", action="append", choices=names, help="one problem; may be repeated (default: all)")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help=f"of weights and data {shown}")
    parser.add_argument(
        "--log", type=writable_file(".json"), default="derivatives.json", help=f"finished runs, or {NO_FILE!r} {shown}"
    )
    parser.add_argument(
        "--output", type=writable_file(".png"), default="derivatives.png", help=f"picture, or {NO_FILE!r} {shown}"
    )
    parser.add_argument("--quick", action="store_true", help="everything in miniature, to try the program itself")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Makes the runs that are not in the log, then prints a table for each problem; exit status 130 if interrupted."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    if arguments.output is not None and importlib.util.find_spec("matplotlib") is None:
        command_line.error(f'argument --output: needs matplotlib (pip install "kfac-triton[demo]"), or give {NO_FILE}')
    problems = [p for p in (QUICK if arguments.quick else PROBLEMS) if p.name in (arguments.problem or CONTEST)]
    try:
        log = DerivativeLog(arguments.log)
    except LogError as error:
        command_line.error(f"argument --log: {error}")
    seeds = list(dict.fromkeys(arguments.seeds))
    grids = {
        p.name: {name: found[:2] if arguments.quick else found for name, found in CONTEST[p.name].items()} for p in problems
    }
    count = sum(len(configs) + len(seeds) for grid in grids.values() for configs in grid.values())
    standings: list[tuple[DerivativeProblem, dict[str, Standing]]] = []
    try:
        with progress("derivatives", count, "run", arguments.quiet) as advance:
            for problem in problems:
                standings.append((problem, compete(problem, grids[problem.name], seeds, log, advance)))
                print(render(problem, standings[-1][1]), end="\n\n", flush=True)
    except KeyboardInterrupt:
        print(f"\nStopped; {len(log.runs)} runs are in {log.path}, the same command continues from there.")
        return INTERRUPTED
    if arguments.output is not None:
        draw(standings, arguments.output)
        print(f"Picture: {arguments.output}")
    return 0


class Standing:
    """The tuning runs of a contestant, and the runs of the best configuration, one for each seed."""

    def __init__(self, trials: Sequence[DerivativeRun]) -> None:
        self.trials = list(trials)
        self.winner: Config = min(trials, key=lambda run: run.final).config
        self.finals: list[DerivativeRun] = []


def compete(
    problem: DerivativeProblem,
    grid: dict[str, list[Config]],
    seeds: Sequence[int],
    log: DerivativeLog,
    advance: Callable[[str], None],
) -> dict[str, Standing]:
    """Tunes each contestant, then runs the winners with every seed, one after another at each seed."""

    def run(optimizer: str, config: Config, seed: int) -> DerivativeRun:
        steps = horizon(problem, optimizer)
        wanted = DerivativeRun(problem.name, problem.version, optimizer, config, seed, steps, torch.get_num_threads())
        if wanted.key not in log.runs:
            log.add(train(problem, optimizer, config, seed, steps, lambda: None))
        found = log.runs[wanted.key]
        advance(f"{problem.name}, {optimizer}: {number(found.final)}")
        return found

    standings = {name: Standing([run(name, config, TUNING_SEED) for config in configs]) for name, configs in grid.items()}
    for seed in seeds:
        for name, standing in standings.items():
            standing.finals.append(run(name, standing.winner, seed))
    return standings


def arrival(run: DerivativeRun, target: float) -> tuple[int, float] | None:
    """Steps and seconds until the loss is first at or below the target; None if it never is."""
    return next(((n, t) for n, loss, t in zip(run.steps, run.losses, run.seconds, strict=True) if loss <= target), None)


def ratios(adam: DerivativeRun, other: DerivativeRun) -> tuple[float, float]:
    """Steps and seconds to Adam's final loss over all steps and seconds of Adam; infinite if it is not reached.

    Without a finite target, both are not numbers.
    """
    if not math.isfinite(adam.final):
        return math.nan, math.nan
    found = arrival(other, adam.final)
    return (math.inf, math.inf) if found is None else (found[0] / adam.steps[-1], found[1] / adam.seconds[-1])


def render(problem: DerivativeProblem, standings: dict[str, Standing]) -> str:
    """The results of a problem as text."""
    lines = [f"{problem.name}: {problem.title}; error: {problem.error_name}"]
    for name, standing in standings.items():
        varied = [key for key in standing.winner if len({str(run.config.get(key)) for run in standing.trials}) > 1]
        trials = [
            f"{settings({k: run.config[k] for k in varied if k in run.config})}: {number(run.final)}" for run in standing.trials
        ]
        lines.append(
            f"{name}: {settings(standing.winner)}. Tuned on seed {TUNING_SEED}, {horizon(problem, name)} steps, "
            f"by the final loss: {'; '.join(trials)}."
        )
    adam = standings[ADAM].finals
    rows = [_COLUMNS]
    rows += [_row(name, a, run) for name, s in standings.items() for a, run in zip(adam, s.finals, strict=True)]
    lines += ["", table(rows)]
    for name, standing in standings.items():
        if name != ADAM:
            steps, seconds = zip(*(ratios(a, run) for a, run in zip(adam, standing.finals, strict=True)), strict=True)
            reached = sum(ratio <= KFAC_PART for ratio in steps)
            lines.append(
                f"{name}: the goal (Adam's final loss in {KFAC_PART:g} of its steps) is reached with {reached} of {len(steps)} "
                f"seeds; median {_ratio(median(steps))} of the steps, {_ratio(median(seconds))} of the seconds."
            )
    return "\n".join(lines)


def _row(name: str, adam: DerivativeRun, run: DerivativeRun) -> list[str]:
    found, (steps, seconds) = arrival(run, adam.final), ratios(adam, run)
    return [
        name,
        str(run.seed),
        number(run.final),
        number(run.errors[-1]),
        "never" if found is None else str(found[0]),
        _ratio(steps),
        "never" if found is None else f"{found[1]:.1f}",
        _ratio(seconds),
        f"{run.ms_per_step:.1f}",
    ]


def _ratio(ratio: float) -> str:
    if math.isnan(ratio):
        return "-"
    return f"{ratio:.3f}" if math.isfinite(ratio) else "never"


def draw(standings: Sequence[tuple[DerivativeProblem, dict[str, Standing]]], path: Path) -> None:
    """Writes a picture: for each problem the loss and the error over steps."""
    from matplotlib.figure import Figure  # an extra

    figure = Figure(figsize=(4.6 * len(standings), 7.2), layout="constrained")
    panels = figure.subplots(2, len(standings), squeeze=False)
    for (problem, found), column in zip(standings, panels.T, strict=True):
        column[0].set_title(problem.title, fontsize=10)
        for axes, attribute, label in zip(column, ("losses", "errors"), ("training loss", problem.error_name), strict=True):
            for (name, standing), color in zip(found.items(), COLORS, strict=False):
                for i, run in enumerate(standing.finals):
                    values = [value if math.isfinite(value) else math.nan for value in getattr(run, attribute)]
                    axes.plot(run.steps, values, color=color, label=None if i else name, linewidth=1.2, alpha=0.85)
            axes.set(xlabel="steps", ylabel=label, yscale="log")
            tidy(axes)
        column[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, format="png", dpi=130)


if __name__ == "__main__":
    raise SystemExit(main())
