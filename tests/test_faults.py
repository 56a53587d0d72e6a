"""Bad numbers in a batch, a gradient or a checkpoint, and layers that die: the run goes on as if they had not been."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import backward, batch, net, train, vector
from torch import Tensor, nn

from kfac_triton import KFAC

BAD = [torch.nan, torch.inf, -torch.inf]
TAILS: dict[str, dict[str, Any]] = {
    "momentum": {"lr": 0.1, "weight_decay": 0.1},
    "adamw": {"tail": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "adam": {"curvature": "adam", "tail": "adamw", "nesterov": True, "lr": 0.01, "weight_decay": 0.1},
}


def _everything(model: nn.Module, optimizer: KFAC) -> list[Tensor]:
    factors = [side for pair in optimizer.factors().values() for side in pair]
    state = [x for p in model.parameters() for x in optimizer.state[p].values() if x is not None]
    return [x.detach().clone() for x in (*model.parameters(), *factors, *state)]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("where", ["batch", "loss"])
@pytest.mark.parametrize("tail", TAILS)
def test_a_bad_batch_changes_nothing_and_the_next_step_is_as_without_it(tail: str, where: str, bad: float) -> None:
    """Parameters that K-FAC covers and others, momentum and weight decay: bit for bit."""
    results = []
    for meets in (False, True):
        model = net()
        optimizer = KFAC(model, **TAILS[tail])
        train(model, optimizer, range(3))
        if meets:
            x, y = batch(99)
            x[:, :, 1 if where == "batch" else 0] *= bad if where == "batch" else 1
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            (loss * (bad if where == "loss" else 1.0)).backward()
            before = _everything(model, optimizer)
            optimizer.step()
            assert all(torch.equal(a, b) for a, b in zip(before, _everything(model, optimizer), strict=True))
            assert optimizer.diagnostics()["dropped_gradients"] == 1  # of the scale; the other parameters are covered
        train(model, optimizer, range(3, 6))
        results.append(vector(model))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize("tail", TAILS)
def test_a_bad_gradient_stops_its_parameter_alone(tail: str) -> None:
    model = net()
    optimizer = KFAC(model, **TAILS[tail])
    train(model, optimizer, range(2))
    backward(model, 2)
    bad = [model.scale, model.conv.bias]
    for p in bad:
        assert p.grad is not None
        p.grad.view(-1)[0] = torch.nan
    stopped = {"scale", "conv.weight", "conv.bias"}  # weight and bias of a layer have one update
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in stopped)
    assert optimizer.diagnostics()["dropped_gradients"] == 1
    layer = optimizer.diagnostics()["layers"]["conv"]
    assert layer["dropped_gradients"] == 1  # one of its two groups of channels, and both stay


def test_where_the_host_does_not_look_bad_gradients_move_nothing() -> None:
    """As on a GPU: all parameters stay where they are."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    optimizer = KFAC(model, lr=0.1, backend="triton")
    for step in range(3):
        optimizer.zero_grad()
        (model(torch.randn(5, 4).requires_grad_()) * model.scale).square().mean().backward()
        if step == 1:
            for p in model.parameters():
                assert p.grad is not None
                p.grad.view(-1)[0] = torch.inf
        before = vector(model)
        optimizer.step()
        assert torch.equal(before, vector(model)) == (step == 1)
        assert vector(model).isfinite().all()
    assert optimizer.diagnostics()["dropped_gradients"] == 1


def test_a_layer_that_dies_and_comes_alive() -> None:
    """All-zero activations: factors fade, nothing breaks, and it trains again when it is used again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    optimizer = KFAC(model, lr=0.1, damping=0.01, ema_decay=0.5, momentum=0.0)

    def step() -> float:
        x = torch.randn(16, 4, dtype=torch.float64)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), x[:, :3])
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    losses = [step() for _ in range(5)]
    with torch.no_grad():
        alive = model[0].bias.clone()
        model[0].bias.fill_(-100.0)  # every unit of the ReLU is off
    for _ in range(60):
        step()
    assert vector(model).isfinite().all()
    layers = optimizer.diagnostics()["layers"]
    assert layers["0"]["trace_G"] < 1e-12
    assert layers["2"]["dropped_statistics"] == layers["0"]["dropped_statistics"] == 0
    with torch.no_grad():
        model[0].bias.copy_(alive)
    losses += [step() for _ in range(60)]
    assert vector(model).isfinite().all()
    assert losses[-1] < losses[4]


@pytest.mark.parametrize(
    "settings", [{}, {"curvature": "ekfac"}, {"inverse": "factored"}, {"inverse": "newton_schulz"}], ids=str
)
def test_a_model_whose_loss_does_not_depend_on_it(settings: dict[str, Any]) -> None:
    """All gradients are zero: every G is, and nothing moves."""
    model = net()
    optimizer = KFAC(model, lr=0.1, **settings)
    before = vector(model)
    for step in range(3):
        optimizer.zero_grad()
        (0.0 * model(batch(step)[0]).sum()).backward()
        optimizer.step()
    assert torch.equal(vector(model), before)


def test_two_layers_with_bad_gradients_stop_both() -> None:
    """Of different shapes: their tiles are in two stacks. Neither weight decay nor momentum moves them."""
    model = net()
    optimizer = KFAC(model, **TAILS["momentum"])
    train(model, optimizer, range(2))
    backward(model, 2)
    stopped = {"conv.weight", "conv.bias", "head.weight", "head.bias"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in (model.conv.weight, model.head.weight):
        assert p.grad is not None
        p.grad.view(-1)[0] = torch.nan
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name in stopped)
    counts = {name: layer["dropped_gradients"] for name, layer in optimizer.diagnostics()["layers"].items()}
    assert {name for name, count in counts.items() if count} == {"conv", "head"}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_huge_gradient_whose_square_overflows_is_no_bad_one(backend: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    optimizer = KFAC(model, lr=0.1, momentum=0.0, backend=backend)
    model.scale.grad = torch.tensor([1e30, -1e30, 1.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(model.scale.detach(), torch.tensor([-1e29, 1e29, 0.9, 1.0]))
    assert optimizer.diagnostics()["dropped_gradients"] == 0


def test_where_the_host_does_not_look_momentum_and_decay_stop_at_a_bad_gradient() -> None:
    """Neither W nor the momentum buffer changes, nor how often the parameter was moved."""
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = KFAC(model, lr=0.1, momentum=0.5, weight_decay=0.2, backend="triton")
    for bad in (False, True):
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().mean().backward()
        if bad:
            model[0].weight.grad.view(-1)[0] = torch.nan
        before = [[x.detach().clone() for x in _tail_of(p, optimizer)] for p in model.parameters()]
        optimizer.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(_tail_of(p, optimizer), old, strict=True))
    assert optimizer.diagnostics()["layers"]["0"]["dropped_gradients"] == 1


def _tail_of(parameter: nn.Parameter, optimizer: KFAC) -> list[Tensor]:
    state = optimizer.state[parameter]
    return [parameter, state["momentum_buffer"], state["step"]]
