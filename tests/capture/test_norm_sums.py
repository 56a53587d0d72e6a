"""Norm layers in a training step: their kernels against PyTorch, and what they launch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.launches import CountedOperators, counted_launches
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner

N, WIDTH = 6, 8


class Norms(nn.Module):
    """A norm of each kind, of tokens (N, 5, WIDTH) and of images (N, WIDTH, 5)."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Tanh(), nn.RMSNorm(WIDTH), nn.Tanh()) for _ in range(depth)
        )
        self.images = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Tanh(), nn.GroupNorm(2, WIDTH), nn.Tanh()) for _ in range(depth)
        )
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.tokens:
            x = block(x) + x
        for block in self.images:
            x = block(x.mT).mT + x
        return self.head(x)


def _spoil(module: nn.Module, args: Any, output: Tensor) -> None:
    output.register_hook(lambda gradient: gradient * torch.nan)


def run(
    backend: str, steps: int = 2, passes: int = 1, dtype: torch.dtype = torch.float32, spoil: bool = False,
    evaluate: bool = False, compiled: bool = False, **options: Any,
) -> dict[str, tuple[Tensor, Tensor]]:  # fmt: skip
    """The factors after some steps. To spoil is to make the gradient of the first norm NaN in the last step."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Norms().to(dtype)
    if evaluate:
        model.eval()
    with KFACPreconditioner(model, backend=backend, damping=0.1, **options) as preconditioner:
        forward: Callable[[Tensor], Tensor] = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(steps):
            model.zero_grad()
            if spoil and step == steps - 1:
                model.tokens[0][0].register_forward_hook(_spoil)
            for _ in range(passes):
                forward(torch.randn(N, 5, WIDTH, dtype=dtype)).square().mean().backward()
            preconditioner.precondition_()
        return {name: (a.clone(), g.clone()) for name, (a, g) in preconditioner.factors().items()}


WAYS: dict[str, dict[str, Any]] = {
    "examples": {},
    "tokens": {"loss_terms": "tokens"},
    "tokens, reduced": {"loss_terms": "tokens", "weight_sharing": "reduce"},
    "several passes": {"passes": 3},
    "bfloat16": {"dtype": torch.bfloat16},
    "evaluation": {"evaluate": True},
    "a part of the rows": {"loss_terms": "tokens", "stats_fraction": 0.5},
    "EKFAC": {"curvature": "ekfac"},
    "full matrices": {"norms": "full"},
    "compiled": {"compiled": True},
    "one layer at a time": {"max_kept_bytes": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_kernels_give_the_factors_of_pytorch(way: str) -> None:
    kernels, pytorch = (run(backend, **WAYS[way]) for backend in ("triton", "torch"))
    digits = 2e-2 if way == "bfloat16" else 1e-4  # the head's products are of 16-bit numbers
    assert kernels.keys() == pytorch.keys() == {"tokens.0.0", "tokens.0.2", "images.0.0", "images.0.2", "head"}
    for name, pair in kernels.items():
        for ours, theirs in zip(pair, pytorch[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=digits, atol=digits * float(theirs.abs().max()))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_nan_drops_the_statistics_of_its_layer_alone(backend: str) -> None:
    good, spoiled, before = run(backend), run(backend, spoil=True), run(backend, steps=1)
    for name in good:
        expected = before if name == "tokens.0.0" else good
        assert all(map(torch.equal, spoiled[name], expected[name])), name


def test_float64_is_summed_by_pytorch() -> None:
    """Whatever the backend of the other layers."""
    kernels, pytorch = (run(backend, dtype=torch.float64) for backend in ("auto", "torch"))
    for name, pair in kernels.items():
        assert all(map(torch.equal, pair, pytorch[name]))


def _step(depth: int, backend: str) -> tuple[Any, Any]:
    """Kernel launches and torch operators of the statistics of one backward pass."""
    torch.manual_seed(0)
    model = Norms(depth)
    with (
        KFACPreconditioner(model, backend=backend, damping=0.1, skip="head") as preconditioner,
        counted_launches(True) as counts,
    ):
        loss = model(torch.randn(N, 5, WIDTH)).square().mean()
        with CountedOperators() as operators:
            loss.backward()
        return dict(counts), sum(operators.counts.values()) - _without(depth), preconditioner


def _without(depth: int) -> int:
    """Torch operators of the same backward pass without statistics."""
    torch.manual_seed(0)
    loss = Norms(depth)(torch.randn(N, 5, WIDTH)).square().mean()
    with CountedOperators() as operators:
        loss.backward()
    return sum(operators.counts.values())


def test_launches_do_not_depend_on_the_number_of_norms(show: Callable[..., None]) -> None:
    (few, beside_few, _), (many, beside_many, _) = (_step(depth, "triton") for depth in (1, 8))
    torch_few, torch_many = (_step(depth, "torch")[1] for depth in (1, 8))
    show(
        f"\nStatistics of 4 and of 32 norms in one backward pass: launches {few} and {many},",
        f"  torch operators beside them {beside_few} and {beside_many}; without kernels {torch_few} and {torch_many}",
    )
    assert few == many == {
        "row_sums_kernel": 1, "channel_sums_kernel": 1, "channel_statistics_kernel": 1, "fisher_kernel": 2
    }  # fmt: skip
    assert beside_few == beside_many < torch_few < torch_many


def test_rows_are_made_only_where_they_are_read() -> None:
    """The kernel has input and gradient as they are; a part of the rows, and a full matrix, need the rows."""
    model = Norms()
    for norms, fraction in itertools.product(("diagonal", "full"), (1.0, 0.5)):
        with KFACPreconditioner(model, backend="triton", norms=norms, stats_fraction=fraction, loss_terms="tokens") as engine:
            layer = next(layer for layer in engine.engine.layers if layer.name == "tokens.0.0")
            x, gradient = torch.randn(N, 5, WIDTH), torch.randn(N, 5, WIDTH)
            rows = layer.rows(x, gradient)
            assert (rows.make is None) == (norms == "full")
            made, sampled = rows.made(), rows.sample(2, 1)
            assert torch.equal(sampled.gradients[0], made.gradients[0][1::2])
            assert (made.input_count, sampled.input_count) == (N * 5, N * 5 // 2)
