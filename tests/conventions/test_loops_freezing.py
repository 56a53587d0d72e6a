"""Layers that are frozen and unfrozen while the others train."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support import runs
from support.contenders import batch, equal, factors, loss_of, net, train, vector
from support.helpers import mlp, relative_error
from torch import nn

from kfac_triton import KFAC, KFACPreconditioner


def test_a_layer_that_is_frozen_for_a_while() -> None:
    """It stays, with its factors and momentum; its A is the moving average of the batches that it trained on."""
    model = net()
    optimizer = KFAC(model, lr=0.1, damping=0.1, ema_decay=0.8)
    train(model, optimizer, 2)
    before = [vector(model[0]), vector(model[2]), *factors(optimizer)]
    model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 3, first=2)
    after = [vector(model[0]), vector(model[2]), *factors(optimizer)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [True, False, True, True, *[False] * 4]
    model[0].requires_grad_(True)
    train(model, optimizer, 2, first=5)
    average, total = torch.zeros(6, 6, dtype=torch.float64), 0.0
    for step in (0, 1, 5, 6):
        rows = torch.cat([batch(model, step)[0], torch.ones(12, 1, dtype=torch.float64)], 1)
        average, total = 0.8 * average + 0.2 * rows.mT @ rows / 12, 0.8 * total + 0.2
    assert relative_error(factors(optimizer)[0], average / total) <= 1e-12
    assert [layer["updates"] for layer in optimizer.diagnostics()["layers"].values()] == [4, 7, 7]
    assert not torch.equal(vector(model[0]), before[0])


def test_a_frozen_weight_beside_a_bias_that_trains() -> None:
    """The bias goes along its gradient."""
    model = net()
    optimizer = KFAC(model, lr=0.1, momentum=0.0, damping=0.1)
    train(model, optimizer, 1)
    weight, bias, known = model[2].weight.detach().clone(), model[2].bias.detach().clone(), factors(optimizer)
    model[2].weight.requires_grad_(False)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    optimizer.step()
    assert torch.equal(model[2].weight, weight)
    assert equal(factors(optimizer)[2:4], known[2:4])
    torch.testing.assert_close(model[2].bias, bias - 0.1 * model[2].bias.grad, rtol=1e-12, atol=0)


def test_gradual_unfreezing_by_groups() -> None:
    """From the last layer to the first; each begins with factors of its own, and the others keep theirs."""
    model = net().requires_grad_(False)
    model[4].requires_grad_(True)
    optimizer = KFAC(model, lr=0.1, damping=0.1)
    train(model, optimizer, 2)
    for number, known in ((2, ["4"]), (0, ["2", "4"])):
        before, start = optimizer.factors(), vector(model[number])
        model[number].requires_grad_(True)
        optimizer.add_param_group({"params": model[number].parameters(), "lr": 0.05})
        assert set(optimizer.factors()) == {*known, str(number)}
        assert all(torch.equal(a, b) for name in known for a, b in zip(before[name], optimizer.factors()[name], strict=True))
        train(model, optimizer, 2, first=number + 2)
        assert not torch.equal(vector(model[number]), start)
    assert [layer["updates"] for layer in optimizer.diagnostics()["layers"].values()] == [2, 4, 6]


@pytest.mark.parametrize("at", ["zero_grad", "step", "precondition_"])
def test_a_layer_that_was_frozen_when_the_optimizer_was_made(at: str) -> None:
    """It is covered after the next zero_grad or step, with hooks once, and trains like a layer that always was."""
    model = net()
    model[0].requires_grad_(False)
    ours: Any = KFACPreconditioner(model) if at == "precondition_" else KFAC(model, list(model.parameters()), lr=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if at == "precondition_" else ours
    if optimizer is not ours:
        ours.attach(optimizer)
    train(model, optimizer, 2)
    start, known, count = vector(model[0]), ours.factors(), runs.hooks(model)
    assert set(known) == {"2", "4"}
    model[0].requires_grad_(True)
    if at == "zero_grad":
        optimizer.zero_grad()
    else:
        loss_of(model, 2).backward()
        optimizer.step()
    assert set(ours.factors()) == {"0", "2", "4"}
    assert runs.hooks(model) == 2 + (count - 2) * 3 // 2  # two are the model's
    if at == "zero_grad":
        assert all(torch.equal(a, b) for name in known for a, b in zip(known[name], ours.factors()[name], strict=True))
    train(model, optimizer, 1, first=3)
    x = torch.cat([batch(model, 3)[0], torch.ones(12, 1, dtype=torch.float64)], 1)
    assert relative_error(ours.factors()["0"][0], x.mT @ x / 12) <= 1e-12
    assert not torch.equal(vector(model[0]), start)


@pytest.mark.parametrize("how", ["zero_grad", "add_param_group"])
def test_a_closed_optimizer_stays_closed(how: str) -> None:
    """Whatever trains or moves afterwards."""
    model = mlp()
    model[0].weight.requires_grad_(False)
    optimizer = KFAC(model, [*model[0].parameters(), *model[2].parameters()])
    optimizer.close()
    model[0].weight.requires_grad_(True)
    optimizer.zero_grad() if how == "zero_grad" else optimizer.add_param_group({"params": list(model[4].parameters())})
    assert optimizer.engine.closed
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_frozen_layer_wakes_with_lr_auto() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = KFAC(model, model.parameters(), lr="auto", loss=nn.CrossEntropyLoss(), damping=0.1)
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 4
    for thawed in (False, True):
        model[0].requires_grad_(thawed)
        for _ in range(2):
            optimizer.step(lambda: (model(x), y))
    layers = {name: layer["updates"] for name, layer in optimizer.diagnostics()["layers"].items()}
    assert layers == {"0": 1, "2": 4, "4": 4}
