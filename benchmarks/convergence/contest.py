"""Who races with which settings: those that are fixed on a problem, and the grid that is searched.

On a problem, all contestants have grids of one size.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from .optimizers import ADAMW, KEYS, KFAC_ADAM, KFAC_NAME, MUON, SGD, SHAMPOO, SOAP, Config

TUNING_SEED = 0


@dataclass(frozen=True)
class Entry:
    """A contestant on one problem: fixed settings, and values to try for others, in every combination.

    `default` is a configuration of the grid that nobody tuned: its result is shown beside that of the best one.
    """

    fixed: Config
    grid: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    default: Config | None = None

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
        few = Entry(self.fixed | {name: values[0] for name, values in self.grid.items()}, {first: self.grid[first][:2]})
        return few if self.default is None else Entry(few.fixed, few.grid, few.configs()[-1])


AVERAGES = ([0.9, 0.99], [0.8, 0.9])
DEFAULT_RATE = 1.6e-2  # of KFACAdam
AROUND_DEFAULT = (DEFAULT_RATE / 2, DEFAULT_RATE, DEFAULT_RATE * 2)


def _adamw(*rates: float) -> Entry:
    return Entry({"weight_decay": 0.01, "clip": 1.0}, {"lr": rates, "betas": AVERAGES})


def _sgd(*rates: float) -> Entry:
    return Entry({"clip": 1.0}, {"lr": rates, "momentum": (0.8, 0.9)})


def _muon(*rates: float) -> Entry:
    """With the rate and the averages for the rest that were best in trial runs on most problems."""
    return Entry({"rest_lr": 1.6e-2, "rest_betas": [0.8, 0.9]}, {"lr": rates, "momentum": (0.9, 0.95)})


def _soap(*rates: float) -> Entry:
    return Entry({}, {"lr": rates, "betas": ([0.95, 0.95], [0.8, 0.9])})


def _shampoo(*rates: float) -> Entry:
    return Entry({"precondition_frequency": 10}, {"lr": rates, "betas": AVERAGES})


def _kfac(rates: tuple[float, ...], damping: tuple[float, ...], **fixed: Any) -> Entry:
    return Entry(_KFAC | fixed, {"lr": rates, "damping": damping})


def _kfac_adam() -> Entry:
    """The same everywhere; the default is that of the constructor."""
    grid = {"lr": AROUND_DEFAULT, "betas": ([0.9, 0.95], [0.8, 0.9])}
    return Entry({}, grid, default={"lr": DEFAULT_RATE, "betas": [0.9, 0.95]})


def _four(*rates: float, **fixed: Any) -> Entry:
    """Four learning rates and nothing else: a run on the autoencoder takes two minutes."""
    return Entry(fixed, {"lr": rates})


# K-FAC's fixed settings were found by some sixty single trial runs on seed 0 with large batches. What they showed: with an
# AdamW tail the preconditioned gradient needs no KL clip; so few steps want short averages; norms train better along their
# gradient; positions are broadcast over the batch, and their rows are not examples.
_KFAC: Config = {
    "tail": "adamw", "betas": [0.8, 0.9], "momentum": 0.0, "kl_clip": None, "inverse_every": 2, "norms": "skip",
    "stats_fraction": 1.0,
}  # fmt: skip
_TEXT: Config = {"loss_terms": "tokens", "skip": "positions", "ema_decay": 0.8, "rest_lr": 4e-3}
_VIT: Config = {"skip": "positions", "ema_decay": 0.95, "rest_lr": 6e-3}

# The rates of the six problems were placed by some hundred trial runs on seed 0, except KFACAdam's.
CONTEST: dict[str, dict[str, Entry]] = {
    "text": {
        ADAMW: _adamw(4e-3, 8e-3, 1.6e-2),
        SGD: _sgd(0.1, 0.2, 0.4),
        MUON: _muon(0.02, 0.04, 0.08),
        SOAP: _soap(6e-3, 1.2e-2, 2.4e-2),
        SHAMPOO: _shampoo(4e-3, 8e-3, 1.6e-2),
        KFAC_NAME: _kfac((6e-3, 1.2e-2, 2.4e-2), (3e-4, 1e-3), **_TEXT),
        KFAC_ADAM: _kfac_adam(),
    },
    "vit": {
        ADAMW: _adamw(4e-3, 8e-3, 1.6e-2),
        SGD: _sgd(0.1, 0.2, 0.4),
        MUON: _muon(0.01, 0.02, 0.04),
        SOAP: _soap(3e-3, 6e-3, 1.2e-2),
        SHAMPOO: _shampoo(4e-3, 8e-3, 1.6e-2),
        KFAC_NAME: _kfac((3e-3, 6e-3, 1.2e-2), (3e-4, 1e-3), **_VIT),
        KFAC_ADAM: _kfac_adam(),
    },
    "resnet": {
        ADAMW: _adamw(1e-2, 2e-2, 4e-2),
        SGD: _sgd(0.1, 0.2, 0.4),
        MUON: _muon(0.02, 0.04, 0.08),
        SOAP: _soap(1.2e-2, 2.4e-2, 4.8e-2),
        SHAMPOO: _shampoo(1.6e-2, 3.2e-2, 6.4e-2),
        KFAC_NAME: _kfac((0.015, 0.03, 0.06), (0.05, 0.1), ema_decay=0.9, rest_lr=0.03),
        KFAC_ADAM: _kfac_adam(),
    },
    "mlp": {
        ADAMW: _adamw(8e-3, 1.6e-2, 3.2e-2),
        SGD: _sgd(0.2, 0.4, 0.8),
        MUON: _muon(0.03, 0.06, 0.12),
        SOAP: _soap(6e-3, 1.2e-2, 2.4e-2),
        SHAMPOO: _shampoo(8e-3, 1.6e-2, 3.2e-2),
        KFAC_NAME: _kfac((3e-3, 6e-3, 1.2e-2), (3e-3, 1e-2), ema_decay=0.95),
        KFAC_ADAM: _kfac_adam(),
    },
    "conv": {
        ADAMW: _adamw(1.6e-2, 3.2e-2, 6.4e-2),
        SGD: _sgd(0.1, 0.2, 0.4),
        MUON: _muon(0.02, 0.04, 0.08),
        SOAP: _soap(6e-3, 1.2e-2, 2.4e-2),
        SHAMPOO: _shampoo(8e-3, 1.6e-2, 3.2e-2),
        KFAC_NAME: _kfac((3e-3, 6e-3, 1.2e-2), (3e-3, 1e-2), ema_decay=0.95),
        KFAC_ADAM: _kfac_adam(),
    },
    "autoencoder": {
        ADAMW: _four(1e-3, 2e-3, 4e-3, 8e-3, weight_decay=0.01, betas=[0.8, 0.9], clip=100.0),
        SGD: _four(3e-4, 1e-3, 3e-3, 1e-2, clip=100.0),
        MUON: _four(0.02, 0.04, 0.08, 0.16, rest_lr=2e-3, rest_betas=[0.8, 0.9]),
        SOAP: _four(2e-3, 4e-3, 8e-3, 1.6e-2, betas=[0.8, 0.9]),
        SHAMPOO: _four(1e-3, 2e-3, 4e-3, 8e-3, betas=[0.8, 0.9], precondition_frequency=10),
        KFAC_NAME: _four(5e-4, 1e-3, 2e-3, 4e-3, **_KFAC | {"damping": 30.0, "ema_decay": 0.95}),
        KFAC_ADAM: Entry({}, {"lr": (4e-3, 8e-3, 1.6e-2, 3.2e-2)}, default={"lr": DEFAULT_RATE}),
    },
}


def _three(of_kfac: Config, **rates: tuple[float, float, float]) -> dict[str, Entry]:
    """Of problems on request: three rates each, by the names on the command line; other settings are those that won above."""
    fixed: dict[str, Config] = {
        ADAMW: {"weight_decay": 0.01, "clip": 1.0, "betas": [0.8, 0.9]},
        SGD: {"clip": 1.0, "momentum": 0.8},
        MUON: {"rest_lr": 1.6e-2, "rest_betas": [0.8, 0.9], "momentum": 0.9},
        SOAP: {"betas": [0.8, 0.9]},
        SHAMPOO: {"betas": [0.8, 0.9], "precondition_frequency": 10},
        KFAC_NAME: _KFAC | of_kfac,
    }
    entries = {name: Entry(settings, {"lr": rates[KEYS[name]]}) for name, settings in fixed.items()}
    return entries | {KFAC_ADAM: Entry({}, {"lr": AROUND_DEFAULT}, default={"lr": DEFAULT_RATE})}


CONTEST |= {
    "text-large": _three(
        _TEXT | {"damping": 3e-4},
        adamw=(4e-3, 8e-3, 1.6e-2), sgd=(0.1, 0.2, 0.4), muon=(0.02, 0.04, 0.08), soap=(6e-3, 1.2e-2, 2.4e-2),
        shampoo=(4e-3, 8e-3, 1.6e-2), kfac=(6e-3, 1.2e-2, 2.4e-2),
    ),
    "resnet-large": _three(
        {"damping": 0.1, "ema_decay": 0.9, "rest_lr": 0.03},
        adamw=(1e-2, 2e-2, 4e-2), sgd=(0.1, 0.2, 0.4), muon=(0.02, 0.04, 0.08), soap=(1.2e-2, 2.4e-2, 4.8e-2),
        shampoo=(3.2e-2, 6.4e-2, 0.128), kfac=(0.015, 0.03, 0.06),
    ),
    "vit-large": _three(
        _VIT | {"damping": 3e-4},
        adamw=(4e-3, 8e-3, 1.6e-2), sgd=(0.1, 0.2, 0.4), muon=(0.01, 0.02, 0.04), soap=(3e-3, 6e-3, 1.2e-2),
        shampoo=(4e-3, 8e-3, 1.6e-2), kfac=(3e-3, 6e-3, 1.2e-2),
    ),
    # Longer runs want lower rates.
    "text-long": _three(
        _TEXT | {"damping": 3e-4, "ema_decay": 0.95},
        adamw=(2e-3, 4e-3, 8e-3), sgd=(0.05, 0.1, 0.2), muon=(0.01, 0.02, 0.04), soap=(3e-3, 6e-3, 1.2e-2),
        shampoo=(2e-3, 4e-3, 8e-3), kfac=(3e-3, 6e-3, 1.2e-2),
    ),
    "vit-long": _three(
        _VIT | {"damping": 3e-4},
        adamw=(2e-3, 4e-3, 8e-3), sgd=(0.1, 0.2, 0.4), muon=(0.01, 0.02, 0.04), soap=(3e-3, 6e-3, 1.2e-2),
        shampoo=(4e-3, 8e-3, 1.6e-2), kfac=(3e-3, 6e-3, 1.2e-2),
    ),
}  # fmt: skip
