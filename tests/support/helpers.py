"""Shared by the tests: relative errors, small models, gradients by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def relative_error(value: Tensor, truth: Tensor) -> float:
    return float(torch.linalg.vector_norm(value - truth) / torch.linalg.vector_norm(truth))


def energy_error(damped: Tensor, inverse: Tensor) -> float:
    """||I - B^1/2 X B^1/2||_2 in float64."""
    lower = torch.linalg.cholesky(damped.double())
    identity = torch.eye(len(damped), dtype=torch.float64)
    return float(torch.linalg.matrix_norm(identity - lower.mT @ inverse.double() @ lower, 2))


def mlp(dtype: torch.dtype = torch.float64, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)


def conv_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Stride, padding and dilation in one net."""
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(3 * 5 * 6, 4),
    ).to(dtype)


class TokenModel(nn.Module):
    """Shares weights over tokens; the mean over tokens makes one prediction an example."""

    def __init__(self, pool: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.tanh(self.first(x)))
        if self.pool:
            return self.head(torch.relu(x).mean(1))
        return self.head(torch.relu(x)).movedim(-1, 1)  # (N, classes, tokens), as cross_entropy wants it


def batch_for_mlp(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(12, 5, generator=generator, dtype=torch.float64), torch.randint(4, (12,), generator=generator)


def backward_of_mlp(model: nn.Module, seed: int = 0) -> None:
    x, y = batch_for_mlp(seed)
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
