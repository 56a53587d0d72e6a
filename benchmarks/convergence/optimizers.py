"""The contestants, and how each of their optimizers is made from its settings.

Settings are those of the optimizers' constructors, and these: `clip` is the norm that gradients are clipped at; `rest_lr`,
`rest_betas` and `rest_weight_decay` are AdamW's for the parameters that Muon or K-FAC does not move.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from kfac_triton import KFAC, KFACAdam

from . import peers
from .muon import MuonWithAdamW
from .peers import SHAMPOO, SOAP

Config = dict[str, Any]

ADAMW, SGD, MUON, KFAC_NAME, KFAC_ADAM = "AdamW", "SGD", "Muon", "K-FAC", "KFACAdam"
# Names on the command line, in the order of tables and pictures.
CONTESTANTS = {
    "adamw": ADAMW,
    "sgd": SGD,
    "muon": MUON,
    "soap": SOAP,
    "shampoo": SHAMPOO,
    "kfac": KFAC_NAME,
    "kfacadam": KFAC_ADAM,
}
KEYS = {name: key for key, name in CONTESTANTS.items()}
OURS = (KFAC_NAME, KFAC_ADAM)


def make_optimizer(name: str, model: nn.Module, config: Config) -> Any:
    """A contestant's optimizer: `param_groups`, `zero_grad`, `step`, and what else `training.train_step` looks for.

    Raises:
        TypeError: if the contestant has no setting of that name.
    """
    settings = {key: value for key, value in config.items() if key != "clip"}
    if name == ADAMW:
        return make_adamw(model, **settings)
    if name == SGD:
        return make_sgd(model, **settings)
    if name == MUON:
        return MuonWithAdamW(model, **settings)
    if name == SOAP:
        return peers.make_soap(model, **settings)
    if name == SHAMPOO:
        return peers.make_shampoo(model, **settings)
    if name == KFAC_ADAM:
        return KFACAdam(model, **settings)
    return make_kfac(model, settings)


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
    return torch.optim.AdamW(_by_decay(model, weight_decay), lr=lr, betas=(betas[0], betas[1]), fused=True)


def make_sgd(model: nn.Module, lr: float, momentum: float = 0.9, weight_decay: float = 1e-4) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum; weight decay as for AdamW, but not decoupled, so that it goes with the gradient."""
    return torch.optim.SGD(_by_decay(model, weight_decay), lr=lr, momentum=momentum, nesterov=True)


def _by_decay(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


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
