"""Models that move to another device after the optimizer was made, as accelerate and many scripts do.

There is one device here: an engine is told that its weights were elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.runs import SETTINGS, backward, hooks, net, train, vector
from torch import nn

from kfac_triton import KFAC, KFACPreconditioner

NOTICED: dict[str, Callable[[KFAC], object]] = {
    "load_state_dict": lambda o: o.load_state_dict(o.state_dict()),
    "state_dict": lambda o: o.state_dict(),
    "zero_grad": lambda o: o.zero_grad(),
}


def _elsewhere(optimizer: KFAC | KFACPreconditioner) -> None:
    optimizer.engine._devices = [torch.device("cuda")] * len(optimizer.engine.layers)
    for statistics in optimizer.engine.statistics:
        statistics.device = torch.device("cuda")


@pytest.mark.parametrize("how", NOTICED)
@pytest.mark.parametrize("name", SETTINGS)
def test_factors_follow_and_training_goes_on(name: str, how: str) -> None:
    results = []
    for moves in (False, True):
        model = net()
        optimizer = KFAC(model, **{"lr": 0.1, **SETTINGS[name]})
        train(model, optimizer, range(3))
        if moves:
            old, count = optimizer.engine, hooks(model)
            _elsewhere(optimizer)
            NOTICED[how](optimizer)
            assert old.closed
            assert optimizer.engine is not old
            assert hooks(model) == count
        train(model, optimizer, range(3, 6))
        results.append(vector(model))
    assert torch.equal(*results)


def test_lr_auto_follows() -> None:
    results = []
    for moves in (False, True):
        model = net(torch.float64)
        optimizer = KFAC(model, lr="auto", loss=nn.MSELoss(), damping=1.0)
        train(model, optimizer, range(3))
        if moves:
            _elsewhere(optimizer)
        train(model, optimizer, range(3, 6))
        results.append(vector(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("in_front", [False, True])
def test_a_move_that_nobody_tells_costs_one_step_its_statistics(in_front: bool) -> None:
    """The hooks leave nothing on the wrong device, and the step takes the factors along."""
    model = net()
    optimizer = KFACPreconditioner(model) if in_front else KFAC(model, lr=0.1)
    step = optimizer.precondition_ if isinstance(optimizer, KFACPreconditioner) else optimizer.step
    for number in range(4):
        if number == 2:
            _elsewhere(optimizer)
        backward(model, number)
        step()
    assert {layer["updates"] for layer in optimizer.diagnostics()["layers"].values()} == {3}
    assert not optimizer.engine.changed_device()
