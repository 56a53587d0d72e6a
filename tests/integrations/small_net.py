"""A net, its data and its loss, for trainers to be compared with the plain loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

STEPS, BATCH = 50, 16
OPTIONS: dict[str, Any] = {"lr": 0.3, "damping": 0.03, "kl_clip": 1e-2, "weight_decay": 1e-3}


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
