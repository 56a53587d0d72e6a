"""A net, its data, its loss and its optimizers, for trainers to be compared with the plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kfac_triton import KFAC, KFACAdam

STEPS, BATCH = 50, 16
OPTIONS: dict[str, Any] = {"lr": 0.3, "damping": 0.03, "kl_clip": 1e-2, "weight_decay": 1e-3}
# With old eigenvectors in every other step, so that a run that is resumed after an odd one needs those of the checkpoint.
ADAM: dict[str, Any] = {"lr": 0.06, "weight_decay": 1e-3, "refresh_every": 2, "refresh_warmup": 1}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


def batches(count: int) -> DataLoader:
    """In order; the label is the largest of four projections."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * STEPS * BATCH, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    return DataLoader(list(zip(x, y, strict=True))[: count * BATCH], batch_size=BATCH)


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), y)


def make(method: type[KFAC], model: nn.Module, params: Any = None, **options: Any) -> KFAC:
    """The optimizer with options that train this net."""
    return method(model, params, **{**(ADAM if method is KFACAdam else OPTIONS), **options})


def label(value: Any) -> str | None:
    """Names options in the id of a test; pytest itself names the rest."""
    return str(value) if isinstance(value, dict) else None
