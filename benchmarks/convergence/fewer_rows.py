"""K-FAC with fewer rows and smaller factors against K-FAC with everything: what it costs in loss.

    python -m benchmarks.convergence.fewer_rows                          # an hour on one core; continues if it was interrupted
    python -m benchmarks.convergence.fewer_rows --problem wide --seeds 0 1

Each choice trains from the same weights on the same batches as the reference; differences are taken within a seed. Choices run
one after another, each with all seeds. If the program is stopped, the tables contain the choices that are finished.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from kfac_triton.cli.arguments import NO_FILE, at_least, usable_device, writable_file
from kfac_triton.cli.demo.digits import MissingDataError
from kfac_triton.cli.output import table

from . import images
from .choices import CONTROL, EVERYTHING, Choice, choices
from .differences import Differences, differences
from .log import Log, LogError
from .optimizers import KFAC_NAME
from .problems import BY_NAME, Problem
from .progress import progress_over
from .race import Race
from .table import number, reached
from .training import Run

NAMES = ("text-large", "vit-large", "wide")
INTERRUPTED = 130
_COLUMNS = ["choice", "rows : size", "largest block", "final loss of each seed", "difference", "of the spread"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="fewer_rows", description=__doc__.splitlines()[0])
    shown = "(default: %(default)s)"
    parser.add_argument("--problem", action="append", choices=NAMES, help="one problem; may be repeated (default: all)")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", default=[0, 1, 2], help=f"of weights and batches {shown}")
    parser.add_argument("--device", type=usable_device, default="cpu", help=f"cpu, cuda, cuda:1, ... {shown}")
    parser.add_argument(
        "--log", type=writable_file(".json"), default="fewer_rows.json", help=f"finished runs, or {NO_FILE!r} {shown}"
    )
    parser.add_argument("--quick", action="store_true", help="everything in miniature, to try the program itself")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Make the runs that are not in the log, then print a table for each problem; exit status 130 if interrupted."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    problems = [BY_NAME[name] for name in NAMES if name in (arguments.problem or NAMES)]
    if arguments.quick:
        problems = [problem.miniature() for problem in problems]
    try:
        if not all(problem.is_text for problem in problems):
            images.digits()
        log = Log(arguments.log)
    except MissingDataError as error:
        command_line.error(f"argument --problem: {error}")
    except LogError as error:
        command_line.error(f"argument --log: {error}")
    for line in log.remarks(problems, arguments.device):
        print(line)
    compared = [(problem, choices(problem)) for problem in problems]
    seeds = list(dict.fromkeys(arguments.seeds))
    total = sum(len(found) * len(seeds) * horizon(problem) for problem, found in compared)
    with progress_over(total, arguments.quiet) as progress:
        race = Race(seeds, arguments.device, log, progress)
        try:
            for problem, found in compared:
                for choice in found:
                    for seed in seeds:
                        race.run(problem, KFAC_NAME, choice.config, seed, horizon(problem))
            status = 0
        except KeyboardInterrupt:
            print(f"\nStopped; {len(log.runs)} runs are in {log.path}, the same command continues from there. Until then:\n")
            status = INTERRUPTED
    print("\n\n".join(render(problem, *finished(race, problem, found)) for problem, found in compared))
    return status


def finished(race: Race, problem: Problem, compared: Sequence[Choice]) -> tuple[list[Choice], list[list[Run]]]:
    """The choices that have run with all seeds, and their runs, one for each seed."""
    found: list[tuple[Choice, list[Run]]] = []
    for choice in compared:
        runs = [race.log.find(problem, KFAC_NAME, choice.config, s, horizon(problem), race.device) for s in race.seeds]
        if all(runs):
            found.append((choice, [run for run in runs if run is not None]))
    return [choice for choice, _ in found], [runs for _, runs in found]


def horizon(problem: Problem) -> int:
    """Steps of each run: half of the problem's."""
    return max(1, round(problem.steps / 2))


def render(problem: Problem, compared: Sequence[Choice], runs: Sequence[Sequence[Run]]) -> str:
    """The table of a problem, and what its seeds can tell."""
    if not compared or compared[0].name != EVERYTHING:
        return f"{problem.name}: {problem.title}; nothing to compare with yet"
    controls = [i for i, choice in enumerate(compared) if choice.name == CONTROL]
    found = differences([[run.final for run in of_choice] for of_choice in runs], uncounted=controls)
    early = [_three_quarters(run) for run in runs[0]]
    rows = [[*_COLUMNS, f"steps to the reference's loss at {early[0][0]}"]]
    for i, (choice, of_choice) in enumerate(zip(compared, runs, strict=True)):
        arrivals = [reached(run, loss) for run, (_, loss) in zip(of_choice, early, strict=True)]
        rows.append(
            [
                choice.name,
                f"{choice.rows_per_size:.2g}",
                str(choice.block),
                ", ".join(number(run.final) for run in of_choice),
                *_difference(found, i),
                ", ".join("never" if arrival is None else str(arrival[0]) for arrival in arrivals),
            ]
        )
    lines = [f"{problem.name}: {problem.title}; final {problem.loss_name} after {horizon(problem)} steps", table(rows)]
    if found.detectable is not None:
        lines.append(
            f"A difference of one choice from the first row is told from chance (95 %) if it exceeds "
            f"{100 * found.detectable:.1f} %; the spread of the first row over the seeds is {100 * found.spread:.1f} %."
        )
    return "\n".join(lines)


def _difference(found: Differences, choice: int) -> list[str]:
    """Of a choice from the reference, in percent and relative to the reference's spread over the seeds."""
    mean = found.means[choice]
    if choice == 0 or mean is None:
        return ["", ""] if choice == 0 else ["diverged", ""]
    told = "" if found.detectable is None or abs(mean) <= found.detectable else " *"
    return [f"{100 * mean:+.1f} %{told}", f"{mean / found.spread:+.2f}" if found.spread else ""]


def _three_quarters(run: Run) -> tuple[int, float]:
    """The first evaluation after three quarters of the steps, where the learning rate is not yet near zero: step and loss."""
    return next((step, loss) for step, loss in zip(run.steps, run.losses, strict=True) if step >= 0.75 * run.horizon)


if __name__ == "__main__":
    raise SystemExit(main())
