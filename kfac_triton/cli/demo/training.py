"""Training runs that differ in the optimizer alone, and the tuning of a learning rate."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from ... import KFAC
from ...fisher.distributions import Bernoulli
from .autoencoder import build_autoencoder, full_loss, reconstruction_loss
from .digits import Images


class Reconstruction(Bernoulli):
    """The autoencoder's loss, and its curvature: independent pixels, summed."""

    def __call__(self, logits: Tensor, images: Tensor) -> Tensor:
        """`reconstruction_loss`."""
        return reconstruction_loss(logits, images)


MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
OnStep = Callable[[float], None]
AUTO = "K-FAC auto"


@dataclass(frozen=True)
class KFACSettings:
    """K-FAC's settings in the race: fixed, the same for every seed and data set.

    They were chosen once, on digits with seed 0. Fresh curvature pays here: with a factor average over two steps
    (`ema_decay` 0.5) instead of twenty (0.95), K-FAC needs 61 instead of 92 steps to a loss of 75.3.
    """

    lr: float = 1.0
    momentum: float = 0.9
    damping: float = 3.0
    kl_clip: float = 4.0
    ema_decay: float = 0.5
    statistics_every: int = 1
    inverse_every: int = 1


@dataclass(frozen=True)
class AutoSettings:
    """K-FAC's without a learning rate: damping is that to begin with, and the Fisher the model's own (one label draw)."""

    damping: float = 3.0
    ema_decay: float = 0.5


FIRST_ORDER: dict[str, tuple[Callable[[nn.Module, float], torch.optim.Optimizer], tuple[float, ...]]] = {
    "Adam": (lambda model, lr: torch.optim.Adam(model.parameters(), lr=lr), (3e-4, 1e-3, 3e-3, 1e-2)),
    "SGD": (
        lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True),
        (1e-4, 3e-4, 1e-3, 3e-3),
    ),
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

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, images: Tensor, batch: int, seed: int):
        self.model = model
        self.optimizer = make_optimizer(model)
        self.images = images
        self.epoch = len(images) // batch
        self.batch_losses: list[float] = []
        self.seconds: list[float] = []
        self._batches = shuffled_batches(images, batch, seed)

    @property
    def diverged(self) -> bool:
        """Whether the last loss is not finite."""
        return bool(self.batch_losses) and not math.isfinite(self.batch_losses[-1])

    @property
    def losses(self) -> list[float]:
        """Training loss after each step: the mean over the last epoch's mini-batches, at first over those so far."""
        windows = (self.batch_losses[max(0, end - self.epoch) : end] for end in range(1, len(self.batch_losses) + 1))
        return [sum(window) / len(window) for window in windows]

    def advance(self, steps: int, on_step: OnStep | None = None) -> None:
        """Train until `steps` steps are done in all, or the loss is not finite."""
        while len(self.batch_losses) < steps and not self.diverged:
            images = next(self._batches)
            self._synchronize()
            start = time.perf_counter()
            loss = self._take_step(images)
            self._synchronize()
            elapsed = time.perf_counter() - start
            self.seconds.append(elapsed + (self.seconds[-1] if self.seconds else 0.0))
            self.batch_losses.append(loss.item())
            if on_step is not None:
                on_step(self.batch_losses[-1])

    def _take_step(self, images: Tensor) -> Tensor:
        if isinstance(self.optimizer, KFAC) and self.optimizer.is_auto:
            loss: Tensor = self.optimizer.step(lambda: (self.model(images), images))
            return loss
        self.optimizer.zero_grad()
        loss = reconstruction_loss(self.model(images), images)
        loss.backward()
        self.optimizer.step()
        return loss

    def training_loss(self) -> float:
        """Loss on all training images; infinite if it is not finite, so that it loses every comparison."""
        if self.diverged:
            return math.inf
        loss = full_loss(self.model, self.images)
        return loss if math.isfinite(loss) else math.inf

    def close(self) -> None:
        """Remove what the optimizer hooked into the model, if it did."""
        close = getattr(self.optimizer, "close", None)
        if close is not None:
            close()

    def _synchronize(self) -> None:
        if self.images.device.type != "cpu":
            torch.accelerator.synchronize(self.images.device)


@dataclass(frozen=True)
class Tuning:
    """What `tune` found.

    Attributes:
        lr: The winner.
        run: Its run, `steps` long unless it diverged.
        trials: For every learning rate the steps it ran and its loss on all training images then.
        edge: Which end of the grid the winner sits at, `"lowest"` or `"highest"`; None inside the grid.
    """

    lr: float
    run: TrainingRun
    trials: dict[float, tuple[int, float]]
    edge: str | None


def tune(start: Callable[[float], TrainingRun], grid: Sequence[float], steps: int, on_step: OnStep) -> Tuning:
    """Find the best learning rate by successive halving, with the state of every run kept.

    All learning rates train for a quarter of the steps, the best two of them go on to the end; the lowest loss on all
    training images wins. Runs whose loss is not finite drop out.

    Args:
        start: Starts a run with a learning rate.
        grid: Learning rates in rising order.
        steps: Steps of the winner.
        on_step: Called with the mini-batch loss after every step.
    """
    runs = {lr: start(lr) for lr in grid}
    trials: dict[float, tuple[int, float]] = {}

    def train(rates: Sequence[float], until: int) -> list[float]:
        """Train these and return them, best first."""
        for lr in rates:
            runs[lr].advance(until, on_step)
            trials[lr] = (len(runs[lr].batch_losses), runs[lr].training_loss())
        return sorted(rates, key=lambda lr: trials[lr][1])

    finalists = train(grid, max(1, steps // 4))[:2]
    finalists = [lr for lr in finalists if math.isfinite(trials[lr][1])] or finalists[:1]
    winner = train(finalists, steps)[0]
    edge = {grid[0]: "lowest", grid[-1]: "highest"}.get(winner)
    return Tuning(winner, runs[winner], trials, edge)


@dataclass(frozen=True)
class Result:
    """A contestant at the end of the race.

    Attributes:
        name: Of the optimizer.
        settings: Its settings, the tuned learning rate included.
        run: Its training run.
        train_loss: On all training images.
        held_out_loss: On all held-out images.
        tuning: How its learning rate was found; None for fixed settings.
    """

    name: str
    settings: dict[str, float]
    run: TrainingRun
    train_loss: float
    held_out_loss: float
    tuning: Tuning | None = None


class Race:
    """The same task for every contestant: initial weights, images and their order are fixed by the seed.

    Args:
        images: Training and held-out images, on the device to train on.
        batch: Mini-batch size.
        seed: Fixes the initial weights and the order of the images.
    """

    def __init__(self, images: Images, batch: int, seed: int):
        self.images = images
        self.batch = batch
        self.seed = seed

    def start(self, make_optimizer: MakeOptimizer) -> TrainingRun:
        """A run that has not made a step yet."""
        model = build_autoencoder(self.seed).to(self.images.train.device)
        return TrainingRun(model, make_optimizer, self.images.train, self.batch, self.seed)

    def run_kfac(self, settings: KFACSettings, steps: int, on_step: OnStep) -> Result:
        """Train with K-FAC and these settings."""

        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return KFAC(model, **asdict(settings))

        self._warm_up(make_optimizer)
        run = self.start(make_optimizer)
        run.advance(steps, on_step)
        return self._finish("K-FAC", asdict(settings), run)

    def run_auto(self, settings: AutoSettings, steps: int, on_step: OnStep) -> Result:
        """Train with K-FAC that chooses learning rate, momentum and damping by itself."""

        def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
            return KFAC(model, lr="auto", fisher="mc", loss=Reconstruction(), **asdict(settings))

        self._warm_up(make_optimizer)
        run = self.start(make_optimizer)
        run.advance(steps, on_step)
        return self._finish(AUTO, asdict(settings), run)

    def run_first_order(self, name: str, steps: int, on_step: OnStep) -> Result:
        """Tune the learning rate of `"Adam"` or `"SGD"` and return the best run."""
        make, grid = FIRST_ORDER[name]
        self._warm_up(lambda model: make(model, grid[0]))
        tuning = tune(lambda lr: self.start(lambda model: make(model, lr)), grid, steps, on_step)
        settings = {"lr": tuning.lr} | ({"momentum": 0.9} if name == "SGD" else {})
        return self._finish(name, settings, tuning.run, tuning)

    def _warm_up(self, make_optimizer: MakeOptimizer) -> None:
        """Two steps of a throwaway run, so that no contestant is billed for compiled kernels and thread pools."""
        run = self.start(make_optimizer)
        run.advance(2)
        run.close()

    def _finish(self, name: str, settings: dict[str, float], run: TrainingRun, tuning: Tuning | None = None) -> Result:
        run.close()
        held_out_loss = math.inf if run.diverged else full_loss(run.model, self.images.held_out)
        return Result(name, settings, run, run.training_loss(), held_out_loss, tuning)


def steps_to(losses: Sequence[float], target: float) -> int | None:
    """First step, counted from 1, whose loss is at or below the target; None if there is none."""
    return next((step for step, loss in enumerate(losses, start=1) if loss <= target), None)
