"""Norm layers in a training step: their kernels against PyTorch, and what they launch."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.launches import CountedOperators, counted_launches
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.kernels import device_tables

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
        x = x.mT.contiguous()
        for block in self.images:
            x = block(x) + x
        return self.head(x.mT)


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


def _backward(depth: int, backend: str | None) -> tuple[Counter[str], int]:
    """Kernel launches and torch operators of one backward pass, with statistics or without."""
    torch.manual_seed(0)
    model = Norms(depth)
    with contextlib.ExitStack() as stack:
        if backend is not None:
            stack.enter_context(KFACPreconditioner(model, backend=backend, damping=0.1, skip="head"))
        launches = stack.enter_context(counted_launches())
        loss = model(torch.randn(N, 5, WIDTH)).square().mean()
        device_tables._copies.cache_clear()  # a table of the same numbers may be there from an earlier test, or may not
        with CountedOperators() as operators:
            loss.backward()
        # A gradient that does not lie in memory as its input does is copied: here that of the GroupNorm.
        return launches, sum(operators.counts.values()) - operators.counts["contiguous"]


def test_launches_do_not_depend_on_the_number_of_norms(show: Callable[..., None]) -> None:
    alone = {depth: _backward(depth, None)[1] for depth in (1, 8)}
    (few, beside_few), (many, beside_many) = (_backward(depth, "triton") for depth in alone)
    pytorch = {depth: _backward(depth, "torch")[1] - alone[depth] for depth in alone}
    show(
        f"\nStatistics of 4 and of 32 norms in one backward pass: {sum(few.values())} and {sum(many.values())} launches,",
        f"  and beside them {beside_few - alone[1]} and {beside_many - alone[8]} torch operators; without kernels {pytorch}",
    )
    assert few == many
    assert many == {"row_sums_kernel": 1, "channel_sums_kernel": 1, "channel_statistics_kernel": 1, "fisher_kernel": 2}
    assert beside_few - alone[1] == beside_many - alone[8] < pytorch[1] < pytorch[8]


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
            assert (made.input_count, sampled.input_count, sampled.share) == (N * 5, N * 5, 0.5)
