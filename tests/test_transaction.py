"""A step that fails half way leaves parameters, factors and counters as they were, wherever it fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import SETTINGS, backward, net, train, vector
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton import KFAC, KFACPreconditioner


class OutOfMemory(TorchDispatchMode):
    """Refuses the at-th operation that asks for memory."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        asks = not schema.is_mutable and not any(r.alias_info for r in schema.returns) and func.namespace != "profiler"
        self.count += asks
        if asks and self.count == self.at:
            raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))


def _everything(model: nn.Module, optimizer: KFAC) -> list[Tensor]:
    engine = optimizer.engine
    factors = [side for pair in optimizer.factors().values() for side in pair]
    state = [x for p in model.parameters() for x in optimizer.state[p].values() if x is not None]
    numbers = torch.tensor([engine.steps, engine.refreshes, len(engine.without_statistics)])
    return [x.detach().clone() for x in (*model.parameters(), *factors, *state, engine.bank.updates, numbers)]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3), nn.LayerNorm(3))


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "adamw"])
def test_out_of_memory_anywhere_in_a_step(name: str, first: int, stride: int) -> None:
    """The k-th request for memory is refused, for every k until a step asks for fewer; and the next step is a good one."""
    refused = first
    while True:
        model = _model()
        optimizer = KFAC(model, lr=0.1, **SETTINGS[name])
        train(model, optimizer, range(first))
        backward(model, first)
        before, memory = _everything(model, optimizer), OutOfMemory(refused + stride)
        try:
            with memory:
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            refused += stride
        assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True)), f"request {refused}"
        train(model, optimizer, range(first, first + 1))
        assert optimizer.engine.steps == first + 1
        assert vector(model).isfinite().all()
    assert refused > 50


@pytest.mark.parametrize("name", ["default", "old inverses", "diagonals"])
def test_the_step_after_a_failed_one_is_as_if_it_had_not_been(name: str) -> None:
    results = []
    for fails in (False, True):
        model = _model()
        optimizer = KFAC(model, lr=0.1, **SETTINGS[name])
        train(model, optimizer, range(3))
        if fails:
            backward(model, 99)
            with pytest.raises(torch.OutOfMemoryError), OutOfMemory(30):
                optimizer.step()
        train(model, optimizer, range(3, 6))
        results.append(vector(model))
    assert torch.equal(*results)


def test_kernels_path_backs_up_what_waited() -> None:
    """There rows go straight into the factors: the copies are made before."""
    for at in range(1, 200, 17):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
        optimizer = KFAC(model, lr=0.1, backend="triton")

        def gradients(model: nn.Module = model, optimizer: KFAC = optimizer) -> None:
            optimizer.zero_grad()
            model(torch.randn(3, 5).requires_grad_()).square().mean().backward()

        gradients()
        optimizer.step()
        gradients()
        assert all(s.passes for s in optimizer.engine.statistics)
        before = _everything(model, optimizer)
        try:
            with OutOfMemory(at):
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))
    assert at > 50


def test_a_closure_that_fails_in_lr_auto() -> None:
    model = net(torch.float64)
    optimizer = KFAC(model, lr="auto", loss=nn.MSELoss(), damping=1.0)
    train(model, optimizer, range(2))
    before, calls = _everything(model, optimizer), []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(torch.ones(8, 2, 6, dtype=torch.float64)), torch.zeros(8, 3, dtype=torch.float64)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))
    train(model, optimizer, range(2, 4))
    assert optimizer.engine.steps == 4


def test_a_preconditioner_that_fails_leaves_its_factors() -> None:
    model = net()
    preconditioner = KFACPreconditioner(model)
    backward(model, 0)
    preconditioner.precondition_()
    backward(model, 1)
    before, updates = preconditioner.factors(), preconditioner.engine.bank.updates.clone()
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(100):
        preconditioner.precondition_()
    after = preconditioner.factors()
    assert all(torch.equal(x, y) for k in before for x, y in zip(before[k], after[k], strict=True))
    assert torch.equal(preconditioner.engine.bank.updates, updates)
    assert preconditioner.engine.steps == 1
