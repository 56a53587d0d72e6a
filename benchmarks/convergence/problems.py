"""What is raced on: a network, its data, its batches, and what counts as the loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from . import images, text
from .models import ResNet, TextTransformer, ViT

Batch = tuple[Tensor, Tensor]

# Raise it with every change that makes old curves incomparable and that the numbers of a Problem do not show:
# a network's forward, the order of batches, the schedule, the way of evaluating.
REVISION = 1

NETWORKS: dict[str, type[nn.Module]] = {"text": TextTransformer, "resnet": ResNet, "vit": ViT, "wide": TextTransformer}


@dataclass(frozen=True)
class Problem:
    """One problem of the race.

    Attributes:
        name: "text", "resnet", "vit" or "wide".
        title: For tables and pictures.
        network: Arguments of the network.
        steps: Steps of AdamW.
        batch: Windows or images a step.
        evaluate_every: Steps between evaluations.
        evaluated: Windows or images that an evaluation takes.
    """

    name: str
    title: str
    network: dict[str, Any]
    steps: int
    batch: int
    evaluate_every: int
    evaluated: int

    @property
    def is_text(self) -> bool:
        """Whether the data are text, else digits."""
        return NETWORKS[self.name] is TextTransformer

    @property
    def loss_name(self) -> str:
        """What the race is about: the loss on `target_set`."""
        return "held-out loss" if self.is_text else "training loss"

    @cached_property
    def version(self) -> str:
        """Fingerprint of everything that a curve depends on beside optimizer and seed."""
        data = text.fingerprint() if self.is_text else images.fingerprint()
        definition = json.dumps([REVISION, asdict(self), data], sort_keys=True)
        return hashlib.sha256(definition.encode()).hexdigest()[:12]

    def build(self, seed: int) -> nn.Module:
        """The network with the seed's initial weights; the global random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return NETWORKS[self.name](**self.network)

    def batches(self, seed: int) -> Iterator[Batch]:
        """Endless training batches, the same for every contestant."""
        if self.is_text:
            return text.random_windows(text.split(text.corpus())[0], self.network["context"], self.batch, seed)
        return images.shifted_batches(*images.split()[0], self.batch, seed)

    def target_set(self) -> Batch:
        """What the race is decided on: held-out text; training digits as they are, not shifted."""
        if self.is_text:
            return self.held_out_set()
        digits, labels = images.split()[0]
        return digits[: self.evaluated], labels[: self.evaluated]

    def held_out_set(self) -> Batch:
        """Held-out data: windows at even distances, or digits."""
        if self.is_text:
            return text.even_windows(text.split(text.corpus())[1], self.network["context"], self.evaluated)
        digits, labels = images.split()[1]
        return digits[: self.evaluated], labels[: self.evaluated]


FULL = (
    Problem(
        name="text",
        title="char transformer, Python's help topics",
        network={"symbols": text.SYMBOLS, "context": 64, "width": 64, "heads": 4, "blocks": 3},
        steps=150,
        batch=96,
        evaluate_every=5,
        evaluated=128,
    ),
    Problem(
        name="resnet",
        title="ResNet with BatchNorm, MNIST digits",
        network={"widths": (8, 16, 32), "depth": 1},
        steps=120,
        batch=500,
        evaluate_every=5,
        evaluated=1000,
    ),
    Problem(
        name="vit",
        title="ViT, MNIST digits",
        network={"side": 28, "patch": 7, "width": 48, "heads": 4, "blocks": 4, "hidden": 192},
        steps=200,
        batch=500,
        evaluate_every=5,
        evaluated=1000,
    ),
)

# Not raced: its factors are large enough to be divided into blocks of some hundred rows, as those of GPT-2 are.
WIDE = Problem(
    name="wide",
    title="char transformer of width 256, Python's help topics",
    network={"symbols": text.SYMBOLS, "context": 64, "width": 256, "heads": 4, "blocks": 1},
    steps=100,
    batch=64,
    evaluate_every=5,
    evaluated=64,
)

_MINIATURE: dict[str, dict[str, Any]] = {
    "text": {"symbols": text.SYMBOLS, "context": 8, "width": 8, "heads": 2, "blocks": 1},
    "resnet": {"widths": (2, 4), "depth": 1},
    "vit": {"side": 28, "patch": 14, "width": 8, "heads": 2, "blocks": 1, "hidden": 8},
    "wide": {"symbols": text.SYMBOLS, "context": 8, "width": 16, "heads": 2, "blocks": 1},
}


def _miniature(problem: Problem) -> Problem:
    network = _MINIATURE[problem.name]
    return Problem(problem.name, problem.title, network, steps=6, batch=8, evaluate_every=2, evaluated=16)


QUICK, QUICK_WIDE = tuple(_miniature(problem) for problem in FULL), _miniature(WIDE)
