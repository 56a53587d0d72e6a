"""Adam in the eigenbasis of the factors against a plain implementation, and its invariances."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.plain_eigen_adam import PlainEigenAdam
from torch import Tensor, nn

from kfac_triton import KFACAdam

LR, DECAY = 0.05, 0.02


class Tied(nn.Module):
    """A decoder that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


class Attention(nn.Module):
    """Self-attention with a packed projection, and a query of its own for the output."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x.roll(1, 0), x.flip(1), need_weights=False)[0]


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=False))


def _conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(4, 3, 2))


def _grouped() -> nn.Module:
    return nn.Conv2d(4, 6, 3, groups=2)


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 5), nn.Tanh(), nn.Linear(5, 3))


def _tokens(classes: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(classes, (5, 4))


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


# model, input, rows a batch of each layer
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], list[int]]] = {
    "linear": (_linear, _normal(8, 4), [8, 8]),
    "tokens": (_linear, _normal(3, 5, 4), [15, 15]),
    "conv": (_conv, _normal(3, 2, 7, 6), [3 * 4 * 3, 3 * 3 * 2]),
    "grouped": (_grouped, _normal(3, 4, 5, 4), [3 * 3 * 2]),
    "attention": (Attention, _normal(3, 4, 6), [12] * 4),
    "embedding": (_embedding, _tokens(9), [20, 20]),
    "tied": (Tied, _tokens(7), [20]),
}


def _tiles(optimizer: KFACAdam) -> list[list[tuple[Tensor, tuple[Tensor, Tensor]]]]:
    """For each layer and channel group: the gradient W = [weight | bias], and the factors (A, G)."""
    factors = optimizer.factors()
    found = []
    for layer in optimizer.engine.layers:
        a, g = factors[layer.name]
        blocks = []
        for group in range(layer.groups):
            weight, bias = layer.gradient(group)
            assert weight is not None
            w = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
            blocks.append((w.clone(), (a[group], g[group]) if layer.groups > 1 else (a, g)))
        found.append(blocks)
    return found


def _moved(layer: Any, before: dict[int, Tensor], blocks: list[Tensor]) -> dict[int, Tensor]:
    """Where the parameters of a layer should be, given U of each group."""
    result = {}
    for p, update in layer.read_update(blocks):
        part = layer.part_of(p)
        own = before[id(p)] if part is None else before[id(p)][part]
        result[id(p)] = (1 - LR * DECAY) * own - LR * update.to(own.dtype)
    return result


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("refresh", "every", "statistics", "nesterov"),
    [("qr", 1, 1, True), ("qr", 3, 1, True), ("eigh", 2, 1, False), ("qr", 4, 2, True), ("qr", 3, None, True)],
)
@pytest.mark.parametrize("bias", ["joint", "separate"])
def test_steps_against_a_plain_implementation(
    name: str, refresh: str, every: int, statistics: int | None, nesterov: bool, bias: str
) -> None:
    make, draw, rows = CASES[name]
    torch.manual_seed(0)
    model = make().double()
    options: dict[str, Any] = {"nesterov": nesterov, "noise_damping": 0.4, "betas": (0.8, 0.9)}
    optimizer = KFACAdam(
        model, lr=LR, weight_decay=DECAY, refresh_every=every, refresh_warmup=2, statistics_every=statistics, refresh=refresh,
        eps=1e-6, bias=bias, **options,
    )  # fmt: skip
    assert len(optimizer.engine.layers) == len(rows)
    plain = [[PlainEigenAdam(eps=1e-6, **options) for _ in range(layer.groups)] for layer in optimizer.engine.layers]
    for step in range(6):
        inputs = draw()
        optimizer.zero_grad()
        output = model(inputs)
        (output.square().mean() + output.mean()).backward()
        before = {id(p): p.detach().clone() for p in model.parameters()}
        optimizer.step()
        for layer, tiles, own, count in zip(optimizer.engine.layers, _tiles(optimizer), plain, rows, strict=True):
            updates = []
            for (gradient, (a, g)), state in zip(tiles, own, strict=True):
                if step < 2 or step % every == 0:
                    state.refresh(a, g, refresh)
                is_new = step < 2 or step % (every if statistics is None else statistics) == 0
                updates.append(state.direction(gradient, count if is_new else None, (g.dim() > 1, a.dim() > 1)))
            wanted = _moved(layer, before, updates)
            for p in layer.parameters() if bias == "joint" else [layer.weight]:
                part = layer.part_of(p)
                now = p.detach() if part is None else p.detach()[part]
                assert id(p) in wanted
                torch.testing.assert_close(now, wanted[id(p)], rtol=1e-9, atol=1e-9)


def _trained(model: nn.Module, inputs: list[Tensor], scale: float, repeat: int = 1, **options: Any) -> list[Tensor]:
    """The movement of all parameters in some steps on fixed batches, each repeated, with the loss multiplied by `scale`."""
    model = copy.deepcopy(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = KFACAdam(model, lr=0.03, refresh_every=1, refresh="eigh", weight_decay=0.0, **options)
    for x in inputs:
        optimizer.zero_grad()
        output = model(x.repeat(repeat, *[1] * (x.dim() - 1)))
        (scale * (output.sin().square().mean() + output.mean())).backward()
        optimizer.step()
    optimizer.close()
    return [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]


def _far(moved: list[Tensor], wanted: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(moved, wanted, strict=True))


@pytest.mark.parametrize("examples", [3, 40])  # of the 9 inputs and a bias: without and with full rank
def test_the_loss_may_have_any_scale(examples: int) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    inputs = [torch.randn(examples, 9, dtype=torch.float64) for _ in range(4)]
    wanted = _trained(model, inputs, 1.0, eps=1e-30)
    for scale in (1e-4, 3.0, 1e5):
        assert _far(_trained(model, inputs, scale, eps=1e-30), wanted) < 1e-10
    for terms in (1, 1000, "tokens"):
        assert _far(_trained(model, inputs, 1.0, eps=1e-30, loss_terms=terms), wanted) < 1e-10
    assert _far(_trained(model, inputs, 1e-4), _trained(model, inputs, 1.0)) < 0.05  # the default eps has the gradient's unit


def test_a_batch_may_be_repeated() -> None:
    """With factors of full rank and without noise damping, which counts rows."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs = [torch.randn(40, 5, dtype=torch.float64) for _ in range(4)]
    wanted = _trained(model, inputs, 1.0, eps=1e-30, noise_damping=0.0)
    assert _far(_trained(model, inputs, 1.0, repeat=3, eps=1e-30, noise_damping=0.0), wanted) < 1e-10
    assert _far(_trained(model, inputs, 1.0, repeat=3, eps=1e-30), wanted) > 1e-6
