"""Search for tile configurations of the kernels: candidates, their check against float64, their times.

The clock is an argument, so that the search itself can be tested anywhere.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from ...kernels import ops, runtime, tuning
from ...kernels.runtime import Target
from ...kernels.tuning import Config
from .checks import Bases, ColdInverses, Covariance, Preconditioning, Problem, RowSource, WarmInverses, kernel_obstacle

# Values that a key of kernels/configs/*.json may take, by the beginning of its name, the longest first. A key without a list
# here, such as a register limit, stays as it is.
SPACE: dict[str, tuple[int, ...]] = {
    "BLOCK_K": (16, 32, 64, 128),
    "BLOCK": (32, 64, 128),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5),
}
_INTERPRETED_SPACE = {"BLOCK_K": (16, 32), "BLOCK": (16, 32)}  # launch options mean nothing there

_ROWS = 4096  # of a layer whose statistics are timed
_WORK = 1 << 32  # multiply-adds that a problem should keep a device busy with
_MOST_MATRICES = 64
_NOT_LAUNCHED = "is not launched"

Clock = Callable[[Problem], float]
OnCandidate = Callable[[str], None]


@dataclass(frozen=True)
class ConfigEntry:
    """One entry of a configuration file: a kernel, and the sides that the entry is for."""

    kernel: str
    up_to: int | None
    side: int
    config: Config


@dataclass(frozen=True)
class BestConfig:
    """What the search found for an entry.

    Attributes:
        slot: the entry.
        best: the fastest configuration that computes the right result; the present one if none does, or nothing asks for it.
        seconds: its time; infinite without one.
        before: the time of the present configuration; infinite if it failed.
        failed: candidates that did not compile or run.
        wrong: candidates whose result was wrong.
        note: why nothing was searched, if so.
    """

    slot: ConfigEntry
    best: Config
    seconds: float = math.inf
    before: float = math.inf
    failed: int = 0
    wrong: int = 0
    note: str = ""

    def __str__(self) -> str:
        sides = "any side" if self.slot.up_to is None else f"sides up to {self.slot.up_to}"
        rejected = f"{self.failed} candidates failed, {self.wrong} were wrong"
        before = "failed" if self.before == math.inf else f"{1e6 * self.before:.0f} us"
        found = f"{self.best}, {1e6 * self.seconds:.0f} us (before: {before}); {rejected}"
        if self.note:
            found = f"left as it is: {self.note}"
        elif self.seconds == math.inf:
            found = f"nothing right found; {rejected}"
        return f"{self.slot.kernel}, {sides}, timed at {self.slot.side}: {found}"


def slots(target: Target, kernels: Sequence[str], largest: int) -> list[ConfigEntry]:
    """The entries of the target's configuration file, each with the side to time it at, the largest that it is for.

    Args:
        target: whose file.
        kernels: which kernels.
        largest: the largest side to time at, unless an entry is for larger ones alone.
    """
    table, found = tuning.load(tuning.shipped_file(target)), []
    for kernel in kernels:
        bound = 0
        for entry in table[kernel]:
            side = max(largest, bound + 16) if entry["up_to"] is None else min(entry["up_to"], max(largest, bound + 1))
            bound = entry["up_to"]
            present = {key: value for key, value in entry.items() if key != "up_to"}
            found.append(ConfigEntry(kernel, entry["up_to"], side, present))
    return found


def values_of(key: str, present: int) -> tuple[int, ...]:
    """Values to try for a key, the present one first."""
    space = _INTERPRETED_SPACE if runtime.INTERPRETED else SPACE
    values = next((values for name, values in space.items() if key.startswith(name)), ())
    return (present, *(value for value in values if value != present))


def every_candidate(present: Config) -> list[Config]:
    """All combinations, the present one first."""
    choices = [values_of(key, value) for key, value in present.items()]
    return [dict(zip(present, combination, strict=True)) for combination in itertools.product(*choices)]


def neighbours(config: Config, present: Config) -> list[Config]:
    """Configurations that differ from config in one key, by a value that the space of `present` has."""
    choices = [(key, value) for key in present for value in values_of(key, present[key])]
    return [config | {key: value} for key, value in choices if value != config[key]]


def problem_for(kernel: str, side: int, device: torch.device) -> Problem:
    """Scratch tensors that a kernel of this name works on, enough of them to keep a device busy.

    Raises:
        ValueError: if the name tells no operation.
    """
    small = runtime.INTERPRETED
    rows = 64 if small else _ROWS
    count = 2 if small else max(1, min(_MOST_MATRICES, _WORK // side**3))
    if kernel == "covariance_patches":
        channels, edge = max(1, side // 9), 6 if small else 14
        images = torch.randn(max(1, rows // edge**2), channels, edge, edge, device=device).bfloat16()
        return Covariance(kernel, [RowSource(images, ops.window((3, 3), (1, 1), (1, 1)))] * (1 if small else 4))
    if kernel.startswith("covariance_images"):
        columns, edge = max(16, side // 16 * 16), 4 if small else 28
        dtype = torch.float32 if kernel.endswith("_fp32") else torch.bfloat16
        images = torch.randn(max(1, rows // edge**2), columns, edge, edge, device=device).to(dtype)
        return Covariance(kernel, [RowSource(images, ops.window((1, 1)))] * (1 if small else 4))
    if kernel in ("covariance", "covariance_fp32", "covariance_unaligned"):
        columns = side | 1 if kernel == "covariance_unaligned" else max(16, side // 16 * 16)
        dtype = torch.float32 if kernel == "covariance_fp32" else torch.bfloat16
        layers = max(1, min(count, _WORK // (rows * side**2)))
        return Covariance(kernel, [RowSource(torch.randn(rows, columns, device=device).to(dtype)) for _ in range(layers)])
    if kernel.startswith("newton_schulz"):
        return ColdInverses(kernel, {side: count}, device)
    if kernel.startswith("factored"):
        return WarmInverses(kernel, {side: count}, device)
    if kernel.startswith("orthogonal"):
        return Bases(kernel, {side: count}, device)
    if kernel.startswith("precondition"):
        return Preconditioning(kernel, {(side, side): count}, device)
    raise ValueError(f"kernel must belong to an operation that can be tuned, but is {kernel!r}")


@contextmanager
def trial(kernel: str, config: Config) -> Iterator[list[str]]:
    """Every launch takes this configuration for the kernel; yields the names of the kernels asked for so far."""
    asked: list[str] = []
    lookup = tuning.lookup

    def instead(name: str, size: int, target: Target) -> Config:
        asked.append(name)
        return dict(config) if name == kernel else lookup(name, size, target)

    with mock.patch.object(tuning, "lookup", instead):
        yield asked


def search(slot: ConfigEntry, device: torch.device, clock: Clock, on_candidate: OnCandidate, exhaustive: bool) -> BestConfig:
    """Finds the fastest configuration for an entry that computes the right result.

    Args:
        slot: the entry.
        device: to search on, with scratch tensors: no training state is ever touched.
        clock: seconds of a run of the problem's kernel.
        on_candidate: called with a line on every candidate that was tried.
        exhaustive: all combinations; otherwise one key at a time, from the present configuration, until nothing is faster.
    """
    try:
        problem = problem_for(slot.kernel, slot.side, device)
    except ValueError as error:
        return BestConfig(slot, slot.config, note=str(error))
    if (obstacle := kernel_obstacle(problem)) is not None:
        return BestConfig(slot, slot.config, note=obstacle)
    times: dict[tuple[int, ...], float] = {}
    remarks: Counter[str] = Counter()

    def time_of(config: Config) -> float:
        key = tuple(config.values())
        if key not in times:
            times[key], remark = _try(slot.kernel, config, problem, clock)
            remarks[remark] += 1
            on_candidate(f"{slot.kernel} {config} {remark}")
        return times[key]

    best, before = slot.config, time_of(slot.config)
    if remarks[_NOT_LAUNCHED]:
        return BestConfig(slot, best, note=f"a problem of side {slot.side} does not launch it")
    if exhaustive:
        best = min(every_candidate(best), key=time_of)
    else:
        while faster := next((c for c in neighbours(best, slot.config) if time_of(c) < time_of(best)), None):
            best = faster
    return BestConfig(slot, best, time_of(best), before, remarks["failed"], remarks["wrong"])


def _try(kernel: str, config: Config, problem: Problem, clock: Clock) -> tuple[float, str]:
    """Seconds of a configuration, infinite without a right result, and a remark."""
    with trial(kernel, config) as asked:
        try:
            right = problem.is_right(problem.check("triton"))
            if kernel not in asked:
                return math.inf, _NOT_LAUNCHED
            if not right:
                return math.inf, "wrong"
            seconds = clock(problem)
        except Exception as error:  # out of shared memory, refused by a compiler pass or by ptxas: each has its own type
            try:
                if problem.device.type == "cuda":
                    torch.cuda.synchronize(problem.device)
            except RuntimeError:  # after an illegal access every later launch fails
                raise RuntimeError(f"the device stopped working at configuration {config}; start again without it") from error
            return math.inf, "failed"
    return seconds, f"{1e6 * seconds:.0f} us"


def write(path: Path, base: Path, outcomes: Sequence[BestConfig], whole: bool) -> None:
    """Writes a configuration file with what was found.

    Args:
        path: file to write; what it has on other kernels stays.
        base: the file that the slots came from.
        outcomes: what was found.
        whole: whether the file has to have every kernel, as a shipped one has, and not only those searched.
    """
    table = tuning.load(base)
    best = {(outcome.slot.kernel, outcome.slot.up_to): outcome.best for outcome in outcomes}
    present = json.loads(path.read_text()) if path.exists() else {}
    merged = (table if whole else {}) | present
    for kernel, _ in best:
        merged[kernel] = [entry | best.get((kernel, entry["up_to"]), {}) for entry in table[kernel]]
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        f"  {json.dumps(kernel)}: [\n" + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]"
        for kernel, entries in merged.items()
    )
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    tuning.load.cache_clear()
    tuning.lookup.cache_clear()
