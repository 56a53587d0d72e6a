"""The order of runs: tuning on one seed, then the winners on every seed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from .contest import ADAMW, KFAC_HORIZONS, KFAC_NAME, TUNING_SEED, Config, Entry
from .log import Log, sources
from .problems import Problem
from .training import Run, train, warm_up


def kfac_horizons(problem: Problem) -> list[int]:
    """K-FAC's horizons in steps, the one that it is tuned on first."""
    return [max(1, round(part * problem.steps)) for part in KFAC_HORIZONS]


def horizons(problem: Problem, optimizer: str) -> list[int]:
    """Horizons that a contestant races over, the one that it is tuned on first."""
    return [problem.steps] if optimizer == ADAMW else kfac_horizons(problem)


@dataclass(frozen=True)
class Outcome:
    """What became of one contestant on one problem.

    Attributes:
        trials: The tuning runs, in the order of the grid.
        winner: The configuration with the lowest loss at the end of its tuning run.
        edges: Where the winner sits at an end of the grid, in words.
        finals: (seed, horizon) to run.
    """

    trials: list[Run]
    winner: Config
    edges: list[str]
    finals: dict[tuple[int, int], Run] = field(default_factory=dict)

    @property
    def tuning_steps(self) -> int:
        """Steps that tuning was given, those of diverged runs in full."""
        return sum(run.horizon for run in self.trials)


class Progress:
    """One bar over all steps of the race, and a line for every finished run; nothing if quiet, no bar without tqdm."""

    def __init__(self, total: int, quiet: bool):
        self.quiet = quiet
        self._bar: Any = None
        if not quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit="step", smoothing=0.05)

    def start(self, title: str) -> None:
        """Name the run that begins."""
        if self._bar is not None:
            self._bar.set_description_str(title)

    def step(self) -> None:
        """A step is done."""
        if self._bar is not None:
            self._bar.update()

    def skip(self, steps: int) -> None:
        """Steps that need not be done: found in the log, or given up by a diverged run."""
        if self._bar is not None:
            self._bar.total -= steps
            self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar; standard output is for results alone."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


class Race:
    """All runs of the race, each taken from the log if it is there.

    Args:
        seeds: Seeds of the winners' runs; tuning has a seed of its own.
        device: Where to train.
        log: Where finished runs are kept.
        progress: Where steps are shown.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device, log: Log, progress: Progress):
        self.seeds = seeds
        self.device = device
        self.log = log
        self.progress = progress
        self._warm: set[tuple[str, str]] = set()

    def compete(self, problem: Problem, entries: dict[str, Entry]) -> dict[str, Outcome]:
        """Tune each contestant, then run the winners at every seed and horizon, side by side in time at each seed."""
        outcomes = {optimizer: self._tune(problem, optimizer, entry) for optimizer, entry in entries.items()}
        for seed in self.seeds:
            for optimizer, outcome in outcomes.items():
                for horizon in horizons(problem, optimizer):
                    outcome.finals[seed, horizon] = self.run(problem, optimizer, outcome.winner, seed, horizon)
        return outcomes

    def _tune(self, problem: Problem, optimizer: str, entry: Entry) -> Outcome:
        """Every configuration over the whole horizon: a schedule cut short says little about its end."""
        horizon = horizons(problem, optimizer)[0]
        trials = [self.run(problem, optimizer, config, TUNING_SEED, horizon) for config in entry.configs()]
        winner = min(trials, key=lambda run: run.final).config
        outcome = Outcome(trials, winner, entry.edges(winner))
        facts = {"seed": TUNING_SEED, "configurations": len(trials), "steps": outcome.tuning_steps, "winner": winner}
        self.log.note_tuning(problem, optimizer, facts)
        return outcome

    def run(self, problem: Problem, optimizer: str, config: Config, seed: int, horizon: int) -> Run:
        """One run, from the log or made and logged."""
        found = self.log.find(problem, optimizer, config, seed, horizon, self.device)
        if found is not None:
            self.progress.skip(horizon)
            return found
        if (problem.name, optimizer) not in self._warm:
            warm_up(problem, optimizer, config, self.device)
            self._warm.add((problem.name, optimizer))
        self.progress.start(f"{problem.name}, {optimizer}, seed {seed}")
        run = train(problem, optimizer, config, seed, horizon, self.device, self.progress.step)
        run.sources = sources() if optimizer == KFAC_NAME else torch.__version__
        self.log.add(run)
        self.progress.skip(horizon - run.steps[-1])
        settings = ", ".join(f"{name} {value}" for name, value in config.items())
        self.progress.say(
            f"{problem.name}, seed {seed}, {optimizer} ({settings}): {problem.loss_name} {run.final:.4g} "
            f"after {run.steps[-1]} steps, {run.ms_per_step:.0f} ms each"
        )
        return run


def total_steps(problem: Problem, entries: dict[str, Entry], seeds: Sequence[int]) -> int:
    """Steps of the whole race on a problem as `Race` counts them, with the winner's tuning run counted twice."""
    total = 0
    for optimizer, entry in entries.items():
        lengths = horizons(problem, optimizer)
        total += len(entry.configs()) * lengths[0] + len(seeds) * sum(lengths)
    return total


@contextmanager
def progress_over(total: int, quiet: bool) -> Iterator[Progress]:
    """A progress that is closed at the end, whatever happens."""
    progress = Progress(total, quiet)
    try:
        yield progress
    finally:
        progress.close()
