"""The counts of benchmarks/steps/flops.py against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.steps import flops


def test_linear_layer() -> None:
    shapes = flops.layer_shapes(nn.Linear(3, 2), torch.zeros(4, 3))
    assert shapes == [flops.LayerShape(rows=4, inputs=3, outputs=2, bias=True, input_gradient=False)]
    cost = flops.kfac_cost(shapes)
    assert cost.forward == 48  # 2 * 4 * 3 * 2
    assert cost.backward == 48  # the weight's gradient alone: nothing lies before the first layer
    assert cost.statistics == 104  # A: 4 * 4 * 5 = 80, G: 4 * 2 * 3 = 24
    assert cost.inverses == 72  # 4^3 + 2^3
    assert cost.preconditioning == 96  # 2 * 2^2 * 4 + 2 * 2 * 4^2
    assert cost.total == 368


def test_second_layer_has_an_input_gradient() -> None:
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Linear(2, 5, bias=False))
    cost = flops.sgd_cost(flops.layer_shapes(model, torch.zeros(4, 3)))
    assert cost.forward == 128  # 48 + 2 * 4 * 2 * 5
    assert cost.backward == 208  # 48 + 2 * 80


def test_conv_layer_counts_patches_as_rows() -> None:
    conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False)
    shapes = flops.layer_shapes(conv, torch.zeros(5, 2, 6, 6))
    assert shapes == [flops.LayerShape(rows=45, inputs=18, outputs=4, bias=False, input_gradient=False)]
    cost = flops.kfac_cost(shapes)
    assert cost.forward == 6480  # 2 * 45 * 18 * 4
    assert cost.statistics == 16290  # A: 45 * 18 * 19 = 15390, G: 45 * 4 * 5 = 900
    assert cost.preconditioning == 3168  # 2 * 16 * 18 + 2 * 4 * 324


def test_intervals_divide() -> None:
    shapes = flops.layer_shapes(nn.Linear(3, 2), torch.zeros(4, 3))
    cost = flops.kfac_cost(shapes, statistics_every=2, inverse_every=10)
    assert (cost.statistics, cost.inverses) == (52, pytest.approx(7.2))


@pytest.mark.parametrize(("method", "inverses", "preconditioning"), [("eigen", 648, 192), ("inverse", 144, 96)])
def test_peer(method: str, inverses: float, preconditioning: float) -> None:
    cost = flops.peer_cost(flops.layer_shapes(nn.Linear(3, 2), torch.zeros(4, 3)), method)
    assert cost.statistics == 160  # A: 2 * 4 * 16 = 128, G: 2 * 4 * 4 = 32
    assert (cost.inverses, cost.preconditioning) == (inverses, preconditioning)


def test_refuses_what_it_cannot_count() -> None:
    with pytest.raises(NotImplementedError, match="groups=2"):
        flops.layer_shapes(nn.Conv2d(2, 2, 1, groups=2), torch.zeros(1, 2, 3, 3))
    with pytest.raises(ValueError, match="'qr'"):
        flops.peer_cost([], "qr")
