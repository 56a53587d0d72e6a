"""However a model is run and whatever is kept, the sums of queued passes are those of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import relative_error
from support.queued import ROWS, WIDTH, Net, queued
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFACPreconditioner

LOSS = nn.CrossEntropyLoss()


class Language(nn.Module):
    """Diagonal and dense factors; the head may share the embedding's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.norm, self.middle = nn.Embedding(7, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 7, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[..., 0].abs() * 5).long() % 7
        return self.head(torch.tanh(self.middle(self.norm(self.embedding(tokens)))))


def _pass(model: nn.Module, x: Tensor, ours: KFACPreconditioner) -> None:
    outputs = model(x)
    y = torch.arange(len(x)) % outputs.shape[1]
    if ours.engine.settings.loss is not None:
        ours.accumulate_fisher(outputs, y)
    LOSS(outputs, y).backward()


def _several(model: nn.Module, x: Tensor, ours: KFACPreconditioner) -> None:
    for part in x.split([8, 56, 16]):  # few rows, many, and few again
        _pass(model, part, ours)


def _retained(model: nn.Module, x: Tensor, ours: KFACPreconditioner) -> None:
    loss = model(x).square().mean()
    loss.backward(retain_graph=True)
    loss.backward()


def _differentiated_twice(model: nn.Module, x: Tensor, ours: KFACPreconditioner) -> None:
    (slope,) = torch.autograd.grad(model(x).square().mean(), x, create_graph=True)
    slope.square().sum().backward()


def _checkpointed(model: nn.Module, x: Tensor, ours: KFACPreconditioner, use_reentrant: bool = False) -> None:
    checkpoint(model, x, use_reentrant=use_reentrant).square().mean().backward()


def _partly_compiled(model: nn.Module, x: Tensor, ours: KFACPreconditioner) -> None:
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for number, part in enumerate(x.chunk(4)):
        (compiled if number in (1, 3) else model)(part.repeat(4, 1)).square().mean().backward()


def _under_another(model: nn.Module, x: Tensor, ours: KFACPreconditioner) -> None:
    with KFACPreconditioner(model, backend=ours.engine.settings.backend):
        _pass(model, x, ours)


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "plain": Net,
    "shared": lambda: Net(calls=2),
    "language": lambda: Language(False),
    "tied": lambda: Language(True),
}
RUNS: dict[str, tuple[str, Callable[..., None], dict[str, Any]]] = {
    "one pass": ("plain", _pass, {}),
    "accumulation": ("plain", _several, {}),
    "a module called twice": ("shared", _pass, {}),
    "a module called twice, accumulation": ("shared", _several, {}),
    "retain_graph": ("plain", _retained, {}),
    "double backward": ("plain", _differentiated_twice, {}),
    "checkpointing": ("plain", _checkpointed, {}),
    "reentrant checkpointing": ("plain", lambda *args: _checkpointed(*args, use_reentrant=True), {}),
    "compiled and eager passes": ("plain", _partly_compiled, {}),
    "two engines": ("plain", _under_another, {}),
    "ggn": ("plain", _pass, {"fisher": "ggn", "loss": LOSS}),
    "ggn, accumulation": ("plain", _several, {"fisher": "ggn", "loss": LOSS}),
    "mc": ("plain", _pass, {"fisher": "mc", "loss": LOSS}),
    "EKFAC": ("plain", _several, {"curvature": "ekfac"}),
    "16-bit factors": ("plain", _several, {"factor_dtype": "bfloat16", "ema_decay": 0.5}),
    "sampled": ("plain", _pass, {"stats_fraction": 0.25}),
    "diagonals": ("language", _several, {}),
    "tied weights": ("tied", _several, {}),
    "oversized": ("plain", _several, {"max_factor_size": WIDTH}),
}


def _factors(name: str, backend: str, **settings: Any) -> list[Tensor]:
    maker, run, own = RUNS[name]
    torch.manual_seed(0)
    torch.compiler.reset()  # here: the second step runs what the first one compiled
    model = MAKERS[maker]()
    with KFACPreconditioner(model, backend=backend, damping=0.1, **own, **settings) as ours:
        for _ in range(2):
            run(model, torch.randn(ROWS, WIDTH).requires_grad_(), ours)
            assert queued(ours) == 0
            ours.precondition_()
        return [side for pair in ours.factors().values() for side in pair]


@pytest.mark.parametrize("name", RUNS)
def test_sums_are_those_of_pytorch_whatever_is_kept(name: str) -> None:
    expected = _factors(name, "torch")
    tolerance = 2e-2 if name == "16-bit factors" else 1e-5
    for limit in (4000, 1 << 28):  # one layer or two, and all
        for found, truth in zip(_factors(name, "triton", max_kept_bytes=limit), expected, strict=True):
            assert relative_error(found, truth) <= tolerance, limit
