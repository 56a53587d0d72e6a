"""Runs that have to be made: one after another here, or side by side in processes of one thread each."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from . import peers
from .optimizers import Config
from .problems import Problem
from .training import OnStep, Run, train, warm_up

_warm: set[tuple[str, str]] = set()  # problems and optimizers that this process has tried


@dataclass(frozen=True)
class Task:
    """A run: the problem, the contestant with its settings, the seed, and the steps that the schedule is for."""

    problem: Problem
    optimizer: str
    config: Config
    seed: int
    horizon: int


def perform(task: Task, device: torch.device, on_step: OnStep) -> Run:
    """Make the run; before the first one of its kind, two steps that nobody counts."""
    kind = (task.problem.version, task.optimizer)
    if kind not in _warm:
        warm_up(task.problem, task.optimizer, task.config, device)
        _warm.add(kind)
    return train(task.problem, task.optimizer, task.config, task.seed, task.horizon, device, on_step)


def performed_side_by_side(tasks: Sequence[Task], device: torch.device, processes: int) -> Iterator[tuple[Task, Run]]:
    """The runs in the order in which they end. If the caller stops, the runs under way are lost."""
    context = multiprocessing.get_context("spawn")
    numbered = [(number, task, device) for number, task in enumerate(tasks)]
    with context.Pool(min(processes, len(tasks)), _prepare, (peers.places(), torch.get_num_threads())) as pool:
        for number, run in pool.imap_unordered(_numbered, numbered):
            yield tasks[number], run


def _prepare(places: dict[str, Path], threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    torch.set_num_threads(threads)
    peers.use(places)


def _numbered(task: tuple[int, Task, torch.device]) -> tuple[int, Run]:
    return task[0], perform(task[1], task[2], lambda: None)
