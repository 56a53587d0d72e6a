"""One model in both layouts, batch-first (B, T, n) and sequence-first (T, B, n), and steps with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFAC

B, T, TOKENS, WIDTH, CLASSES = 4, 3, 9, 6, 3


class Conv1D(nn.Module):
    """That of Hugging Face, which is recognized by its name and its home."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Model(nn.Module):
    """Every type of layer that has a free layout. Running sums mix positions; the head reads their mean, or each position.

    Args:
        batch_first: the layout of the indices that it takes, and of its outputs.
        pool: whether the head reads the mean over positions, (B, n).
        tied: whether the head's weight is the embedding's.
    """

    def __init__(self, batch_first: bool, pool: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.conv = Conv1D(WIDTH, WIDTH)
        self.rms = nn.RMSNorm(WIDTH, eps=0.1)
        self.head = nn.Linear(WIDTH, TOKENS if tied else CLASSES)
        if tied:
            self.head.weight = self.embedding.weight
        for norm in (self.norm, self.rms):
            for p in norm.parameters():
                nn.init.normal_(p)
        self.time, self.pool = int(batch_first), pool
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).cumsum(self.time)
        x = torch.tanh(self.conv(torch.tanh(self.norm(self.linear(x)))))
        x = self.rms(x.cumsum(self.time))
        return self.head(x.mean(self.time) if self.pool else x)


def batch(pool: bool = True, classes: int = CLASSES) -> tuple[Tensor, Tensor]:
    """Indices (B, T), and labels (B,) or (B, T)."""
    return torch.randint(TOKENS, (B, T)), torch.randint(classes, (B,) if pool else (B, T))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def train(
    model: nn.Module,
    data: list[tuple[Tensor, Tensor]],
    batch_first: bool,
    forward: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> dict[str, Tensor]:
    """Factors after a step on each batch, which is batch-first, and the parameters.

    Args:
        model: takes and returns tensors in its layout.
        data: batches.
        batch_first: the model's layout.
        forward: the model as it is called, for example compiled.
        settings: of `KFAC`.
    """
    loss = nn.CrossEntropyLoss()
    settings = {"loss": loss, "lr": 0.1, "momentum": 0.0, "damping": 0.1, "stats_fraction": 1.0} | settings
    optimizer = KFAC(model, **settings)
    for x, y in data:
        optimizer.zero_grad()
        outputs = (model if forward is None else forward)(x if batch_first else x.transpose(0, 1).contiguous())
        if y.dim() == 2:
            outputs, y = outputs.flatten(0, 1), (y if batch_first else y.T).flatten()
        if settings.get("fisher") == "ggn":
            optimizer.accumulate_fisher(outputs, y)
        F.cross_entropy(outputs, y).backward()
        optimizer.step()
    result = {
        f"{name}, {side}": x.clone() for name, pair in optimizer.factors().items() for side, x in zip("AG", pair, strict=True)
    }
    result |= {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.close()
    return result


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Every factor and every parameter, relative to its largest number."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(
            found[name], x, rtol=0, atol=tolerance * float(x.abs().max()), msg=lambda text, name=name: f"{name}: {text}"
        )
