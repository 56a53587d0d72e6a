"""Conv1D of transformers, which is not installed: a class that has its name, its home and its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adapters import assert_an_idle_expert_stays, assert_checkpoint_keeps_the_run, assert_close, preconditioned
from torch import Tensor, nn

from kfac_triton.layers import find_layers

N, IN, OUT = 6, 5, 4


class Conv1D(nn.Module):
    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.nx = nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


class Elsewhere(Conv1D):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Derived(Conv1D):
    pass


Conv1D.__module__ = "transformers.pytorch_utils"


def linear_of(conv: Conv1D) -> nn.Linear:
    linear = nn.Linear(conv.nx, conv.nf, dtype=conv.weight.dtype)
    linear.weight.data, linear.bias.data = conv.weight.data.T.clone(), conv.bias.data.clone()
    return linear


@pytest.mark.parametrize("frozen", [False, True], ids=["", "bias frozen"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_sharing": "reduce"},
        {"loss_terms": "tokens"},
        {"max_factor_size": 3},
        {"max_factor_size": 3, "oversize": "block"},
        {"curvature": "ekfac"},
        {"stats_fraction": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_the_linear_with_the_transposed_weight(dtype: torch.dtype, options: dict[str, Any], frozen: bool) -> None:
    conv = Conv1D(OUT, IN).to(dtype)
    nn.init.normal_(conv.bias)
    linear = linear_of(conv)
    for module in (conv, linear):
        module.bias.requires_grad_(not frozen)
    x = torch.randn(N, 3, IN, dtype=dtype)
    ours, _ = preconditioned(nn.Sequential(conv, nn.Tanh()), lambda model: model(x).square(), **options)
    theirs, _ = preconditioned(nn.Sequential(linear, nn.Tanh()), lambda model: model(x).square(), **options)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    for mine, other in zip(ours.factors()["0"], theirs.factors()["0"], strict=True):
        assert mine.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_close(mine, other, tolerance)
    assert linear.weight.grad is not None
    assert_close(conv.weight.grad, linear.weight.grad.T, tolerance)
    if not frozen:
        assert linear.bias.grad is not None
        assert_close(conv.bias.grad, linear.bias.grad, tolerance)


def test_which_classes_it_is() -> None:
    class Conv1D(nn.Module):  # another one of that name
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = nn.ModuleList([globals()["Conv1D"](3, 2), Derived(3, 2), Elsewhere(3, 2), Conv1D(), nn.Conv1d(2, 3, 1)])
    layers, skipped = find_layers(model)
    assert [(layer.name, type(layer).__name__) for layer in layers] == [
        ("0", "HFConv1DLayer"),
        ("1", "HFConv1DLayer"),
        ("4", "ConvLayer"),
    ]
    assert skipped == {}


def test_frozen_and_shared_weights() -> None:
    frozen, first, second = Conv1D(3, 3), Conv1D(3, 3), Conv1D(3, 3)
    frozen.weight.requires_grad_(False)
    second.weight = first.weight
    linear = nn.Linear(3, 3)
    layers, skipped = find_layers(nn.ModuleList([frozen, first, second]))
    assert skipped == {"0": "its weight is frozen"}
    assert [(layer.name, layer.has_bias, len(layer.modules)) for layer in layers] == [("1", False, 2)]
    linear.weight = first.weight
    assert find_layers(nn.ModuleList([first, linear]))[0] == []


def test_an_expert_without_tokens() -> None:
    assert_an_idle_expert_stays(Conv1D(OUT, IN), Conv1D(OUT, IN), torch.randn(N, 3, IN))


def test_checkpoints() -> None:
    x = torch.randn(N, IN)
    assert_checkpoint_keeps_the_run(lambda: nn.Sequential(Conv1D(OUT, IN), nn.Tanh()), lambda model: model(x).square().sum(1))
