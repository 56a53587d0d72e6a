"""What is raced on: a network, its data, its batches, and what counts as the loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton.cli.demo.autoencoder import build_autoencoder, reconstruction_loss
from kfac_triton.cli.demo.training import shuffled_batches

from . import images, text
from .models import MLP, ConvNet, ResNet, TextTransformer, ViT

Batch = tuple[Tensor, Tensor]

# Raise it with every change that makes old curves incomparable and that the numbers of a Problem do not show:
# a network's forward, the order of batches, the schedule, the way of evaluating.
REVISION = 2

TEXT, AUTOENCODER = "text", "autoencoder"
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    TEXT: TextTransformer,
    "vit": ViT,
    "resnet": ResNet,
    "mlp": MLP,
    "conv": ConvNet,
}
HELD_OUT, TRAINING = "held-out", "training"


@dataclass(frozen=True)
class Problem:
    """One problem of the race.

    Attributes:
        name: For the command line, tables and the log.
        title: For tables and pictures.
        kind: A key of `NETWORKS`, or `AUTOENCODER`.
        network: Arguments of the network.
        steps: Steps of a run.
        batch: Windows or images a step.
        evaluate_every: Steps between evaluations.
        evaluated: Windows or images that an evaluation takes.
        target: `HELD_OUT` or `TRAINING`, the data that curves are made of.
    """

    name: str
    title: str
    kind: str
    network: dict[str, Any]
    steps: int
    batch: int
    evaluate_every: int
    evaluated: int
    target: str = HELD_OUT

    @property
    def is_text(self) -> bool:
        """Whether the data are text, else digits."""
        return self.kind == TEXT

    @property
    def is_classification(self) -> bool:
        """Whether the loss is cross-entropy, so that there is an accuracy."""
        return self.kind != AUTOENCODER

    @property
    def loss_name(self) -> str:
        """What the race is about: the loss on `target_set`."""
        return f"{self.target} loss"

    @cached_property
    def version(self) -> str:
        """Fingerprint of everything that a curve depends on beside optimizer and seed."""
        data = text.fingerprint() if self.is_text else images.fingerprint()
        definition = json.dumps([REVISION, asdict(self), data], sort_keys=True)
        return hashlib.sha256(definition.encode()).hexdigest()[:12]

    def build(self, seed: int) -> nn.Module:
        """The network with the seed's initial weights; the global random state stays as it is."""
        if self.kind == AUTOENCODER:
            return build_autoencoder(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NETWORKS[self.kind](**self.network)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over symbols or images: cross-entropy, or of an autoencoder nats an image."""
        return F.cross_entropy(outputs, targets) if self.is_classification else reconstruction_loss(outputs, targets)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches, the same for every contestant."""
        if self.is_text:
            return text.random_windows(text.split(text.corpus())[0], self.network["context"], self.batch, seed)
        digits, labels = images.split()[0]
        if self.kind == AUTOENCODER:
            return ((batch, batch) for batch in shuffled_batches(digits.flatten(1), self.batch, seed))
        return images.shifted_batches(digits, labels, self.batch, seed)

    def target_set(self) -> Batch:
        """What curves are made of: held-out data, or training digits as they are, not shifted."""
        return self.held_out_set() if self.target == HELD_OUT else self._digits(*images.split()[0])

    def held_out_set(self) -> Batch:
        """Held-out data: windows at even distances, or digits."""
        if self.is_text:
            return text.even_windows(text.split(text.corpus())[1], self.network["context"], self.evaluated)
        return self._digits(*images.split()[1])

    def _digits(self, digits: Tensor, labels: Tensor) -> Batch:
        if self.kind == AUTOENCODER:
            pixels = digits[: self.evaluated].flatten(1)
            return pixels, pixels
        return digits[: self.evaluated], labels[: self.evaluated]

    def miniature(self) -> Problem:
        """A few steps of a tiny network, to try the race itself. The autoencoder keeps its widths."""
        network = _MINIATURE.get(self.kind, self.network)
        return replace(self, network=network, steps=6, batch=8, evaluate_every=2, evaluated=16)


_MINIATURE: dict[str, dict[str, Any]] = {
    TEXT: {"symbols": text.SYMBOLS, "context": 8, "width": 8, "heads": 2, "blocks": 1},
    "resnet": {"widths": (2, 4), "depth": 1},
    "vit": {"side": 28, "patch": 14, "width": 8, "heads": 2, "blocks": 1, "hidden": 8},
    "mlp": {"widths": (784, 8, 10)},
    "conv": {"channels": (2, 4), "side": 28},
}


def _text(name: str, title: str, width: int, blocks: int, **numbers: int) -> Problem:
    network = {"symbols": text.SYMBOLS, "context": 64, "width": width, "heads": 4, "blocks": blocks}
    return Problem(name, title, TEXT, network, evaluate_every=5, **numbers)


# The race: ordinary batches.
RACE = (
    _text("text", "char transformer", width=48, blocks=2, steps=150, batch=32, evaluated=64),
    Problem(
        name="vit",
        title="vision transformer, digits",
        kind="vit",
        network={"side": 28, "patch": 7, "width": 32, "heads": 4, "blocks": 3, "hidden": 128},
        steps=200,
        batch=64,
        evaluate_every=5,
        evaluated=1000,
    ),
    Problem(
        name="resnet",
        title="ResNet with BatchNorm, digits",
        kind="resnet",
        network={"widths": (8, 16, 32), "depth": 1},
        steps=200,
        batch=64,
        evaluate_every=5,
        evaluated=1000,
    ),
    Problem(
        name="mlp",
        title="MLP, digits",
        kind="mlp",
        network={"widths": (784, 128, 128, 64, 10)},
        steps=200,
        batch=64,
        evaluate_every=5,
        evaluated=1000,
    ),
    Problem(
        name="conv",
        title="conv net without BatchNorm, digits",
        kind="conv",
        network={"channels": (16, 32, 32), "side": 28},
        steps=150,
        batch=64,
        evaluate_every=5,
        evaluated=1000,
    ),
    Problem(
        name="autoencoder",
        title="deep tanh autoencoder, digits",
        kind=AUTOENCODER,
        network={},
        steps=400,
        batch=100,
        evaluate_every=10,
        evaluated=1000,
    ),
)

# On request only.
LARGE = (
    _text("text-large", "char transformer, large batches", width=64, blocks=3, steps=150, batch=96, evaluated=128),
    Problem(
        name="resnet-large",
        title="ResNet with BatchNorm, digits, large batches",
        kind="resnet",
        network={"widths": (8, 16, 32), "depth": 1},
        steps=120,
        batch=500,
        evaluate_every=5,
        evaluated=1000,
        target=TRAINING,
    ),
    Problem(
        name="vit-large",
        title="vision transformer, digits, large batches",
        kind="vit",
        network={"side": 28, "patch": 7, "width": 48, "heads": 4, "blocks": 4, "hidden": 192},
        steps=200,
        batch=500,
        evaluate_every=5,
        evaluated=1000,
        target=TRAINING,
    ),
)
LONG = (
    replace(
        _text("text-long", "wider char transformer, more steps", width=96, blocks=3, steps=2000, batch=32, evaluated=64),
        evaluate_every=25,
    ),
    replace(RACE[1], name="vit-long", title="vision transformer, digits, more steps", steps=600, evaluate_every=10),
)

# Not raced: its factors are large enough to be divided into blocks of some hundred rows, as those of GPT-2 are.
WIDE = _text("wide", "char transformer of width 256", width=256, blocks=1, steps=100, batch=64, evaluated=64)

BY_NAME = {problem.name: problem for problem in (*RACE, *LARGE, *LONG, WIDE)}
