"""Models of which a part trains, or runs, at a time: adapters beside frozen weights, experts without a token."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from kfac_triton import KFAC


class LoRA(nn.Module):
    """A frozen Linear layer and a trainable low-rank one beside it (Hu et al. 2022)."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_adapters_train_and_frozen_weights_stay() -> None:
    model = nn.Sequential(LoRA(6, 8, 2), nn.Tanh(), LoRA(8, 3, 2))
    frozen = [m.base.weight.clone() for m in model if isinstance(m, LoRA)]
    optimizer = KFAC(model, lr=0.1, damping=0.01)
    x, y = torch.randn(64, 6), torch.randint(3, (64,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert set(optimizer.factors()) == {"0.down", "0.up", "2.down", "2.up"}
    assert optimizer.diagnostics()["skipped"] == {"0.base": "its weight is frozen", "2.base": "its weight is frozen"}
    for weight, layer in zip(frozen, (m for m in model if isinstance(m, LoRA)), strict=True):
        assert torch.equal(weight, layer.base.weight)


class Experts(nn.Module):
    """Each token goes to one expert; some get none. Empty batches run through them all the same."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)) for _ in range(3)
        )

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 2)
        for number, expert in enumerate(self.experts):
            places = (to == number).nonzero().squeeze(1)
            out = out.index_add(0, places, expert(x[places]))
        return out


def test_an_expert_without_tokens_keeps_its_factors_and_its_weights() -> None:
    model = Experts()
    optimizer = KFAC(model, lr=0.1, momentum=0.0, damping=0.1)

    def step(to: Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.randn(12, 4), to), torch.randint(2, (12,))).backward()
        optimizer.step()

    step(torch.arange(12) % 3)
    factors, weights = optimizer.factors(), {n: p.detach().clone() for n, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(torch.arange(12) % 2)  # the third expert gets nothing
    after = optimizer.factors()
    for name, pair in factors.items():
        stays = name.startswith("experts.2")
        assert all(torch.equal(a, b) == stays for a, b in zip(pair, after[name], strict=True) if a.numel() > 1)
    for name, p in model.named_parameters():
        assert torch.equal(p, weights[name]) == name.startswith("experts.2")
    assert all(torch.isfinite(p).all() for p in model.parameters())
