"""diagnostics() says what happened, as plain values."""

from __future__ import annotations

import json

import pytest
import torch
from support.helpers import mlp
from torch import nn

from kfac_triton import KFAC


def test_values_match_what_they_name() -> None:
    model = mlp()
    optimizer = KFAC(model, lr=0.1, damping=0.04, kl_clip=1e-3)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(4, (12,))
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    result = optimizer.diagnostics()
    assert json.loads(json.dumps(result)) == result  # plain values all the way down
    assert result["steps"] == 1
    assert list(result["layers"]) == ["0", "2", "4"]
    for name, layer in result["layers"].items():
        a, g = optimizer.factors()[name]
        assert layer["trace_A"] == pytest.approx(float(a.trace()))
        assert layer["trace_G"] == pytest.approx(float(g.trace()))
        pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
        assert layer["pi"] == pytest.approx(float(pi))
        assert layer["damping_A"] == pytest.approx(0.2 * float(pi))
        assert layer["damping_G"] == pytest.approx(0.2 / float(pi))
        damped = a + layer["damping_A"] * torch.eye(len(a), dtype=torch.float64)
        assert layer["condition_A"] >= float(torch.linalg.cond(damped))
        assert 0 <= layer["residual_A"] <= 0.3
        module = model.get_submodule(name)
        gradient = torch.cat([module.weight.grad, module.bias.grad[:, None]], 1)
        assert layer["gradient_norm"] == pytest.approx(float(gradient.norm()))
        left = torch.linalg.inv(g + layer["damping_G"] * torch.eye(len(g), dtype=torch.float64))
        update = left @ gradient @ torch.linalg.inv(damped)
        assert layer["update_norm"] == pytest.approx(result["kl_clip_scale"] * float(update.norm()))
        assert layer["product"] == pytest.approx(float((update * gradient).sum()))


def test_before_the_first_step() -> None:
    result = KFAC(mlp(), lr=0.1).diagnostics()
    assert result["steps"] == 0
    assert result["without_statistics"] == ["0", "2", "4"]
    assert all(layer["updates"] == 0 for layer in result["layers"].values())
