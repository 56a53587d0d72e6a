"""Who races: the settings that are fixed for each problem, and the grid that is searched. Tune K-FAC here.

K-FAC's settings are those of `KFAC`, and `rest_lr` and `rest_weight_decay`: learning rate and weight decay of the AdamW group
that trains what K-FAC does not cover. AdamW's are `lr`, `betas`, `weight_decay`
and `clip`, the norm that gradients are clipped at.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from kfac_triton import KFAC

Config = dict[str, Any]

ADAMW, KFAC_NAME = "AdamW", "K-FAC"
TUNING_SEED = 0
# K-FAC's horizons as parts of AdamW's steps; each has a schedule of its own, and the first one is tuned on.
KFAC_HORIZONS = (1 / 2, 2 / 3)


@dataclass(frozen=True)
class Entry:
    """A contestant on one problem: fixed settings, and values to try for others, in every combination."""

    fixed: Config
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def configs(self) -> list[Config]:
        """Every combination with the fixed settings."""
        return [self.fixed | dict(zip(self.grid, values, strict=True)) for values in itertools.product(*self.grid.values())]

    def edges(self, config: Config) -> list[str]:
        """What sits at an end of its grid, of three values or more, in words."""
        found = []
        for name, values in self.grid.items():
            if len(values) > 2 and isinstance(config[name], (int, float)) and config[name] in (min(values), max(values)):
                found.append(f"{name} {config[name]:g} is the {'lowest' if config[name] == min(values) else 'highest'}")
        return found

    def miniature(self) -> Entry:
        """Two configurations, to try the race itself."""
        first = next(iter(self.grid))
        return Entry(self.fixed | {name: values[0] for name, values in self.grid.items()}, {first: self.grid[first][:2]})


def _adamw(*rates: float) -> Entry:
    return Entry({"weight_decay": 0.01}, {"lr": rates, "betas": ([0.9, 0.999], [0.9, 0.99], [0.8, 0.9]), "clip": (None, 1.0)})


# K-FAC's fixed settings were found by some sixty single trial runs on seed 0, AdamW's grid by ten. What they showed: with an
# AdamW tail the preconditioned gradient needs no KL clip; so few steps want short averages, for both contestants; norms train
# better along their gradient; positions are broadcast over the batch, and their rows are not examples.
_KFAC: Config = {
    "tail": "adamw", "betas": [0.8, 0.9], "momentum": 0.0, "kl_clip": None, "inverse_every": 2, "norms": "skip",
    "stats_fraction": 1.0,
}  # fmt: skip

CONTEST: dict[str, dict[str, Entry]] = {
    "text": {
        ADAMW: _adamw(2e-3, 4e-3, 8e-3, 1.6e-2),
        KFAC_NAME: Entry(
            _KFAC | {"loss_terms": "tokens", "skip": "positions", "rest_lr": 4e-3},
            {"lr": (6e-3, 1.2e-2), "damping": (1e-3, 3e-3), "ema_decay": (0.8, 0.95)},
        ),
    },
    "resnet": {
        ADAMW: _adamw(1e-2, 2e-2, 4e-2, 8e-2),
        KFAC_NAME: Entry(
            _KFAC | {"rest_lr": 0.03},
            {"lr": (0.03, 0.06), "damping": (0.05, 0.1), "ema_decay": (0.8, 0.9)},
        ),
    },
    "vit": {
        ADAMW: _adamw(2e-3, 4e-3, 8e-3, 1.6e-2),
        KFAC_NAME: Entry(
            _KFAC | {"skip": "positions", "rest_lr": 6e-3, "ema_decay": 0.95},
            {"lr": (6e-3, 1.2e-2), "damping": (3e-4, 1e-3), "weight_sharing": ("expand", "reduce")},
        ),
    },
}


def make_optimizer(name: str, model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """A contestant's optimizer.

    Raises:
        TypeError: if the contestant has no setting of that name.
    """
    return make_adamw(model, **config) if name == ADAMW else make_kfac(model, config)


def make_adamw(
    model: nn.Module,
    lr: float,
    betas: Sequence[float] = (0.9, 0.999),
    weight_decay: float = 0.01,
    clip: float | None = None,
) -> torch.optim.Optimizer:
    """PyTorch's fused AdamW; weight decay on matrices and kernels, none on biases, gains and the like.

    The norm that gradients are clipped at, clip, is the training step's business.
    """
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=True)


def make_kfac(model: nn.Module, config: Config) -> KFAC:
    """K-FAC on all layers that it covers, AdamW on everything else."""
    settings = dict(config)
    rest = {"lr": settings.pop("rest_lr", 1e-3), "weight_decay": settings.pop("rest_weight_decay", 0.0), "tail": "adamw"}
    if settings.get("fisher", "empirical") != "empirical":
        settings["loss"] = nn.CrossEntropyLoss()
    covered = {id(p) for p in _covered(model, settings)}
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [{"params": [p for p in parameters if id(p) in covered]}]
    others = [p for p in parameters if id(p) not in covered]
    if others:
        groups.append({"params": others, **rest})
    return KFAC(model, groups, **settings)


def _covered(model: nn.Module, settings: Config) -> Iterator[nn.Parameter]:
    """Parameters of the modules that K-FAC covers under these settings: it is made once and asked."""
    with KFAC(model, **settings) as probe:
        for layer in probe.engine.layers:
            yield from (p for p in layer.module.parameters(recurse=False) if p.requires_grad)
