"""What the part `train` trains: the autoencoder on digits, and two networks of `make race` in its size and in a larger one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton import KFAC, KFACAdam

from ..convergence import problems
from ..convergence.contest import CONTEST
from ..convergence.optimizers import make_adamw, make_kfac
from .digits import provide
from .findings import Bench
from .others import CONTESTANTS, KFAC_ADAM, KFAC_NAME, build_autoencoder, load_images, reconstruction_loss, shuffled_batches

Batch = tuple[Tensor, Tensor]
Config = dict[str, Any]
_BATCH, _STEPS = 1000, 1000  # of the autoencoder

# A hundred times the operations a step, so that a step of the larger networks is work for a GPU.
_LARGE: dict[str, dict[str, Any]] = {
    "text": {"network": {"context": 128, "width": 384, "heads": 6, "blocks": 6}, "batch": 128, "steps": 200},
    "vit": {"network": {"patch": 4, "width": 192, "hidden": 768, "blocks": 6}, "steps": 200},
}


@dataclass(frozen=True)
class TrainingProblem:
    """A network, its data, and the optimizers with the configurations that they are tried with.

    Attributes:
        build: the network with its initial weights, the same every time.
        batches: endless, the same every time.
        loss: of the network on a batch, a mean over its examples.
        target: what the race is decided on.
        adamw: configurations of AdamW; "clip" is the norm that gradients are clipped at.
        kfac: configurations of K-FAC.
        steps: of AdamW.
        shares: of AdamW's steps that K-FAC is given.
        scheduled: whether the learning rate is warmed up and decays to 0.
        make: (model, "AdamW" or "K-FAC", configuration, whether the step can be captured) to an optimizer.
    """

    build: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    target: Batch
    adamw: list[Config]
    kfac: list[Config]
    steps: int
    shares: tuple[float, ...]
    scheduled: bool
    make: Callable[[nn.Module, str, Config, bool], torch.optim.Optimizer]

    def optimizer(self, model: nn.Module, kind: str, config: Config, capturable: bool) -> torch.optim.Optimizer:
        """Of the kinds of `make`, or "KFACAdam"."""
        if kind != KFAC_ADAM:
            return self.make(model, kind, config, capturable)
        return KFACAdam(model, **config, capturable=capturable)


def adam_config(capturable: bool) -> Config:
    """The defaults of KFACAdam, with a refresh in every step where steps are recorded, as in its first hundred steps anyway."""
    return {"lr": 0.016} | ({"refresh_every": 1} if capturable else {})


def problem(bench: Bench, name: str) -> TrainingProblem:
    """One of "autoencoder", "text", "text_large", "vit" and "vit_large"."""
    if name != "text" and name != "text_large":
        provide(bench.digits)
    return _autoencoder(bench) if name == "autoencoder" else _network(bench, name)


def _autoencoder(bench: Bench) -> TrainingProblem:
    images = load_images("mnist", 4000, 0).train
    kfac = CONTESTANTS["K-FAC"]
    return TrainingProblem(
        build=lambda: build_autoencoder(0),
        batches=lambda: ((batch, batch) for batch in shuffled_batches(images, _BATCH, 0)),
        loss=lambda model, batch: reconstruction_loss(model(batch[0]), batch[1]),
        target=(images, images),
        adamw=[{"lr": lr} for lr in ((1e-3,) if bench.quick else (5e-4, 1e-3, 2e-3, 4e-3))],
        kfac=[kfac.settings | {"lr": kfac.rates[0], "damping": damping} for damping in ((3.0,) if bench.quick else (1.0, 3.0))],
        steps=10 if bench.quick else _STEPS,
        shares=(1 / 2,),
        scheduled=False,
        make=_plain_optimizer,
    )


def _plain_optimizer(model: nn.Module, kind: str, config: Config, capturable: bool) -> torch.optim.Optimizer:
    if kind == KFAC_NAME:
        return KFAC(model, capturable=capturable, **config)
    return torch.optim.Adam(model.parameters(), capturable=capturable, fused=capturable or None, **config)


def _network(bench: Bench, name: str) -> TrainingProblem:
    kind, _, size = name.partition("_")
    chosen = problems.BY_NAME[f"{kind}-large"]
    if bench.quick:
        chosen = chosen.miniature()
    large = size == "large"
    if large and not bench.quick:
        changes = _LARGE[kind]
        chosen = dataclasses.replace(chosen, **changes | {"network": chosen.network | changes["network"]})
    adamw, kfac = _adamw_configs(bench.quick, large), _kfac_configs(kind, large)
    return TrainingProblem(
        build=lambda: chosen.build(0),
        batches=lambda: chosen.batches(0),
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        target=chosen.target_set(),
        adamw=adamw,
        kfac=kfac[:1] if bench.quick else kfac,
        steps=chosen.steps,
        shares=(1 / 2, 1 / 3),
        scheduled=True,
        make=_grouped_optimizer,
    )


def _grouped_optimizer(model: nn.Module, kind: str, config: Config, capturable: bool) -> torch.optim.Optimizer:
    if kind == KFAC_NAME:
        return make_kfac(model, config | {"capturable": capturable})
    optimizer = make_adamw(model, **config)
    for group in optimizer.param_groups:
        group["capturable"] = capturable
    return optimizer


def _adamw_configs(quick: bool, large: bool) -> list[Config]:
    rates = (1e-3,) if quick else (5e-4, 1e-3, 2e-3, 4e-3) if large else (2e-3, 4e-3, 8e-3, 1.6e-2)
    betas = ([0.9, 0.99],) if quick or large else ([0.9, 0.99], [0.8, 0.9])
    return [{"lr": lr, "betas": pair, "clip": 1.0} for lr in rates for pair in betas]


def _kfac_configs(kind: str, large: bool) -> list[Config]:
    fixed = CONTEST[f"{kind}-large"][KFAC_NAME].fixed | {"inverse_every": 1} | ({"rest_lr": 2e-3} if large else {})
    tried: list[Config]
    if kind == "text":
        tried = [{"damping": damping, "ema_decay": 0.95} for damping in (1e-3, 3e-3)]
    else:
        tried = [{"damping": 3e-4, "weight_sharing": "expand"}, {"damping": 1e-3, "weight_sharing": "reduce"}]
    return [fixed | {"lr": lr} | more for lr in ((2e-3, 4e-3) if large else (6e-3, 1.2e-2)) for more in tried]
