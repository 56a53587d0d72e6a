"""One training run of the race: the schedule, the step, the evaluations, and what is kept of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .optimizers import Config, make_optimizer
from .problems import Batch, Problem

WARM_UP = 0.05
EVALUATED_AT_ONCE = 128
OnStep = Callable[[], None]
LossOf = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Run:
    """What is kept of a training run.

    Attributes:
        problem: Its name.
        version: Its fingerprint.
        optimizer: One of `contest.CONTESTANTS`.
        config: Settings of the optimizer.
        seed: Of weights and batches.
        horizon: Steps that the schedule is for.
        device: Where it ran.
        threads: Of PyTorch.
        sources: Fingerprint of the optimizer's code.
        steps: Steps done at each evaluation, 0 first.
        losses: On the problem's target set at each evaluation; infinite at the end if the run diverged.
        seconds: Of training until each evaluation: of the processor if the network trains on it, else by the clock.
        held_out_loss: At the end.
        held_out_accuracy: At the end, in [0, 1]; 0 if the loss is no cross-entropy.
    """

    problem: str
    version: str
    optimizer: str
    config: Config
    seed: int
    horizon: int
    device: str
    threads: int
    sources: str = ""
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    held_out_loss: float = math.inf
    held_out_accuracy: float = 0.0

    @property
    def final(self) -> float:
        """Loss at the end."""
        return self.losses[-1]

    @property
    def ms_per_step(self) -> float:
        """Milliseconds a training step."""
        return 1000 * self.seconds[-1] / max(1, self.steps[-1])


def schedule(step: int, horizon: int) -> float:
    """Factor on the learning rate in a step, counted from 0: linear warm-up over 5 % of the steps, then a cosine to 0."""
    warm_up = max(1, round(WARM_UP * horizon))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, horizon - warm_up)))


def train_step(model: nn.Module, optimizer: Any, batch: Batch, config: Config, loss_of: LossOf = cross_entropy) -> Tensor:
    """One step of any contestant; the mean loss before it. The only place that knows how an optimizer is called."""
    inputs, targets = batch
    optimizer.zero_grad()
    outputs = model(inputs)
    loss = loss_of(outputs, targets)
    if config.get("fisher", "empirical") != "empirical":
        optimizer.accumulate_fisher(outputs, targets)
    loss.backward()
    if config.get("clip") is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module, batch: Batch, paused: AbstractContextManager[None]) -> tuple[float, float]:
    """Mean loss and accuracy in evaluation mode; a loss that is not finite counts as infinite."""
    inputs, targets = batch
    model.eval()
    with paused:
        outputs = torch.cat([model(chunk) for chunk in inputs.split(EVALUATED_AT_ONCE)])
    model.train()
    loss = problem.loss(outputs, targets).item()
    correct = (outputs.argmax(dim=1) == targets).float().mean().item() if problem.is_classification else 0.0
    return loss if math.isfinite(loss) else math.inf, correct


def train(
    problem: Problem, optimizer_name: str, config: Config, seed: int, horizon: int, device: torch.device, on_step: OnStep
) -> Run:
    """Train a network from the seed's weights on the seed's batches, over the whole horizon or until the loss is not finite.

    Args:
        problem: What to train.
        optimizer_name: One of `contest.CONTESTANTS`.
        config: Its settings.
        seed: Of weights, batches and what the optimizer draws.
        horizon: Steps.
        device: Where to train.
        on_step: Called after every step.
    """
    run = Run(problem.name, problem.version, optimizer_name, config, seed, horizon, str(device), torch.get_num_threads())
    torch.manual_seed(seed)
    model = problem.build(seed).to(device)
    optimizer = make_optimizer(optimizer_name, model, config)
    base_rates = [group["lr"] for group in optimizer.param_groups]
    target_set, held_out_set = (_to(batch, device) for batch in (problem.target_set(), problem.held_out_set()))
    batches = problem.batches(seed)
    pause = getattr(optimizer, "paused", nullcontext)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    elapsed, diverged = 0.0, False

    def record(step: int) -> None:
        run.steps.append(step)
        run.seconds.append(elapsed)
        run.losses.append(math.inf if diverged else evaluate(problem, model, target_set, pause())[0])

    record(0)
    for step in range(horizon):
        for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
            group["lr"] = rate * schedule(step, horizon)
        batch = _to(next(batches), device)
        _synchronize(device)
        start = clock()
        try:
            loss = train_step(model, optimizer, batch, config, problem.loss).item()
        except torch.linalg.LinAlgError:  # a factorization that met what no damping saves
            loss = math.inf
        _synchronize(device)
        elapsed += clock() - start
        diverged = not math.isfinite(loss)
        on_step()
        if diverged or (step + 1) % problem.evaluate_every == 0 or step + 1 == horizon:
            record(step + 1)
        if diverged:
            break
    if math.isfinite(run.final):
        run.held_out_loss, run.held_out_accuracy = evaluate(problem, model, held_out_set, pause())
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()
    return run


def warm_up(problem: Problem, optimizer_name: str, config: Config, device: torch.device) -> None:
    """Two steps that nobody counts, so that no run is billed for thread pools and compiled kernels."""
    model = problem.build(0).to(device)
    optimizer = make_optimizer(optimizer_name, model, config)
    batches = problem.batches(0)
    for _ in range(2):
        train_step(model, optimizer, _to(next(batches), device), config, problem.loss)
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()


def _to(batch: Batch, device: torch.device) -> Batch:
    return batch[0].to(device), batch[1].to(device)


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
