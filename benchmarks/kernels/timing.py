"""Times the contestants of an operation in turn, each after a check of its result against float64."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from kfac_triton.cli.tuning.checks import Problem
from kfac_triton.cli.tuning.stopwatch import Stopwatch, captured

from .contestants import LIBRARY, OURS, REFERENCE, Contestant, contestants, make_problem
from .cost_model import OPERATIONS, Rates, passes
from .shapes import Model

Row = dict[str, Any]
_MOST_ROUNDS, _LEAST_ROUNDS = 15, 3


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Products of float32 matrices as TF32 on a GPU, as in the kernels: the contestants get the same tensor cores."""
    if not (allowed and torch.cuda.is_available()):  # a CPU would take it as a permission to multiply in bfloat16
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def race(operation: str, model: Model, device: torch.device, rates: Rates, seconds: float) -> list[Row]:
    """One row a contestant: its error, its times, or why there are none.

    Args:
        operation: name of one of the four.
        model: whose layers.
        device: to run on.
        rates: that the floor is counted with.
        seconds: that timing should take, all contestants together.
    """
    torch.manual_seed(0)
    problem = make_problem(operation, model, device)
    cost = OPERATIONS[operation](model)
    floor = rates.seconds(cost)
    facts = {"floor_seconds": floor, "bytes": cost.bytes, "operations": cost.total}
    rows = compete(problem, contestants(problem), seconds, facts)
    for row in rows:
        if "best_seconds" in row and row["contestant"] in (OURS, REFERENCE, LIBRARY):
            row["share_of_floor"] = floor / row["best_seconds"]  # the others run other algorithms, with floors of their own
    return rows


def compete(problem: Problem, competitors: Iterable[Contestant], seconds: float, facts: Row | None = None) -> list[Row]:
    """One row a contestant: its error, its times, or why there are none.

    Args:
        problem: that all of them solve.
        competitors: the contestants.
        seconds: that timing should take, all contestants together.
        facts: more for every row.
    """
    device = problem.device
    rows: list[Row] = []
    running: list[tuple[Contestant, Row, dict[str, Callable[[], object]]]] = []
    stopwatch = Stopwatch(device)
    for contestant in competitors:
        names = {"operation": problem.operation, "model": problem.name, "contestant": contestant.name}
        row: Row = names | {"allowed": problem.allowed} | (facts or {})
        rows.append(row)
        ways = _admit(contestant, problem, row, device)
        if ways:
            running.append((contestant, row, ways))
    _time(running, stopwatch, seconds)
    ours = next((row["best_seconds"] for row in rows if row["contestant"] == OURS and "best_seconds" in row), None)
    for row in rows:
        if "best_seconds" in row and ours is not None:
            row["over_ours"] = row["best_seconds"] / ours
    return rows


def _admit(contestant: Contestant, problem: Problem, row: Row, device: torch.device) -> dict[str, Callable[[], object]] | None:
    """Runs a contestant once and checks it; how to run it for time, or None with the reason in the row."""
    if contestant.obstacle is not None:
        row["not_timed"] = contestant.obstacle
        return None
    try:
        if contestant.prepare is not None:
            contestant.prepare()
        with tf32(contestant.tf32):
            contestant.run()
        row["error"] = contestant.error()
        if not problem.is_right(row["error"]):
            row["not_timed"] = f"the result is wrong: error {row['error']:.1e}, allowed {problem.allowed:.1e}"
            return None
        ways: dict[str, Callable[[], object]] = {"eager": contestant.run}
        if contestant.graph and (replay := _graph(contestant, row, device)) is not None:
            ways["graph"] = replay
        return ways
    except Exception as error:  # out of memory, or a library's: the others race on
        row["not_timed"] = _reason(error)
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _graph(contestant: Contestant, row: Row, device: torch.device) -> Callable[[], object] | None:
    """The replay of a CUDA graph, or None; an error is noted in the row, and leaves the eager run to be timed."""
    try:
        with tf32(contestant.tf32):
            return captured(contestant.run, device)
    except Exception as error:
        row["no_graph"] = _reason(error)
        return None


def _reason(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _time(running: list[tuple[Contestant, Row, dict[str, Callable[[], object]]]], stopwatch: Stopwatch, seconds: float) -> None:
    """Medians over rounds in which every contestant has its turn, the order rotating.

    One that fails is not run again, and keeps the times that it has.
    """
    times: dict[tuple[int, str], list[float]] = {}
    started = time.perf_counter()
    for number in range(_MOST_ROUNDS):
        if number >= _LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        for offset in range(len(running)):
            i = (number + offset) % len(running)
            contestant, row, ways = running[i]
            spent = sum(map(sum, (times.get((i, way), []) for way in ways)))
            if number and spent > seconds:  # a slow one keeps what it has
                continue
            for way, run in list(ways.items()):
                try:
                    if contestant.resets and contestant.prepare is not None:
                        contestant.prepare()
                    with tf32(contestant.tf32):
                        taken = stopwatch(run)
                except Exception as error:
                    del ways[way]
                    row["no_graph" if way == "graph" else "not_timed"] = _reason(error)
                    continue
                times.setdefault((i, way), []).append(taken)
    for (i, way), values in times.items():
        row = running[i][1]
        row[f"{way}_seconds"] = statistics.median(values)
        row[f"{way}_range"] = [min(values), max(values)]
        row["rounds"] = len(values)
        row["best_seconds"] = min(row.get("best_seconds", float("inf")), statistics.median(values))


def measured_rates(device: torch.device, side: int = 1024, repeats: int = 10) -> Rates:
    """The best rates of a matrix product and a copy in this run, for a device that no spec sheet is kept of."""
    stopwatch = Stopwatch(device)

    def best(run: Callable[[], object]) -> float:
        return min(stopwatch(run) for _ in range(repeats))

    product: dict[str, float] = {}
    for unit, dtype in (("tf32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        with tf32(True):
            product[unit] = 2 * side**3 / best(lambda a=a, b=b: torch.mm(a, b))  # type: ignore[misc]
    # Without matrix units a float32 product is exact at once.
    product |= passes(product["tf32"]) if device.type == "cuda" else dict.fromkeys(("tf32x2", "tf32x3"), product["tf32"])
    source = torch.zeros(1 << 24, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / best(lambda: target.copy_(source))
    return Rates("this device", f"best of torch.mm at n = {side} and of a copy, measured in this run", bandwidth, product)
