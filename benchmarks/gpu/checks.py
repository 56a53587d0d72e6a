"""The part `smoke`: kernels against float64, under compute-sanitizer too, and optimizers on kernels against PyTorch."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from . import adam_tiles, engines
from .findings import Bench
from .others import KFAC_ADAM, KFAC_NAME, Problem, examine, kernel_obstacle, problems
from .processes import ROOT, environment
from .workloads import Variant, task, training_step

OPERATIONS = {
    "covariance": "covariance_ema",
    "cold": "newton_schulz_inverse",
    "warm": "factored_newton_refresh",
    "precondition": "precondition",
    "bases": "orthogonal_iteration",
    "adam": adam_tiles.AdamTiles.operation,
}
MORE_SIDES = (7, 33, 129, 1000)  # to check on a GPU, beside those of `kfac-triton doctor`
SANITIZER_SIDES = (33, 72)  # small, for every access is looked at
SANITIZER_SECONDS = 105
FIRST_STEPS = 3
FIRST = {"compile": Variant(KFAC_NAME), "compile_adam": Variant(KFAC_ADAM, KFAC_ADAM)}  # optimizers whose kernels are compiled


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says a verdict for each name."""
    for name in names:
        kind, _, what = name.partition(":")
        if name in OPERATIONS:
            _kernels(bench, OPERATIONS[name])
        elif kind == "engine":
            bench.attempt(name, partial(engines.compare, bench, what))
        elif kind == "hold":
            bench.attempt(name, partial(engines.hold, bench, what))
        elif kind in FIRST:
            bench.attempt(name, partial(_first_steps, bench, what, FIRST[kind]))
        elif not bench.on_gpu:
            bench.say(f"compute-sanitizer {name}", skipped="no GPU")
        else:
            bench.attempt(f"compute-sanitizer {name}", partial(_sanitize, bench, name))


def all_problems(device: torch.device, sides: Sequence[int] = ()) -> Iterator[Problem]:
    """Those of `kfac-triton doctor`, and Adam in the eigenbasis."""
    yield from problems(device, sides)
    yield adam_tiles.AdamTiles("tiles", sides or adam_tiles.SIDES, device)


def _kernels(bench: Bench, operation: str) -> None:
    device = torch.device(bench.device)
    for sides in ((), MORE_SIDES) if bench.on_gpu else ((),):
        torch.manual_seed(0)
        for problem in all_problems(device, sides):
            if problem.operation == operation:
                what = f"{operation} of {problem.name}" + (f" {sides}" if sides else "")
                obstacle = kernel_obstacle(problem)
                facts = {"torch_only": obstacle} if obstacle else {}
                _check(bench, what, problem, "torch" if obstacle else "triton", facts)
                if problem.prefers_library():
                    _check(bench, f"{what}, by the library", problem, "auto", {})


def _check(bench: Bench, what: str, problem: Problem, backend: str, facts: dict[str, Any]) -> None:
    """Says the error against float64, and whether a second run has the same: what moves is a race between threads."""
    finding = examine(problem, backend)
    again = math.nan
    if not finding.complaint:
        problem.prepare()
        problem.run(backend)
        again = problem.error()
    bench.say(
        what,
        verdict="right" if finding.right else "WRONG",
        error=finding.error,
        allowed=problem.allowed,
        repeats=finding.error == again,
        s=finding.seconds,
        **({"complaint": finding.complaint} if finding.complaint else {}),
        **facts,
    )


def _first_steps(bench: Bench, name: str, variant: Variant) -> None:
    """Seconds of the first steps, which compile kernels; later parts find them in Triton's cache."""
    workload = task(bench, name)
    start = time.perf_counter()
    step, _ = training_step(workload, variant)
    losses = [step() for _ in range(FIRST_STEPS)]
    bench.wait()
    what = f"three first steps of {name}" + ("" if variant.optimizer == KFAC_NAME else f" with {variant.optimizer}")
    bench.say(what, s=time.perf_counter() - start, loss=float(losses[-1]))


def _sanitize(bench: Bench, tool: str) -> None:
    """Small problems under compute-sanitizer's memcheck or racecheck."""
    if shutil.which("compute-sanitizer") is None:
        bench.say(f"compute-sanitizer {tool}", skipped="compute-sanitizer is not on the path")
        return
    child = [sys.executable, "-m", "benchmarks.gpu.checks", bench.device]
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "5", *child]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=SANITIZER_SECONDS, env=environment(), check=False
    )
    (bench.folder / f"{tool}.txt").write_text(done.stdout[-200_000:] + done.stderr[-20_000:], encoding="utf-8")
    bench.say(f"compute-sanitizer {tool}", **judge(done.stdout, done.stderr))


def judge(output: str, errors: str) -> dict[str, Any]:
    """What compute-sanitizer found, and the verdict: every problem solved, and a summary that counts nothing."""
    lines = output.splitlines()
    right, wrong = (sum(f" {word} " in line for line in lines) for word in ("True", "False"))
    summaries = [line for line in lines if "SUMMARY" in line]
    clean = bool(summaries) and all(re.search(r"SUMMARY: 0 (errors|hazards)", line) for line in summaries)
    shown = [line for line in lines if "SUMMARY" in line or "Invalid" in line or "hazard" in line][:4]
    verdict = "right" if clean and right and not wrong else "WRONG"
    return {"verdict": verdict, "checked": right, "summary": shown or errors[-200:]}


def solve_small_problems(device: torch.device) -> None:
    """Prints a line for each problem: what compute-sanitizer watches."""
    torch.manual_seed(0)
    for problem in all_problems(device, SANITIZER_SIDES):
        finding = examine(problem, "triton")
        print(problem.operation, problem.name, finding.right, f"{finding.error:.1e}", finding.complaint, flush=True)


if __name__ == "__main__":
    solve_small_problems(torch.device(sys.argv[1]))
