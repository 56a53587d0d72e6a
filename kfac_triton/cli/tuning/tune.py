"""`kfac-triton tune`: times tile configurations of the kernels on this device and keeps the fastest."""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from functools import partial

import torch

from ...kernels import runtime, tuning
from ..arguments import add_device, at_least
from ..output import progress
from .checks import Problem
from .search import every_candidate, search, slots, write
from .stopwatch import Stopwatch, captured

HELP = "find the fastest tile configurations for this device"
DESCRIPTION = (
    "Time tile configurations of the kernels on scratch tensors, each after a check of its result against "
    "float64, and write the fastest to the user's configuration file, which wins over the shipped one."
)
NO_KERNEL = 2  # exit status
_LARGEST = 72 if runtime.INTERPRETED else 1024
_SECONDS_OF_A_CANDIDATE = 0.2
_MOST_RUNS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `tune`."""
    add_device(parser, "cuda, cuda:1, ...")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="tune this kernel alone; may be repeated")
    largest = "side of the largest matrices to time (default: %(default)s)"
    parser.add_argument("--largest", type=at_least(16), default=_LARGEST, help=largest)
    parser.add_argument("--quick", action="store_true", help="change one value at a time instead of trying all combinations")
    parser.add_argument("--emit", action="store_true", help="write the file that the package ships for this architecture")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    device: torch.device = arguments.device
    if (obstacle := runtime.obstacle(device)) is not None:
        print(f"kfac-triton tune: no kernel can run on {device}: {obstacle}", file=sys.stderr)
        return NO_KERNEL
    target = runtime.target(device)
    base = tuning.shipped_file(target)
    names = sorted(tuning.load(base))
    if runtime.INTERPRETED:
        print("kfac-triton tune: these are times of Triton's interpreter; they say nothing about a GPU", file=sys.stderr)
    for name in arguments.kernel or ():
        if name not in names:
            parser.error(f"argument --kernel: {name!r} is not in {base.name}; choose from {', '.join(names)}")
    wanted = slots(target, arguments.kernel or names, arguments.largest)

    torch.manual_seed(0)
    # How many candidates a quick search tries is not known before.
    total = None if arguments.quick else sum(len(every_candidate(slot.config)) for slot in wanted)
    with progress("tune", total, "candidate", arguments.quiet) as on_candidate:
        outcomes = [search(slot, device, median_time, on_candidate, exhaustive=not arguments.quick) for slot in wanted]
    print(*outcomes, sep="\n")
    path = tuning.SHIPPED / f"{target.arch}.json" if arguments.emit else tuning.user_file(target.arch)
    found = [outcome for outcome in outcomes if outcome.seconds < math.inf]
    if not found:
        print("kfac-triton tune: no configuration computed a right result; nothing is written", file=sys.stderr)
        return 1
    write(path, base, found, whole=arguments.emit)
    print(f"Written: {path}")
    return 0


def median_time(problem: Problem) -> float:
    """Median seconds of the kernel of a problem, from a CUDA graph where one can be made."""
    stopwatch = Stopwatch(problem.device)
    run = partial(problem.run, "triton")
    replay = captured(run, problem.device) or run

    def time_once() -> float:
        problem.prepare()
        return stopwatch(replay)

    count = max(3, min(_MOST_RUNS, int(_SECONDS_OF_A_CANDIDATE / max(time_once(), 1e-6))))
    return statistics.median(time_once() for _ in range(count))
