"""Presets: every one trains a network of its kind, and takes changes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.presets import PRESETS, preset


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.symbols, self.norm, self.head = nn.Embedding(7, 16), nn.LayerNorm(16), nn.Linear(16, 7)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.symbols(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(x)).movedim(-1, 1)


def _small() -> tuple[nn.Module, Tensor, Tensor, dict]:
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3)), torch.randn(64, 6), torch.randint(3, (64,)), {}


def _conv() -> tuple[nn.Module, Tensor, Tensor, dict]:
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 3))
    return model, torch.randn(64, 1, 6, 6), torch.randint(3, (64,)), {}


def _transformer() -> tuple[nn.Module, Tensor, Tensor, dict]:
    tokens = torch.randint(7, (16, 9))
    return _Tokens(), tokens[:, :-1], tokens[:, 1:], {"loss_terms": "tokens"}


@pytest.mark.parametrize(("name", "make"), [("small", _small), ("conv", _conv), ("transformer", _transformer)])
def test_a_preset_trains(name: str, make) -> None:
    torch.manual_seed(0)
    model, x, y, changes = make()
    loss_function = nn.CrossEntropyLoss()
    settings = preset(name, loss=loss_function, **changes)
    optimizer = KFAC(model, **settings)
    losses = []
    for _ in range(40):
        if optimizer.is_auto:
            losses.append(float(optimizer.step(lambda: (model(x), y))))
            continue
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.accumulate_fisher(outputs, y)
        loss = loss_function(outputs, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] < losses[10]


def test_presets_are_not_changed_by_their_users() -> None:
    settings = preset("conv", damping=0.5, skip="head")
    assert settings["damping"] == 0.5
    assert settings["skip"] == "head"
    assert PRESETS["conv"]["damping"] == 0.05
    settings["lr"] = 7.0
    assert preset("conv")["lr"] != 7.0


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match="name must be one of small, conv, transformer, but is 'rnn'"):
        preset("rnn")
