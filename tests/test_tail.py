"""The tails are torch's own optimizers on parameters that K-FAC does not cover."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from kfac_triton import KFAC

CASES: dict[str, tuple[dict[str, Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "sgd": ({"momentum": 0.0}, lambda p: torch.optim.SGD(p, lr=0.1)),
    "momentum": ({"momentum": 0.9}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    "nesterov": ({"nesterov": True}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True)),
    "adamw": ({"tail": "adamw"}, lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0)),
    "adamw-decay": (
        {"tail": "adamw", "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6},
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6),
    ),
}


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3))


@pytest.mark.parametrize("case", CASES)
def test_uncovered_parameters_move_as_under_torchs_optimizer(case: str) -> None:
    options, make_reference = CASES[case]
    ours, reference = _model(), _model()
    optimizer = KFAC(ours, [*ours[0].parameters(), ours[1].weight], lr=0.1, **options)
    reference_optimizer = make_reference(reference[0].parameters())
    for _ in range(5):
        x = torch.randn(8, 6)
        reference[1].load_state_dict(ours[1].state_dict())
        for model in (ours, reference):
            model.zero_grad()
            model(x).square().mean().backward()
        optimizer.step()
        reference_optimizer.step()
        for a, b in zip(ours[0].parameters(), reference[0].parameters(), strict=True):
            assert torch.equal(a, b)


def test_weight_decay_is_decoupled_with_the_sgd_tail() -> None:
    model = _model()
    optimizer = KFAC(model, lr=0.1, momentum=0.0, weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="no statistics came"):
        optimizer.step()
    for old, p in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), old * (1 - 0.1 * 0.5))


def test_covered_layers_move_along_the_preconditioned_gradient() -> None:
    model = _model()
    optimizer = KFAC(model, lr=0.25, momentum=0.0)
    before = model[1].weight.detach().clone()
    model(torch.randn(8, 6)).square().mean().backward()
    optimizer.step()
    stack = optimizer.engine.gradients[0]
    torch.testing.assert_close(model[1].weight.detach(), before - 0.25 * stack.update[0, :3, :6])
