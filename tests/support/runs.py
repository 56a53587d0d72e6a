"""Short training runs that two optimizers can be compared by, and the settings that keep something beside the factors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

# Each keeps something that a checkpoint or a copy must carry.
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "old inverses": {"inverse_every": 3},
    "factored": {"inverse": "factored"},
    "factored, old": {"inverse": "factored", "inverse_every": 3},
    "newton_schulz": {"inverse": "newton_schulz"},
    "eigh, old": {"inverse": "eigh", "inverse_every": 2},
    "ekfac": {"curvature": "ekfac"},
    "ekfac, old": {"curvature": "ekfac", "inverse_every": 3},
    "exact damping": {"exact_damping": True},
    "16-bit factors": {"factor_dtype": "bfloat16"},
    "blocks": {"max_factor_size": 8, "oversize": "block", "inverse_every": 2},
    "diagonals": {"max_factor_size": 8, "inverse_every": 2},
    "seldom": {"statistics_every": 2, "inverse_every": 4, "warmup": 1},
    "adamw": {"tail": "adamw", "lr": 0.01},
    "adam": {"curvature": "adam", "tail": "adamw", "nesterov": True, "inverse_every": 3, "warmup": 2},
    "adam, blocks": {"curvature": "adam", "tail": "adamw", "max_factor_size": 8, "oversize": "block", "inverse_every": 2},
}


class Net(nn.Module):
    """Groups of channels, attention (several layers on one weight), a norm, and a parameter that is not covered."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 3, groups=2)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.ones(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mT
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head((x * self.scale).tanh().flatten(1))


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same each time."""
    torch.manual_seed(0)
    return Net().to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The batch of a step."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 2, 6, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    """Gradients of the batch of a step."""
    x, y = batch(step, next(model.parameters()).dtype)
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps of a plain loop, or with a closure for lr="auto"."""
    for step in steps:
        if isinstance(optimizer, KFAC) and optimizer.is_auto:
            x, y = batch(step, next(model.parameters()).dtype)
            optimizer.step(lambda x=x, y=y: (model(x), y))
        else:
            backward(model, step)
            optimizer.step()


def vector(model: nn.Module) -> Tensor:
    """All parameters."""
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def hooks(model: nn.Module) -> int:
    """Number of hooks on a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def same_factors(one: KFAC | KFACPreconditioner, other: KFAC | KFACPreconditioner) -> bool:
    """Whether they are the same bit for bit."""
    a, b = one.factors(), other.factors()
    return a.keys() == b.keys() and all(torch.equal(x, y) for k in a for x, y in zip(a[k], b[k], strict=True))
