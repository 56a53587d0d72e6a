"""Paired timing of one training step on the CPU: SGD, kfac_triton, and kfac-pytorch in both of its modes.

A cycle is ten consecutive steps, the first with inverses. Contestants take turns cycle by cycle in rotating order, and ratios
are taken within a cycle, so that a drift of the machine's speed cancels.

    python -m benchmarks.steps.kfac_pytorch --peer ~/kfac-pytorch --json step.json
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .contestants import INVERSE_EVERY, NAMES, PEER_NAMES, WORKLOADS, Workload, find_peer, floor, make_step

OURS = "kfac_triton"
BASELINE = "SGD"
WARM_UP_CYCLES = 2
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Timing:
    """Seconds of one contestant's steps, per cycle and step, and its losses, warm-up included."""

    steps: list[list[float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def finite(self) -> bool:
        """Whether every loss was finite: no speed is reported otherwise."""
        return all(map(math.isfinite, self.losses))

    @property
    def cycles(self) -> list[float]:
        """Mean seconds of a step, per cycle."""
        return [sum(cycle) / len(cycle) for cycle in self.steps]

    @property
    def inverse_steps(self) -> list[float]:
        """Seconds of the steps with inverses."""
        return [cycle[0] for cycle in self.steps]

    @property
    def ordinary_steps(self) -> list[float]:
        """Seconds of the steps without."""
        return [seconds for cycle in self.steps for seconds in cycle[1:]]


def race(workload: Workload, names: list[str], cycles: int, clock: Callable[[], float]) -> dict[str, Timing]:
    """Times the contestants, interleaved cycle by cycle.

    Args:
        workload: what they train.
        names: the contestants.
        cycles: timed cycles of each, after the warm-up.
        clock: in seconds.
    """
    steps = {name: make_step(name, workload) for name in names}
    timings = {name: Timing() for name in names}
    for cycle in range(WARM_UP_CYCLES + cycles):
        shift = cycle % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = []
            for i in range(INVERSE_EVERY):
                batch = workload.batches[i % len(workload.batches)]
                start = clock()
                loss = steps[name](batch)
                seconds.append(clock() - start)
                timings[name].losses.append(loss.item())
            if cycle >= WARM_UP_CYCLES:
                timings[name].steps.append(seconds)
    return timings


def gemm_rate(clock: Callable[[], float], size: int = 1024, repeats: int = 15) -> float:
    """Measured operations per second of a square fp32 matrix product, the best of `repeats`, so that the floor is one."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    seconds = []
    for _ in range(repeats):
        start = clock()
        torch.mm(left, right, out=out)
        seconds.append(clock() - start)
    return 2.0 * size**3 / min(seconds)


def _spread(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "q1": first, "median": median, "q3": third, "max": max(values)}


def _ratios(above: Timing, below: Timing) -> dict[str, float]:
    return _spread([a / b for a, b in zip(above.cycles, below.cycles, strict=True)])


def summarize(workload: Workload, timings: dict[str, Timing], rate: float) -> list[dict[str, Any]]:
    """One row per contestant; without any speed where a loss was not finite.

    Args:
        workload: what was trained.
        timings: from `race`.
        rate: operations per second, to express the counted floor in seconds.
    """
    rows = []
    for name, timing in timings.items():
        cost = floor(name, workload)
        row: dict[str, Any] = {
            "contestant": name,
            "finite": timing.finite,
            "first_loss": timing.losses[0],
            "last_loss": timing.losses[-1] if timing.finite else None,  # JSON has no word for NaN
            "flop": {**asdict(cost), "total": cost.total},
            "floor_seconds": cost.total / rate,
        }
        if timing.finite:
            row |= {
                "step_seconds": _spread(timing.cycles),
                "ordinary_step_seconds": _spread(timing.ordinary_steps),
                "inverse_step_seconds": _spread(timing.inverse_steps),
                "seconds": timing.steps,
            }
            for key, above, below in (("over_sgd", name, BASELINE), ("ours_over_it", OURS, name)):
                if above in timings and below in timings and timings[above].finite and timings[below].finite:
                    row[key] = _ratios(timings[above], timings[below])
        rows.append(row)
    return rows


def _milliseconds(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.1f} ({1e3 * spread['q1']:.1f}–{1e3 * spread['q3']:.1f})"  # noqa: RUF001


def _ratio(spread: dict[str, float] | None) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}–{spread['max']:.2f})" if spread else "–"  # noqa: RUF001


HEADINGS = (
    "contestant",
    "step ms: median (quartiles)",
    "/ SGD: median (min–max)",  # noqa: RUF001
    "kfac_triton / it",
    "step without inverses ms",
    "step with inverses ms",
    "floor GFLOP",
    "floor ms (model)",
    "step / floor",
)


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---" + "|--:" * (len(HEADINGS) - 1) + "|"]
    for row in rows:
        cells = ["loss not finite", *["–"] * 4]  # noqa: RUF001
        over_floor = "–"  # noqa: RUF001
        if row["finite"]:
            cells = [
                _milliseconds(row["step_seconds"]),
                _ratio(row.get("over_sgd")),
                _ratio(row.get("ours_over_it")),
                _milliseconds(row["ordinary_step_seconds"]),
                _milliseconds(row["inverse_step_seconds"]),
            ]
            over_floor = f"{row['step_seconds']['median'] / row['floor_seconds']:.1f}"
        cells += [f"{row['flop']['total'] / 1e9:.2f}", f"{1e3 * row['floor_seconds']:.1f}", over_floor]
        lines.append(f"| {row['contestant']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(threads: int, clock: str) -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text(encoding="utf-8").splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {
        "cpu": cpu,
        "threads": threads,
        "clock": clock,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gemm_flop_per_second": gemm_rate(CLOCKS[clock]),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument("--contestants", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--cycles", type=int, default=9, help="timed cycles of ten steps, at least 2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for one thread on a busy machine")
    parser.add_argument("--peer", type=Path, help="folder with the package kfac, such as a checkout of kfac-pytorch")
    parser.add_argument("--json", type=Path, help="file for every single time")
    options = parser.parse_args(arguments)
    if options.cycles < 2:
        parser.error(f"--cycles must be at least 2, but is {options.cycles}")
    return options


def main() -> None:
    """Runs the race and prints the tables."""
    options = parse()
    torch.set_num_threads(options.threads)
    names = options.contestants
    if set(PEER_NAMES) & set(names) and (problem := find_peer(options.peer)) is not None:
        print(problem, file=sys.stderr)
        names = [name for name in names if name not in PEER_NAMES]

    report: dict[str, Any] = {"machine": machine(options.threads, options.clock), "workloads": {}}
    rate = report["machine"]["gemm_flop_per_second"]
    print(", ".join(f"{key} {value}" for key, value in report["machine"].items() if key != "gemm_flop_per_second"))
    print(f"floor ms = floor GFLOP / {rate / 1e9:.0f} GFLOP/s, the best measured rate of torch.mm at n = 1024: a model.")
    print("The floor of kfac-pytorch eigen holds an estimate, 9 n^3 for an eigendecomposition.\n")
    for name in WORKLOADS if options.workload == "all" else [options.workload]:
        workload = WORKLOADS[name]()
        rows = summarize(workload, race(workload, names, options.cycles, CLOCKS[options.clock]), rate)
        report["workloads"][name] = {"description": workload.description, "rows": rows}
        print(f"**{workload.description}**; {options.cycles} cycles of {INVERSE_EVERY} steps\n\n{markdown(rows)}\n")
        print("Loss, first to last step: " + _losses(rows) + "\n", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _losses(rows: list[dict[str, Any]]) -> str:
    return "; ".join(f"{r['contestant']} {r['first_loss']:.4g} to {r['last_loss']:.4g}" for r in rows if r["finite"])


if __name__ == "__main__":
    main()
