"""Training runs on losses with derivatives: contestants, their settings, and one log of all runs."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from kfac_triton import KFAC

from .contest import Entry
from .derivative_problems import DerivativeProblem
from .log import LogError, sources
from .optimizers import Config

ADAM, FIXED, AUTO = "Adam", "K-FAC", "K-FAC, lr=auto"
TUNING_SEED = 0
KFAC_PART = 1 / 5  # of Adam's steps
WARM_UP = 0.02
RECORD_EVERY = 5
FORMAT = 1
LOSS = nn.MSELoss()

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "exponential": lambda done: 1e-3**done,
}

_FIXED: Config = {"lr": 1.0, "kl_clip": 1e-3, "schedule": "cosine"}
_EKFAC: Config = _FIXED | {"curvature": "ekfac", "ema_decay": 0.8}


def _adam(*rates: float) -> list[Config]:
    return Entry({"schedule": "cosine"}, {"lr": rates}).configs()


def _auto(fisher: str) -> list[Config]:
    return Entry({"lr": "auto", "damping": 1.0}, {"fisher": (fisher, "empirical")}).configs()


# Three configurations of Adam and of K-FAC with a fixed learning rate, around the best of some sixty trial runs of K-FAC and
# twelve of Adam on seed 0; two of lr="auto". A configuration of the energies has ten outputs, so that the exact GGN would need
# ten backward passes: labels are drawn instead.
CONTEST: dict[str, dict[str, list[Config]]] = {
    "poisson": {
        ADAM: _adam(5e-3, 1e-2, 2e-2),
        FIXED: [
            _FIXED | {"fisher": "ggn", "damping": 1.0, "damping_end": 3e-3},
            _FIXED | {"fisher": "ggn", "damping": 1.0, "damping_end": 1e-2},
            _EKFAC | {"fisher": "ggn", "damping": 1.0, "damping_end": 1e-2},
        ],
        AUTO: _auto("ggn"),
    },
    "forces": {
        ADAM: _adam(2e-2, 4e-2, 8e-2),
        FIXED: [
            _EKFAC | {"fisher": "mc", "damping": 0.1, "damping_end": 1e-2},
            _EKFAC | {"fisher": "mc", "damping": 0.1, "damping_end": 1e-2, "schedule": "exponential"},
            _EKFAC | {"fisher": "mc", "damping": 0.1, "damping_end": 3e-3, "schedule": "exponential"},
        ],
        AUTO: _auto("mc"),
    },
}


@dataclass
class DerivativeRun:
    """What is kept of a training run.

    Attributes:
        problem: Its name.
        version: Its fingerprint.
        optimizer: The contestant.
        config: Its settings.
        seed: Of weights and data.
        horizon: Steps that the schedule is for.
        threads: Of PyTorch.
        sources: Fingerprint of the optimizer's code.
        steps: Steps done when the numbers below were taken.
        losses: The training loss; infinite at the end if the run diverged.
        errors: The problem's error.
        seconds: CPU time of training until then; other processes would lengthen the time of the clock.
    """

    problem: str
    version: str
    optimizer: str
    config: Config
    seed: int
    horizon: int
    threads: int
    sources: str = ""
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Equal for runs of the same kind."""
        config = dict(sorted(self.config.items()))
        return json.dumps([self.problem, self.version, self.optimizer, config, self.seed, self.horizon, self.threads])

    @property
    def final(self) -> float:
        """Loss at the end."""
        return self.losses[-1]

    @property
    def ms_per_step(self) -> float:
        """Milliseconds of a training step."""
        return 1000 * self.seconds[-1] / max(1, self.steps[-1])


class DerivativeLog:
    """Finished runs in a JSON file, which is written after each; None keeps them in memory.

    Raises:
        LogError: if the file exists and is no such log.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.runs: dict[str, DerivativeRun] = {}
        if path is not None and path.exists():
            try:
                content = json.loads(path.read_text())
                if content["format"] != FORMAT:
                    raise ValueError(f"format {content['format']}")
                runs = [DerivativeRun(**run) for run in content["runs"]]
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise LogError(f"{str(path)!r} is no log of these runs ({type(error).__name__}: {error})") from error
            self.runs = {run.key: run for run in runs}

    def add(self, run: DerivativeRun) -> None:
        """Keeps a run and writes the file anew, moved into place at once: a stop in the middle leaves the old one."""
        self.runs[run.key] = run
        if self.path is None:
            return
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps({"format": FORMAT, "runs": [asdict(run) for run in self.runs.values()]}) + "\n")
        os.replace(partial, self.path)


def horizon(problem: DerivativeProblem, optimizer: str) -> int:
    """Steps of a contestant."""
    return problem.steps if optimizer == ADAM else max(1, round(KFAC_PART * problem.steps))


def factor(schedule: str, step: int, steps: int) -> float:
    """Factor on the learning rate in a step, counted from 0, after a linear warm-up over 2 % of the steps."""
    return SCHEDULES[schedule](step / steps) * min(1.0, (step + 1) / max(1.0, WARM_UP * steps))


def make_optimizer(optimizer: str, model: nn.Module, config: Config, steps: int) -> torch.optim.Optimizer:
    """A contestant's optimizer for that many steps.

    With `damping_end`, K-FAC's damping falls exponentially from `damping` to it.
    """
    settings = {name: value for name, value in config.items() if name not in ("schedule", "damping_end")}
    if "damping_end" in config:
        first, ratio = config["damping"], config["damping_end"] / config["damping"]
        settings["damping"] = lambda step: first * ratio ** min(1.0, step / steps)
    if optimizer == ADAM:
        return torch.optim.Adam(model.parameters(), **settings)
    return KFAC(model, loss=LOSS, **settings)


def train_step(optimizer: torch.optim.Optimizer, config: Config, residuals: Callable[[], Tensor]) -> Tensor:
    """One step of any contestant; the loss before it. The only place that knows how an optimizer is called."""
    if config["lr"] == "auto":

        def closure() -> tuple[Tensor, Tensor]:
            outputs = residuals()
            return outputs, torch.zeros_like(outputs)

        return optimizer.step(closure)
    optimizer.zero_grad()
    outputs = residuals()
    targets = torch.zeros_like(outputs)
    loss = LOSS(outputs, targets)
    if config.get("fisher", "empirical") != "empirical":
        optimizer.accumulate_fisher(outputs, targets)  # type: ignore[attr-defined]
    loss.backward()
    optimizer.step()
    return loss.detach()


def train(
    problem: DerivativeProblem, optimizer_name: str, config: Config, seed: int, steps: int, on_step: Callable[[], None]
) -> DerivativeRun:
    """Trains a network from the seed's weights on the seed's data, for all steps or until the loss is not finite."""
    run = DerivativeRun(problem.name, problem.version, optimizer_name, config, seed, steps, torch.get_num_threads())
    run.sources = torch.__version__ if optimizer_name == ADAM else sources()
    torch.manual_seed(seed)  # of labels that a Fisher draws
    model, data = problem.build(seed), problem.data(seed)
    optimizer = make_optimizer(optimizer_name, model, config, steps)
    rates = [group["lr"] for group in optimizer.param_groups]
    elapsed = 0.0

    def record(step: int) -> None:
        with getattr(optimizer, "paused", nullcontext)():
            loss = float(problem.residuals(model, data).detach().square().mean())
            error = problem.error(model)
        run.steps.append(step)
        run.seconds.append(elapsed)
        run.losses.append(loss if math.isfinite(loss) else math.inf)
        run.errors.append(error if math.isfinite(error) else math.inf)

    record(0)
    for step in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor(config.get("schedule", "constant"), step, steps)
        start = time.process_time()
        try:
            is_finite = math.isfinite(train_step(optimizer, config, lambda: problem.residuals(model, data)).item())
        except torch.linalg.LinAlgError:  # a factorization of a matrix that no damping repairs
            is_finite = False
        elapsed += time.process_time() - start
        on_step()
        if not is_finite or (step + 1) % RECORD_EVERY == 0 or step + 1 == steps:
            record(step + 1)
        if not is_finite:
            run.losses[-1] = run.errors[-1] = math.inf
            break
    close = getattr(optimizer, "close", None)
    if close is not None:
        close()
    return run
