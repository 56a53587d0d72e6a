"""The order of runs: tuning on one seed, then the winners on every seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from .contest import TUNING_SEED, Config, Entry
from .log import Log, sources_of
from .problems import Problem
from .progress import Progress
from .tasks import Task, perform, performed_side_by_side
from .training import Run

DEFAULT = ", default"  # after the name of a contestant whose fixed settings are shown beside its tuned ones
Entries = dict[str, Entry]


@dataclass(frozen=True)
class Outcome:
    """What became of one contestant on one problem.

    Attributes:
        trials: The tuning runs, in the order of the grid.
        winner: The configuration with the lowest loss at the end of its tuning run.
        edges: Where the winner sits at an end of the grid, in words.
        finals: Seed to run.
    """

    trials: list[Run]
    winner: Config
    edges: list[str]
    finals: dict[int, Run] = field(default_factory=dict)

    @property
    def tuning_steps(self) -> int:
        """Steps that tuning was given, those of diverged runs in full."""
        return sum(run.horizon for run in self.trials)


Standing = tuple[Problem, dict[str, Outcome]]


class Race:
    """All runs of the race, each taken from the log if it is there.

    Args:
        seeds: Seeds of the winners' runs; tuning has a seed of its own.
        device: Where to train.
        log: Where finished runs are kept.
        progress: Where steps are shown.
        jobs: Number of processes that share the runs.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, log: Log, progress: Progress, jobs: int = 1):
        self.seeds = seeds
        self.device = device
        self.log = log
        self.progress = progress
        self.jobs = jobs

    def compete(self, contest: Sequence[tuple[Problem, Entries]]) -> list[Standing]:
        """Tune everybody everywhere, then run the winners at every seed, side by side in time at each seed."""
        self._complete(trial for problem, entries in contest for trial in _trials(problem, entries))
        standings = [(problem, self._judge(problem, entries)) for problem, entries in contest]
        self._complete(final for problem, outcomes in standings for final in _finals(problem, outcomes, self.seeds))
        for problem, outcomes in standings:
            for final in _finals(problem, outcomes, self.seeds):
                for name, outcome in outcomes.items():
                    if (_contestant(name), outcome.winner) == (final.optimizer, final.config):
                        outcome.finals[final.seed] = self._from_log(final)
        return standings

    def run(self, problem: Problem, optimizer: str, config: Config, seed: int, horizon: int) -> Run:
        """One run, from the log or made and logged."""
        task = Task(problem, optimizer, config, seed, horizon)
        self._complete([task])
        return self._from_log(task)

    def _judge(self, problem: Problem, entries: Entries) -> dict[str, Outcome]:
        """The winners of tuning. A contestant's default settings follow it as if they were one more contestant."""
        outcomes: dict[str, Outcome] = {}
        for name, entry in entries.items():
            trials = [self._from_log(task) for task in _trials(problem, {name: entry})]
            winner = min(trials, key=lambda run: run.final).config
            outcomes[name] = Outcome(trials, winner, entry.edges(winner))
            facts = {"seed": TUNING_SEED, "configurations": len(trials), "steps": outcomes[name].tuning_steps, "winner": winner}
            self.log.note_tuning(problem, name, facts)
            if entry.default is not None:
                fixed = self._from_log(Task(problem, name, entry.default, TUNING_SEED, problem.steps))
                outcomes[name + DEFAULT] = Outcome([fixed], fixed.config, [])
        return outcomes

    def _complete(self, tasks: Iterable[Task]) -> None:
        """Make the runs that are not in the log."""
        missing: list[Task] = []
        for task in tasks:
            if self._find(task) is None and task not in missing:
                missing.append(task)
            else:
                self.progress.skip(task.horizon)
        if self.jobs > 1 and len(missing) > 1:
            for task, run in performed_side_by_side(missing, self.device, self.jobs):
                self.progress.step(task.horizon)
                self._keep(task, run)
            return
        for task in missing:
            self.progress.start(f"{task.problem.name}, {task.optimizer}, seed {task.seed}")
            run = perform(task, self.device, self.progress.step)
            self.progress.skip(task.horizon - run.steps[-1])
            self._keep(task, run)

    def _keep(self, task: Task, run: Run) -> None:
        run.sources = sources_of(run.optimizer)
        self.log.add(run)
        settings = ", ".join(f"{name} {value}" for name, value in run.config.items())
        self.progress.say(
            f"{run.problem}, seed {run.seed}, {run.optimizer} ({settings}): {task.problem.loss_name} {run.final:.4g} "
            f"after {run.steps[-1]} steps, {run.ms_per_step:.0f} ms each"
        )

    def _find(self, task: Task) -> Run | None:
        return self.log.find(task.problem, task.optimizer, task.config, task.seed, task.horizon, self.device)

    def _from_log(self, task: Task) -> Run:
        run = self._find(task)
        assert run is not None, "it has been completed"
        return run


def _trials(problem: Problem, entries: Entries) -> list[Task]:
    """Every configuration over the whole horizon: a schedule cut short says little about its end."""
    return [Task(problem, n, config, TUNING_SEED, problem.steps) for n, entry in entries.items() for config in entry.configs()]


def _finals(problem: Problem, outcomes: dict[str, Outcome], seeds: Iterable[int]) -> list[Task]:
    return [Task(problem, _contestant(n), o.winner, seed, problem.steps) for seed in seeds for n, o in outcomes.items()]


def _contestant(name: str) -> str:
    return name.removesuffix(DEFAULT)


def total_steps(problem: Problem, entries: Entries, seeds: Sequence[int]) -> int:
    """Steps of the whole race on a problem as `Race` counts them, with a winner's tuning run counted twice."""
    runs = sum(len(entry.configs()) + len(seeds) * (1 if entry.default is None else 2) for entry in entries.values())
    return runs * problem.steps
