"""K-FAC against tuned AdamW on a transformer, a ResNet and a ViT: `make race`, about twenty minutes on two idle cores.

Ctrl-C loses only the run under way: the same command goes on from the log. `make race RACE="--problem text"` passes options
on. One K-FAC run with other settings, its curve printed and nothing logged:

    make race RACE="--problem text --kfac lr=0.3,damping=0.01"
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import math
import re
from collections.abc import Sequence
from typing import Any

from kfac_triton.cli.arguments import NO_FILE, at_least, usable_device, writable_file
from kfac_triton.cli.demo.digits import MissingDataError

from . import images
from .contest import ADAMW, CONTEST, KFAC_NAME, Config, Entry
from .log import Log, LogError
from .problems import FULL, QUICK, Problem
from .race import Outcome, Race, horizons, progress_over, total_steps
from .table import number, reached, render, settings
from .training import Run

CONTESTANTS = {"adamw": ADAMW, "kfac": KFAC_NAME}
INTERRUPTED = 130


def parse_settings(text: str) -> Config:
    """Argument type: `name=value,name=value`; values are Python's literals, `none`, `true`, `false`, or words."""
    config: Config = {}
    for part in filter(None, re.split(r",(?![^[(]*[])])", text)):  # not at the comma of a pair
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name.isidentifier() and value):
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form name=value; write, for example, lr=0.3,damping=0.01")
        config[name] = _value(value)
    return config


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="convergence", description=__doc__.splitlines()[0])
    shown = "(default: %(default)s)"
    parser.add_argument("--problem", action="append", choices=list(CONTEST), help="one problem; may be repeated (default: all)")
    parser.add_argument("--seeds", type=at_least(0), nargs="+", help="of weights and batches (default: 0 1 2; of a trial 0)")
    parser.add_argument("--device", type=usable_device, default="cpu", help=f"cpu, cuda, cuda:1, ... {shown}")
    parser.add_argument(
        "--log", type=writable_file(".json"), default="convergence.json", help=f"finished runs, or {NO_FILE!r} {shown}"
    )
    parser.add_argument("--output", type=writable_file(".png"), default="race.png", help=f"picture, or {NO_FILE!r} {shown}")
    parser.add_argument("--only", choices=list(CONTESTANTS), help="let one contestant race alone")
    parser.add_argument(
        "--rerun", action="append", default=[], choices=list(CONTESTANTS), help="make its runs in the log again"
    )
    parser.add_argument("--quick", action="store_true", help="everything in miniature, to try the race itself")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")
    trial = parser.add_argument_group("one trial run a problem and seed, instead of the race; it is not logged")
    example = "lr=0.3,damping=0.01"
    trial.add_argument(
        "--kfac", type=parse_settings, metavar="SETTINGS", help=f"K-FAC's, over the first of its grid, such as {example}"
    )
    trial.add_argument("--adamw", type=parse_settings, metavar="SETTINGS", help="the same for AdamW, such as lr=4e-3,clip=1.0")
    trial.add_argument("--horizon", type=at_least(1), metavar="STEPS", help="of the trial (default: the one to tune on)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race, or a trial; exit status 130 if interrupted."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    if arguments.horizon is not None and arguments.kfac is None and arguments.adamw is None:
        command_line.error("argument --horizon: it is for trial runs; give --kfac or --adamw with it")
    problems = [p for p in (QUICK if arguments.quick else FULL) if p.name in (arguments.problem or CONTEST)]
    is_trial = arguments.kfac is not None or arguments.adamw is not None
    arguments.seeds = list(dict.fromkeys(arguments.seeds or ([0] if is_trial else [0, 1, 2])))
    if not is_trial and arguments.output is not None and importlib.util.find_spec("matplotlib") is None:
        command_line.error(
            "argument --output: the picture needs matplotlib, which is not installed; "
            f'run: pip install "kfac-triton[demo]", or give --output {NO_FILE}'
        )
    try:
        if not all(problem.is_text for problem in problems):
            images.digits()
        log = Log(arguments.log, rerun=[CONTESTANTS[name] for name in arguments.rerun])
    except MissingDataError as error:
        command_line.error(f"argument --problem: {error}")
    except LogError as error:
        command_line.error(f"argument --log: {error}")
    try:
        return _try(arguments, problems, log) if is_trial else _race(arguments, problems, log)
    except KeyboardInterrupt:
        kept = None if is_trial else log.path
        print(f"\nStopped; {len(log.runs)} runs are in {kept}, the same command goes on from there." if kept else "\nStopped.")
        return INTERRUPTED


def _race(arguments: argparse.Namespace, problems: Sequence[Problem], log: Log) -> int:
    for line in log.remarks(problems, arguments.device):
        print(line)
    names = [CONTESTANTS[arguments.only]] if arguments.only else list(CONTESTANTS.values())
    entries = {problem.name: _entries(problem, names, arguments.quick) for problem in problems}
    standings: list[tuple[Problem, dict[str, Outcome]]] = []
    with progress_over(sum(total_steps(p, entries[p.name], arguments.seeds) for p in problems), arguments.quiet) as progress:
        race = Race(arguments.seeds, arguments.device, log, progress)
        for problem in problems:
            standings.append((problem, race.compete(problem, entries[problem.name])))
    print("\n\n".join(render(problem, outcomes) for problem, outcomes in standings))
    if arguments.output is not None:
        from .picture import draw

        draw(standings, arguments.output)
        print(f"\nPicture: {arguments.output}")
    if log.path is not None:
        print(f"All runs: {log.path}")
    return 0


def _entries(problem: Problem, names: Sequence[str], quick: bool) -> dict[str, Entry]:
    entries = {name: CONTEST[problem.name][name] for name in names}
    return {name: entry.miniature() for name, entry in entries.items()} if quick else entries


def _try(arguments: argparse.Namespace, problems: Sequence[Problem], log: Log) -> int:
    """Trial runs: their curves, and when each got to AdamW's final loss if the log has it."""
    given = {ADAMW: arguments.adamw, KFAC_NAME: arguments.kfac}
    chosen = {name: overrides for name, overrides in given.items() if overrides is not None}
    for problem in problems:
        for name, overrides in chosen.items():
            horizon = arguments.horizon or horizons(problem, name)[0]
            entry = CONTEST[problem.name][name]
            config = entry.configs()[0] | overrides
            for seed in arguments.seeds:
                with progress_over(horizon, arguments.quiet) as progress:
                    race = Race([seed], arguments.device, Log(None), progress)
                    run = race.run(problem, name, config, seed, horizon)
                print(_curve(problem, run, _best_adamw(problem, seed, log)), flush=True)
    return 0


def _curve(problem: Problem, run: Run, target: Run | None) -> str:
    curve = "  ".join(f"{step}: {number(loss)}" for step, loss in zip(run.steps, run.losses, strict=True))
    lines = [
        f"{problem.name}, {run.optimizer}, seed {run.seed}, {run.horizon} steps: {settings(run.config)}",
        f"{problem.loss_name} at step: {curve}",
        f"at the end {number(run.final)}, held-out loss {number(run.held_out_loss)}, held-out accuracy "
        f"{run.held_out_accuracy:.3f}; {run.ms_per_step:.1f} ms a step",
    ]
    if target is not None:
        found = reached(run, target.final)
        when = "not reached" if found is None else f"reached in {found[0]} steps, {found[1]:.1f} s"
        lines.append(
            f"AdamW's best at this seed in the log, {number(target.final)} "
            f"({target.horizon} steps, {target.seconds[-1]:.1f} s): {when}"
        )
    return "\n".join(lines)


def _best_adamw(problem: Problem, seed: int, log: Log) -> Run | None:
    """AdamW's run with the lowest final loss at a seed."""
    runs = [r for r in log.runs if (r.problem, r.version, r.optimizer, r.seed) == (problem.name, problem.version, ADAMW, seed)]
    return min((run for run in runs if math.isfinite(run.final)), key=lambda run: run.final, default=None)


if __name__ == "__main__":
    raise SystemExit(main())
