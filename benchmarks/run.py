"""Checks the kernels on a device, then times them and the optimizer's step there, beside kfac-pytorch's.

Needs PyTorch and Triton alone. Ends in time: what no longer fits into `--budget` is left out, and the report says so. Results
are written as they come, and what raises an error is left out, too.

    python3 -m benchmarks.run --device cuda
    python3 -m benchmarks.run --device cpu --quick
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kfac_triton.cli.tuning.checks import kernel_obstacle
from kfac_triton.cli.tuning.doctor import examine, problems

from . import report as reports
from .kernels import cost_model
from .kernels import timing as kernel_timing
from .kernels.shapes import BY_NAME, FULL, QUICK
from .steps import timing as step_timing
from .steps.contestants import find_peer

RESULTS = Path(__file__).parent / "results"
_MORE_SIDES = (7, 33, 129, 1000)  # to check on a GPU, beside those of `kfac-triton doctor`
_SECONDS = {"race": 1.0, "steps": 20.0}  # of timing alone, for one operation on one model and for one task
_QUICK_SECONDS = {"race": 0.02, "steps": 0.1}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the runner itself")
    parser.add_argument("--models", nargs="+", choices=BY_NAME, metavar="NAME", help=f"of {', '.join(BY_NAME)}")
    parser.add_argument("--operations", nargs="+", choices=cost_model.OPERATIONS, default=list(cost_model.OPERATIONS))
    parser.add_argument("--budget", type=float, default=420.0, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--peer", type=Path, help="folder with the package kfac, such as a checkout of kfac-pytorch")
    parser.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results/DEVICE-DATE-kernels)")
    options = parser.parse_args(arguments)
    options.device = torch.device(options.device)
    if options.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: PyTorch finds no GPU here; give --device cpu --quick")
    if options.device.type == "cpu" and not (options.quick or options.models):
        parser.error("argument --quick: the full sizes take hours on a CPU; give --quick, or --models")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Runs everything, writes the results; exit status 1 if a kernel is wrong, or a measurement raised an error."""
    options = parse(arguments)
    started = time.perf_counter()
    device, seconds = options.device, _QUICK_SECONDS if options.quick else _SECONDS
    machine = reports.machine(device)
    rates = cost_model.rates_of(machine["device"]) or kernel_timing.measured_rates(
        device, **({"side": 128, "repeats": 3} if options.quick else {})
    )
    report: dict[str, Any] = {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "checks": [],
        "kernels": [],
        "steps": [],
        "left_out": [],
    }
    print(f"{machine['device']} ({machine['kind']}), torch {machine['torch']}, Triton {machine['triton']}", flush=True)

    # The folder's name says what was measured.
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine["device"]).strip("-").lower()
    folder = options.output or RESULTS / f"{name}-{report['date']}-kernels"

    def save(picture: bool = False) -> list[Path]:
        return reports.write(folder, json.loads(json.dumps(report)), rates, picture)

    wrong = _check(device, report)
    failed = False
    save()
    models = [BY_NAME[name] for name in options.models] if options.models else list(QUICK if options.quick else FULL)
    small = options.quick or device.type == "cpu"
    tasks = [task(device, small) for task in (step_timing.autoencoder, step_timing.gpt2)]
    if (problem := find_peer(options.peer)) is not None:
        report["left_out"].append(problem)

    def late(what: str) -> bool:
        if time.perf_counter() - started > options.budget:
            report["left_out"].append(f"{what}: the budget of {options.budget:.0f} s was spent")
            return True
        return False

    def raced(what: str, race: Callable[[], list[reports.Row]]) -> list[reports.Row] | None:
        """The rows of a race; None if there is no time for it, or it raised an error, which ends no other race."""
        nonlocal failed
        if late(what):
            return None
        try:
            return race()
        except Exception as error:
            report["left_out"].append(f"{what}: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
            failed = True
            return None

    for task in tasks:  # first, for a step is what a user waits for
        rows = raced(f"training step of {task.name}", partial(step_timing.race, task, seconds["steps"]))
        if rows is not None:
            report["steps"].append({"task": task.name, "description": task.description, "rows": rows})
            print(f"\n**{task.description}**\n\n{reports.step_table(rows)}", flush=True)
        save()
    tasks.clear()
    for model, operation in itertools.product(models, options.operations):
        race = partial(kernel_timing.race, operation, model, device, rates, seconds["race"])
        rows = raced(f"{operation} on {model.name}", race)
        if rows is not None:
            about = {"operation": operation, "model": model.name, "description": model.description}
            report["kernels"].append({**about, "rows": rows})
            print(f"\n**{operation}, {model.name}** ({model.description})\n\n{reports.kernel_table(rows)}", flush=True)
        save()

    for path in save(picture=True):
        print(f"Written: {path}")
    for line in report["left_out"]:
        print(f"Left out: {line}")
    return 1 if wrong or failed else 0


def _check(device: torch.device, report: dict[str, Any]) -> bool:
    """Every kernel against float64; whether one is wrong."""
    wrong = False
    torch.manual_seed(0)
    more = problems(device, _MORE_SIDES) if device.type == "cuda" else ()
    for problem in (*problems(device), *more):
        what = f"{problem.operation} of {problem.name}"
        obstacle = kernel_obstacle(problem)
        if obstacle is not None:
            report["checks"].append(f"{what}: no kernel serves it: {obstacle}")
        else:
            finding = examine(problem, "triton")
            wrong |= not finding.right
            verdict = "right" if finding.right else "WRONG"
            figures = finding.complaint or f"error {finding.error:.1e}, allowed {problem.allowed:.1e}"
            report["checks"].append(f"{what}: {verdict}, {figures}")
        print(report["checks"][-1], flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
