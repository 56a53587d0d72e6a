"""The parts `train` and `train_adam`: seconds to the loss that tuned AdamW ends with, every step a replayed CUDA graph."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import KFAC

from ..convergence.training import schedule
from .digits import NoDigitsError
from .findings import Bench
from .graphs import capture
from .others import ADAMW, KFAC_ADAM, KFAC_NAME
from .training_problems import Batch, Config, TrainingProblem, adam_config, problem
from .workloads import certificates

Curve = list[tuple[int, float, float]]  # steps, seconds, loss on the target
FIRST_STEPS = 3  # not recorded: they allocate state and compile kernels
EVALUATIONS = 50
EVALUATED_AT_ONCE = 500


class Trial:
    """One optimizer on a problem, from the initial weights over a number of steps.

    Evaluations, the recording and the first steps are not timed; the first steps are billed as the others.
    """

    def __init__(self, bench: Bench, problem: TrainingProblem, kind: str, config: Config, horizon: int, batches: list[Batch]):
        self.bench, self.problem, self.horizon, self.batches = bench, problem, horizon, batches
        settings = dict(config)
        self.clip = settings.pop("clip", None)
        self.model = problem.build().to(bench.device)
        self.optimizer = problem.optimizer(self.model, kind, settings, bench.on_gpu)
        self.base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        if bench.on_gpu:  # a recorded step reads its learning rate where it is written before each replay
            for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                group["lr"] = torch.tensor(rate, device=bench.device)
        self.batch: Batch = (batches[0][0].clone(), batches[0][1].clone())

    def run(self) -> Curve:
        """The whole training, or until the loss is not finite."""
        first = min(FIRST_STEPS, self.horizon)
        advance: Callable[[], object] = self._step
        if self.bench.on_gpu:
            graph, _ = capture(self._step, lambda: self._advance(self._step, 0, first))
            advance = graph.replay
        else:
            self._advance(self._step, 0, first)
        curve: Curve = []
        spent, every = 0.0, max(5, self.horizon // EVALUATIONS)
        for start in range(first, self.horizon, every):
            end = min(self.horizon, start + every)
            self.bench.wait()
            started = time.perf_counter()
            self._advance(advance, start, end)
            self.bench.wait()
            spent += time.perf_counter() - started
            curve.append((end, spent + first * spent / (end - first), self._evaluate()))
            if not math.isfinite(curve[-1][2]):
                break
        return curve

    def facts(self) -> dict[str, Any]:
        """Of the inverses or eigenvectors; none for AdamW."""
        names = {"fallbacks": "refused", "worst_residual": "worst_residual"}
        return {names[name]: value for name, value in certificates(self.optimizer).items()}

    def close(self) -> None:
        """Takes K-FAC's hooks off."""
        if isinstance(self.optimizer, KFAC):
            self.optimizer.close()

    def _step(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.problem.loss(self.model, self.batch)
        loss.backward()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()

    def _advance(self, step: Callable[[], object], start: int, end: int) -> None:
        for number in range(start, end):
            if self.problem.scheduled:
                for group, rate in zip(self.optimizer.param_groups, self.base_rates, strict=True):
                    now = rate * schedule(number, self.horizon)
                    if self.bench.on_gpu:
                        group["lr"].fill_(now)
                    else:
                        group["lr"] = now
            for place, new in zip(self.batch, self.batches[number % len(self.batches)], strict=True):
                place.copy_(new)
            step()

    @torch.no_grad()
    def _evaluate(self) -> float:
        parts = [part.to(self.bench.device).split(EVALUATED_AT_ONCE) for part in self.problem.target]
        pause = self.optimizer.paused() if isinstance(self.optimizer, KFAC) else nullcontext()
        self.model.eval()
        with pause:
            total = sum(self.problem.loss(self.model, chunk) * len(chunk[0]) for chunk in zip(*parts, strict=True))
        self.model.train()
        return float(total) / len(self.problem.target[0])


def reached(curve: Curve, goal: float) -> tuple[int, float] | None:
    """Steps and seconds until the loss was first at most the goal."""
    return next(((steps, seconds) for steps, seconds, loss in curve if loss <= goal), None)


@dataclass
class Race:
    """Runs on one problem, with what is kept of them.

    Attributes:
        bench: which says every run.
        name: of the problem.
        problem: what is trained.
        batches: as many as AdamW takes, on the device.
        kept: kind, configuration, horizon and curve of every run.
    """

    bench: Bench
    name: str
    problem: TrainingProblem
    batches: list[Batch]
    kept: list[dict[str, Any]] = field(default_factory=list)

    def attempt(self, kind: str, config: Config, horizon: int) -> Curve | None:
        """Says a run, or why it failed."""
        found: Curve | None = self.bench.attempt(f"{self.name}: {kind} {config}", lambda: self._train(kind, config, horizon))
        return found

    def _train(self, kind: str, config: Config, horizon: int) -> Curve:
        trial = Trial(self.bench, self.problem, kind, config, horizon, self.batches)
        try:
            curve = trial.run()
            facts = trial.facts()
        finally:
            trial.close()
        steps, seconds, loss = curve[-1]
        figures: dict[str, Any] = {"steps": steps, "s": seconds, "ms_a_step": 1e3 * seconds / steps, "loss": loss}
        self.bench.say(f"{self.name}: {kind} {config}", **figures, least=min(point[2] for point in curve), **facts)
        self.kept.append({"kind": kind, "config": config, "horizon": horizon, "curve": curve})
        return curve

    def reach(self, kind: str, config: Config, best: Curve) -> None:
        """Says what a configuration needs of the steps and seconds of AdamW's best run, given shares of its steps."""
        steps, seconds, goal = best[-1]
        for share in self.problem.shares:
            hit = reached(self.attempt(kind, config, max(6, round(steps * share))) or [], goal)
            ratios = {"of_steps": hit[0] / steps, "of_seconds": hit[1] / seconds} if hit else {"reached": "no"}
            self.bench.say(f"{self.name}: {kind} to {goal:.4g}", **ratios)


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says every run, the best of AdamW, and what K-FAC needs of its steps and seconds."""
    torch.set_float32_matmul_precision("high")
    for name in names:
        bench.attempt(name, partial(_race, bench, name))


def run_adam(bench: Bench, names: Sequence[str]) -> None:
    """Says the same of KFACAdam, in a process of its own, on the problems for which `run` has left AdamW's runs."""
    torch.set_float32_matmul_precision("high")
    for name in names:
        bench.attempt(name, partial(_race_adam, bench, name))


def _prepared(bench: Bench, name: str) -> Race | None:
    try:
        chosen = problem(bench, name)
    except NoDigitsError as error:
        bench.say(name, skipped=str(error))
        return None
    source = chosen.batches()
    batches = [(x.to(bench.device), y.to(bench.device)) for x, y in (next(source) for _ in range(chosen.steps))]
    return Race(bench, name, chosen, batches)


def _race(bench: Bench, name: str) -> None:
    race = _prepared(bench, name)
    if race is None:
        return
    for config in race.problem.adamw:
        race.attempt(ADAMW, config, race.problem.steps)
    best = best_of(race.kept)
    if best is None:
        raise RuntimeError("AdamW has finished with none of its configurations: there is no loss to race to")
    _curves(bench, name).write_text(json.dumps(race.kept), encoding="utf-8")  # for KFACAdam, should the time be over soon
    steps, seconds, goal = best[-1]
    bench.say(f"{name}: best AdamW", loss=goal, steps=steps, s=seconds)
    for config in race.problem.kfac:
        race.reach(KFAC_NAME, config, best)
    _curves(bench, name).write_text(json.dumps(race.kept), encoding="utf-8")


def _race_adam(bench: Bench, name: str) -> None:
    earlier = json.loads(_curves(bench, name).read_text(encoding="utf-8")) if _curves(bench, name).is_file() else []
    best = best_of(earlier)
    if best is None:
        bench.say(f"{name}: {KFAC_ADAM}", skipped="the part `train` has left no loss of AdamW in this folder")
        return
    race = _prepared(bench, name)
    if race is not None:
        race.reach(KFAC_ADAM, adam_config(bench.on_gpu), best)
        _curves(bench, name).write_text(json.dumps(earlier + race.kept), encoding="utf-8")


def _curves(bench: Bench, name: str) -> Path:
    return bench.folder / f"train_{name}.json"


def best_of(kept: Sequence[dict[str, Any]]) -> Curve | None:
    """Of the runs of AdamW, the curve that ends with the least loss; None if none ends with a finite one."""
    curves: list[Curve] = [run["curve"] for run in kept if run["kind"] == ADAMW]
    return min((curve for curve in curves if math.isfinite(curve[-1][2])), key=lambda curve: curve[-1][2], default=None)
