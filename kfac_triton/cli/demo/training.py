"""Training runs that differ in the optimizer alone, and the search for a learning rate."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import KFAC
from ...fisher.distributions import Bernoulli
from .autoencoder import build_autoencoder, full_loss, reconstruction_loss
from .digits import Images

Trials = dict[Any, tuple[int, float]]


class Reconstruction(Bernoulli):
    """The autoencoder's loss, and its curvature: independent pixels, summed."""

    def __call__(self, logits: Tensor, images: Tensor) -> Tensor:
        """`reconstruction_loss`."""
        return reconstruction_loss(logits, images)


@dataclass(frozen=True)
class Contestant:
    """An optimizer and its settings.

    Attributes:
        make: Makes the optimizer of a model, with the learning rate and the settings as keyword arguments.
        rates: Learning rates to try, in rising order; a single one is fixed.
        settings: All other settings.
    """

    make: Callable[..., torch.optim.Optimizer]
    rates: tuple[Any, ...]
    settings: dict[str, Any]

    def total_steps(self, steps: int) -> int:
        """Steps of all its runs where the best one takes `steps`."""
        return len(self.rates) * first_round(steps) + len(self.rates[:2]) * (steps - first_round(steps))


def of_parameters(make: Callable[..., torch.optim.Optimizer]) -> Callable[..., torch.optim.Optimizer]:
    """The same optimizer made of a model, as K-FAC is."""
    return lambda model, **settings: make(model.parameters(), **settings)


AUTO = "K-FAC auto"
CONTESTANTS = {
    # K-FAC's settings are the same for every seed and data set; they were chosen once, on digits with seed 0. Fresh curvature
    # pays here: with a factor average over two steps (ema_decay 0.5) instead of twenty (0.95), K-FAC needs 61 instead of 92
    # steps to a loss of 75.3.
    "K-FAC": Contestant(
        KFAC,
        (1.0,),
        {"momentum": 0.9, "damping": 3.0, "kl_clip": 4.0, "ema_decay": 0.5, "statistics_every": 1, "inverse_every": 1},
    ),
    "Adam": Contestant(of_parameters(torch.optim.Adam), (3e-4, 1e-3, 3e-3, 1e-2), {}),
    "SGD": Contestant(of_parameters(partial(torch.optim.SGD, nesterov=True)), (1e-4, 3e-4, 1e-3, 3e-3), {"momentum": 0.9}),
    # Damping adapts from this value; the Fisher is the model's own, with one label draw.
    AUTO: Contestant(partial(KFAC, fisher="mc", loss=Reconstruction()), ("auto",), {"damping": 3.0, "ema_decay": 0.5}),
}


def shuffled_batches(images: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Endless mini-batches, each epoch in a fresh random order; images beyond a multiple of `batch` sit an epoch out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for indices in order[: len(images) // batch * batch].split(batch):
            yield images[indices.to(images.device)]


class TrainingRun:
    """One model in training with one optimizer; keeps its state, so that `advance` goes on where it stopped.

    Attributes:
        batch_losses: Loss of each step's mini-batch before the step.
        seconds: Time from the start to the end of each step, training steps only.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, batch: int, seed: int):
        self.model = model
        self.optimizer = optimizer
        self.images = images
        self.epoch = len(images) // batch
        self.batch_losses: list[float] = []
        self.seconds: list[float] = []
        self._batches = shuffled_batches(images, batch, seed)

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return not all(map(math.isfinite, self.batch_losses[-1:]))

    @property
    def losses(self) -> list[float]:
        """Training loss after each step: the mean over the last epoch's mini-batches, at first over those so far."""
        windows = (self.batch_losses[max(0, end - self.epoch) : end] for end in range(1, len(self.batch_losses) + 1))
        return [sum(window) / len(window) for window in windows]

    def advance(self, steps: int, on_step: Callable[[float], None] = lambda loss: None) -> None:
        """Train until `steps` steps are done in all, or the loss is not finite."""
        while len(self.batch_losses) < steps and not self.diverged:
            images = next(self._batches)
            self._synchronize()
            start = time.perf_counter()
            loss = self._take_step(images)
            self._synchronize()
            self.seconds.append(time.perf_counter() - start + sum(self.seconds[-1:]))
            self.batch_losses.append(loss.item())
            on_step(self.batch_losses[-1])

    def _take_step(self, images: Tensor) -> Tensor:
        if isinstance(self.optimizer, KFAC) and self.optimizer.is_auto:
            return self.optimizer.step(lambda: (self.model(images), images))
        self.optimizer.zero_grad()
        loss = reconstruction_loss(self.model(images), images)
        loss.backward()
        self.optimizer.step()
        return loss

    def loss_on(self, images: Tensor) -> float:
        """Loss over all these images; infinite if it is not finite, so that it loses every comparison."""
        loss = math.inf if self.diverged else full_loss(self.model, images)
        return loss if math.isfinite(loss) else math.inf

    def close(self) -> None:
        """Remove what K-FAC hooked into the model."""
        if isinstance(self.optimizer, KFAC):
            self.optimizer.close()

    def _synchronize(self) -> None:
        if self.images.device.type != "cpu":
            torch.accelerator.synchronize(self.images.device)


@dataclass(frozen=True)
class Result:
    """A contestant at the end of the race.

    Attributes:
        name: Of the optimizer.
        settings: Its settings, with the learning rate that won.
        run: Its run with that learning rate, as long as asked for unless it diverged.
        trials: For every learning rate, in rising order, the steps it ran and its loss on all training images then.
        held_out_loss: On all held-out images.
    """

    name: str
    settings: dict[str, Any]
    run: TrainingRun
    trials: Trials
    held_out_loss: float

    @property
    def is_tuned(self) -> bool:
        """Whether the learning rate was searched for."""
        return len(self.trials) > 1

    @property
    def train_loss(self) -> float:
        """On all training images."""
        return self.trials[self.settings["lr"]][1]

    @property
    def edge(self) -> str | None:
        """Which end of the grid the learning rate sits at, `"lowest"` or `"highest"`; None inside the grid, or without one."""
        rates = list(self.trials)
        return {rates[0]: "lowest", rates[-1]: "highest"}.get(self.settings["lr"]) if self.is_tuned else None


def first_round(steps: int) -> int:
    """Steps for which every learning rate is tried."""
    return max(1, steps // 4)


def tune(
    start: Callable[[Any], TrainingRun], grid: Sequence[Any], steps: int, on_step: Callable[[str], None]
) -> tuple[Any, TrainingRun, Trials]:
    """Find the best learning rate by successive halving, with the state of every run kept.

    All learning rates train for a quarter of the steps, the best two of them go on to the end; the lowest loss on all
    training images wins. Runs whose loss is not finite drop out.

    Args:
        start: Starts a run with a learning rate.
        grid: Learning rates in rising order.
        steps: Steps of the winner.
        on_step: Called after every step with the learning rate and the mini-batch loss, as text.

    Returns:
        The winner, its run, and what became of every learning rate: see `Result`.
    """
    runs = {lr: start(lr) for lr in grid}
    trials: Trials = {}

    def train(rates: Sequence[Any], until: int) -> list[Any]:
        """Train these and return them, best first."""
        for lr in rates:
            runs[lr].advance(until, partial(show, lr))
            trials[lr] = (len(runs[lr].batch_losses), runs[lr].loss_on(runs[lr].images))
        return sorted(rates, key=lambda lr: trials[lr][1])

    def show(lr: Any, loss: float) -> None:
        on_step(f"lr {lr}, loss {loss:.1f}")

    finalists = train(grid, first_round(steps))[:2]
    finalists = [lr for lr in finalists if math.isfinite(trials[lr][1])] or finalists[:1]
    winner = train(finalists, steps)[0]
    return winner, runs[winner], trials


def compete(name: str, images: Images, batch: int, seed: int, steps: int, on_step: Callable[[str], None]) -> Result:
    """Train one of `CONTESTANTS`, with the best of its learning rates; see `tune`.

    Args:
        name: Of the contestant.
        images: Training and held-out images, on the device to train on.
        batch: Mini-batch size.
        seed: Fixes the initial weights, the order of the images and the global random state: the same for every contestant.
        steps: Steps of the winner.
        on_step: As of `tune`.
    """
    contestant = CONTESTANTS[name]

    def start(lr: Any) -> TrainingRun:
        model = build_autoencoder(seed).to(images.train.device)
        return TrainingRun(model, contestant.make(model, lr=lr, **contestant.settings), images.train, batch, seed)

    torch.manual_seed(seed)  # for the label draws of K-FAC auto
    # Two steps of a throwaway run, so that no contestant is billed for compiled kernels and thread pools.
    warm_up = start(contestant.rates[0])
    warm_up.advance(2)
    warm_up.close()
    lr, run, trials = tune(start, contestant.rates, steps, on_step)
    run.close()
    return Result(name, {"lr": lr} | contestant.settings, run, trials, run.loss_on(images.held_out))


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """First step, counted from 1, whose loss is at or below the target; None if there is none."""
    return next((step for step, loss in enumerate(losses, start=1) if loss <= target), None)
