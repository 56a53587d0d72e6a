"""KFACAdam and K-FAC against AdamW, SGD, Muon, SOAP and Shampoo: `make race`, at most an hour and a half on two idle cores.

Ctrl-C loses only the runs under way: the same command continues from the log. `make race RACE="--problem text"` passes options.
SOAP and Shampoo race if you have the implementations of their authors (github.com/nikhilvyas/SOAP and
github.com/facebookresearch/optimizers):

    make race RACE="--soap SOAP/soap.py --shampoo optimizers"

One run with other settings, whose curve is printed, and which is not logged:

    make race RACE="--problem text --try kfacadam:lr=0.02,noise_damping=0"
"""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from kfac_triton.cli.arguments import NO_FILE, at_least, usable_device, writable_file
from kfac_triton.cli.demo.digits import MissingDataError

from . import images, peers, trials
from .contest import CONTEST, Entry
from .log import Log, LogError
from .optimizers import CONTESTANTS
from .peers import SHAMPOO, SOAP
from .problems import BY_NAME, RACE, Problem
from .progress import progress_over
from .race import Race, total_steps
from .table import render
from .trials import Trial, of_one, parse_trial

INTERRUPTED = 130
MOST_JOBS = 4
Contest = list[tuple[Problem, dict[str, Entry]]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="convergence", description=__doc__.splitlines()[0])
    shown = "(default: %(default)s)"
    parser.add_argument(
        "--problem", action="append", choices=list(CONTEST), help="one problem; may be repeated (default: the six quick ones)"
    )
    parser.add_argument("--seeds", type=at_least(0), nargs="+", help="of weights and batches (default: 0 1 2; of a trial 0)")
    parser.add_argument("--soap", type=Path, metavar="PATH", help="soap.py of SOAP's authors, or a folder with it")
    parser.add_argument("--shampoo", type=Path, metavar="PATH", help="a folder with the package distributed_shampoo")
    parser.add_argument("--device", type=usable_device, default="cpu", help=f"cpu, cuda, cuda:1, ... {shown}")
    parser.add_argument(
        *("--jobs", "-j"),
        type=at_least(1),
        help=f"processes that share the runs, on a CPU of one thread each (default: one for each core, at most {MOST_JOBS}; "
        "on a GPU one)",
    )
    parser.add_argument(
        "--log", type=writable_file(".json"), default="convergence.json", help=f"finished runs, or {NO_FILE!r} {shown}"
    )
    parser.add_argument("--output", type=writable_file(".png"), default="race.png", help=f"picture, or {NO_FILE!r} {shown}")
    one = {"action": "append", "choices": list(CONTESTANTS), "default": []}
    parser.add_argument("--only", **one, help="a contestant that races; may be repeated (default: all)")
    parser.add_argument("--rerun", **one, help="make its runs in the log again")
    parser.add_argument("--quick", action="store_true", help="everything in miniature, to try the race itself")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")
    trial = parser.add_argument_group("trial runs, one a problem and seed, instead of the race; they are not logged")
    trial.add_argument(
        *("--try", "-t"),
        dest="trials",
        action="append",
        default=[],
        type=parse_trial,
        metavar="NAME:SETTINGS",
        help="a contestant's, over the first of its grid, such as muon:lr=0.03,rest_lr=0.01; may be repeated",
    )
    for name in ("kfac", "adamw"):
        same = {"action": "append", "default": [], "metavar": "SETTINGS", "help": f"the same as --try {name}:SETTINGS"}
        trial.add_argument(f"--{name}", type=partial(of_one, name), **same)
    trial.add_argument("--horizon", type=at_least(1), metavar="STEPS", help="of the trials (default: the problem's)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the race, or trials; exit status 130 if interrupted."""
    command_line = parser()
    arguments = command_line.parse_args(argv)
    given = [*arguments.trials, *arguments.kfac, *arguments.adamw]
    if arguments.horizon is not None and not given:
        command_line.error("argument --horizon: it is for trial runs; give --try with it")
    arguments.seeds = list(dict.fromkeys(arguments.seeds or ([0] if given else [0, 1, 2])))
    if not given and arguments.output is not None and importlib.util.find_spec("matplotlib") is None:
        command_line.error(
            "argument --output: the picture needs matplotlib, which is not installed; "
            f'run: pip install "kfac-triton[demo]", or give --output {NO_FILE}'
        )
    names = arguments.problem or [problem.name for problem in RACE]
    problems = [problem.miniature() if arguments.quick else problem for name, problem in BY_NAME.items() if name in names]
    try:
        if not all(problem.is_text for problem in problems):
            images.digits()
        peers.use({n: p for n, p in ((SOAP, arguments.soap), (SHAMPOO, arguments.shampoo)) if p is not None})
        _require_peers(arguments, given)
        log = Log(arguments.log, rerun=[CONTESTANTS[name] for name in arguments.rerun])
    except MissingDataError as error:
        command_line.error(f"argument --problem: {error}")
    except peers.MissingPeerError as error:
        command_line.error(str(error))
    except LogError as error:
        command_line.error(f"argument --log: {error}")
    threads = torch.get_num_threads()
    if arguments.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        return _try(arguments, problems, given, log) if given else _race(arguments, problems, log)
    except KeyboardInterrupt:
        kept = None if given else log.path
        print(f"\nStopped; {len(log.runs)} runs are in {kept}, the same command goes on from there." if kept else "\nStopped.")
        return INTERRUPTED
    finally:
        torch.set_num_threads(threads)


def _require_peers(arguments: argparse.Namespace, given: Sequence[Trial]) -> None:
    """Refuse a peer that is asked for by name and that has no place."""
    for name in (SOAP, SHAMPOO):
        asked = name in [CONTESTANTS[key] for key in arguments.only] or name in [trial.optimizer for trial in given]
        if asked and name not in peers.places():
            raise peers.MissingPeerError(f"{name} has to be fetched by you; give its place by --{name.lower()}")


def _race(arguments: argparse.Namespace, problems: Sequence[Problem], log: Log) -> int:
    for line in log.remarks(problems, arguments.device):
        print(line)
    contest = _contest(arguments, problems)
    total = sum(total_steps(problem, entries, arguments.seeds) for problem, entries in contest)
    with progress_over(total, arguments.quiet) as progress:
        jobs = arguments.jobs or (min(MOST_JOBS, os.cpu_count() or 1) if arguments.device.type == "cpu" else 1)
        standings = Race(arguments.seeds, arguments.device, log, progress, jobs).compete(contest)
    print("\n\n".join(render(problem, outcomes) for problem, outcomes in standings))
    if arguments.output is not None:
        from .picture import draw

        draw(standings, arguments.output)
        print(f"\nPicture: {arguments.output}")
    if log.path is not None:
        print(f"All runs: {log.path}")
    return 0


def _contest(arguments: argparse.Namespace, problems: Sequence[Problem]) -> Contest:
    """Problems, and the entries of those that race; which peers do not is printed."""
    names = [name for key, name in CONTESTANTS.items() if not arguments.only or key in arguments.only]
    for name in (SOAP, SHAMPOO):
        if name in names and name not in peers.places():
            names.remove(name)
            print(f"{name} does not race: --{name.lower()} PATH has to name its authors' code.")
    entries = [(problem, {name: CONTEST[problem.name][name] for name in names}) for problem in problems]
    return [(p, {n: e.miniature() for n, e in of_p.items()}) for p, of_p in entries] if arguments.quick else entries


def _try(arguments: argparse.Namespace, problems: Sequence[Problem], given: Sequence[Trial], log: Log) -> int:
    for problem in problems:
        for trial in given:
            for seed in arguments.seeds:
                horizon = arguments.horizon or problem.steps
                with progress_over(horizon, arguments.quiet) as progress:
                    race = Race([seed], arguments.device, Log(None), progress)
                    config = CONTEST[problem.name][trial.optimizer].configs()[0] | trial.settings
                    run = race.run(problem, trial.optimizer, config, seed, horizon)
                print(trials.curve(problem, run, log), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
