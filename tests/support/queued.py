"""Layers whose rows take more memory than their sums, so that they are queued, and a look at the queue."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

WIDTH, ROWS = 5, 80


class Net(nn.Module):
    """Linear layers of one width; the middle one may be called twice."""

    def __init__(self, depth: int = 3, calls: int = 1, width: int = WIDTH) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            for _ in range(self.calls if number == 1 else 1):
                x = torch.tanh(layer(x))
        return x


def queued(ours: KFACPreconditioner | KFAC) -> int:
    """Passes that are in the queues of an engine."""
    return sum(len(passes) for queue in ours.engine.collector._shared.queues for passes in queue._passes.values())
