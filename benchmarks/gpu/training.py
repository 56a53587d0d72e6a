"""The part `train`: seconds to the loss that tuned AdamW ends with, every step a replayed CUDA graph for both optimizers."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import KFAC

from ..convergence.training import schedule
from .digits import NoDigitsError
from .findings import Bench
from .graphs import capture
from .training_problems import Batch, Config, TrainingProblem, problem
from .workloads import certificates

Curve = list[tuple[int, float, float]]  # steps, seconds, loss on the target
FIRST_STEPS = 3  # not recorded: they allocate state and compile kernels
EVALUATIONS = 50
EVALUATED_AT_ONCE = 500


class Trial:
    """One optimizer on a problem, from the initial weights over a number of steps.

    Evaluations, the recording and the first steps are not timed; the first steps are billed as the others.
    """

    def __init__(self, bench: Bench, problem: TrainingProblem, kfac: bool, config: Config, horizon: int, batches: list[Batch]):
        self.bench, self.problem, self.horizon, self.batches = bench, problem, horizon, batches
        settings = dict(config)
        self.clip = settings.pop("clip", None)
        self.model = problem.build().to(bench.device)
        self.optimizer = problem.make(self.model, kfac, settings, bench.on_gpu)
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
        """Of the inverses; for K-FAC alone."""
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


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says every run, the best of AdamW, and what K-FAC needs of its steps and seconds."""
    torch.set_float32_matmul_precision("high")
    for name in names:
        bench.attempt(name, partial(_race, bench, name))


def _race(bench: Bench, name: str) -> None:
    try:
        chosen = problem(bench, name)
    except NoDigitsError as error:
        bench.say(name, skipped=str(error))
        return
    source = chosen.batches()
    batches = [(x.to(bench.device), y.to(bench.device)) for x, y in (next(source) for _ in range(chosen.steps))]
    kept: list[dict[str, Any]] = []

    def train(kind: str, config: Config, horizon: int) -> Curve:
        trial = Trial(bench, chosen, kind == "K-FAC", config, horizon, batches)
        try:
            curve = trial.run()
            facts = trial.facts()
        finally:
            trial.close()
        steps, seconds, loss = curve[-1]
        figures: dict[str, Any] = {"steps": steps, "s": seconds, "ms_a_step": 1e3 * seconds / steps, "loss": loss}
        bench.say(f"{name}: {kind} {config}", **figures, least=min(point[2] for point in curve), **facts)
        kept.append({"kind": kind, "config": config, "horizon": horizon, "curve": curve})
        return curve

    def attempt(kind: str, config: Config, horizon: int) -> Curve | None:
        found: Curve | None = bench.attempt(f"{name}: {kind} {config}", lambda: train(kind, config, horizon))
        return found

    curves = [attempt("AdamW", config, chosen.steps) for config in chosen.adamw]
    finished = [curve for curve in curves if curve and math.isfinite(curve[-1][2])]
    if not finished:
        raise RuntimeError("AdamW has finished with none of its configurations: there is no loss to race to")
    best = min(finished, key=lambda curve: curve[-1][2])
    steps, seconds, goal = best[-1]
    bench.say(f"{name}: best AdamW", loss=goal, steps=steps, s=seconds)
    for config in chosen.kfac:
        for share in chosen.shares:
            hit = reached(attempt("K-FAC", config, max(6, round(steps * share))) or [], goal)
            ratios = {"of_steps": hit[0] / steps, "of_seconds": hit[1] / seconds} if hit else {"reached": "no"}
            bench.say(f"{name}: K-FAC to {goal:.4g}", **ratios)
    (bench.folder / f"train_{name}.json").write_text(json.dumps(kept), encoding="utf-8")
