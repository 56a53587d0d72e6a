"""An optimizer that is closed or dropped is gone at once, without the garbage collector, and its hooks with it."""

from __future__ import annotations

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.contenders import batch, loss_of, net, train
from support.memory_meter import MemoryMeter
from support.runs import hooks
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from kfac_triton import KFAC, KFACPreconditioner

LOSS = nn.CrossEntropyLoss()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _with_fisher(model: nn.Module, optimizer: Any) -> None:
    optimizer.zero_grad()
    x, y = batch(model, 0)
    outputs = model(x)
    optimizer.accumulate_fisher(outputs, y)
    LOSS(outputs, y).backward()
    optimizer.step()


def _scheduled(model: nn.Module, optimizer: Optimizer) -> None:
    for make in (lambda o: OneCycleLR(o, 0.1, total_steps=10), lambda o: LambdaLR(o, lambda step: 0.9**step)):
        scheduler = make(optimizer)
        train(model, optimizer, 1)
        scheduler.step()


def _interrupted(model: nn.Module, optimizer: Any) -> None:
    train(model, optimizer, 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise ArithmeticError

    with contextlib.suppress(ArithmeticError):
        optimizer.step(fail)
    curvature = optimizer.engine.curvature
    curvature.refresh = fail
    with contextlib.suppress(ArithmeticError):
        train(model, optimizer, 1)
    del curvature.refresh
    train(model, optimizer, 1)


def _saved_and_copied(model: nn.Module, optimizer: Any) -> None:
    train(model, optimizer, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    other, its = copy.deepcopy((model, optimizer))
    train(other, its, 1)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    train(model, optimizer, 1)


def _one_step(model: nn.Module, optimizer: Any) -> None:
    train(model, optimizer, 1)


ENDS: dict[str, tuple[dict[str, Any], Callable[[nn.Module, Any], object]]] = {
    "no step": ({}, lambda model, optimizer: None),
    "default": ({}, _one_step),
    "adamw": ({"tail": "adamw"}, _one_step),
    "mc": ({"fisher": "mc", "loss": LOSS}, _with_fisher),
    "ekfac": ({"curvature": "ekfac"}, _one_step),
    "adam": ({"curvature": "adam", "tail": "adamw"}, _one_step),
    "factored": ({"inverse": "factored"}, _one_step),
    "auto": ({"lr": "auto", "loss": LOSS}, _one_step),
    "scaler": ({"loss_scale": torch.amp.GradScaler("cpu")}, _one_step),
    "scheduler": ({}, _scheduled),
    "error": ({}, _interrupted),
    "state": ({}, _saved_and_copied),
}


@pytest.mark.parametrize("closes", [True, False], ids=["closed", "dropped"])
@pytest.mark.parametrize("name", ENDS)
def test_an_optimizer_is_gone_at_once(name: str, closes: bool, no_collector: None) -> None:
    settings, use = ENDS[name]
    model = net(torch.float32)
    optimizer = KFAC(model, **settings)
    use(model, optimizer)
    engine = optimizer.engine
    parts = [optimizer, engine, engine.curvature, engine.collector, *engine.statistics, engine.bank.stacks[0].sums]
    gone = [weakref.ref(part) for part in parts]
    assert hooks(model) > 0
    if closes:
        optimizer.close()
        assert hooks(model) == 0
    del optimizer, engine, parts
    assert [ref() for ref in gone if ref() is not None] == []
    assert hooks(model) == 0


@pytest.mark.parametrize("first", ["optimizer", "preconditioner"])
@pytest.mark.parametrize("closes", [True, False], ids=["closed", "dropped"])
def test_a_preconditioner_is_gone_with_its_optimizer(closes: bool, first: str, no_collector: None) -> None:
    """While the optimizer is there it holds the preconditioner."""
    model = net(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    preconditioner = KFACPreconditioner(model)
    preconditioner.attach(optimizer)
    train(model, optimizer, 1)
    gone = [weakref.ref(part) for part in (optimizer, preconditioner, preconditioner.engine)]
    if closes:
        preconditioner.close()
        assert hooks(model) == 0
    if first == "optimizer":
        del optimizer
        del preconditioner
    else:
        del preconditioner
        assert (gone[1]() is None) == closes
        assert (hooks(model) == 0) == closes
        del optimizer
    assert [ref() for ref in gone if ref() is not None] == []
    assert hooks(model) == 0


def test_a_graph_that_is_alive_keeps_the_sums_alone(no_collector: None) -> None:
    """Its taps hold what they would add to, until its backward pass is over; not the optimizer, nor its inverses."""
    model = net(torch.float32)
    optimizer = KFAC(model)
    loss = loss_of(model, 0)
    engine = optimizer.engine
    gone = [weakref.ref(part) for part in (optimizer, engine, engine.curvature, engine.curvature.inverses[0])]
    sums = weakref.ref(engine.statistics[0])
    del optimizer, engine
    assert [ref() for ref in gone if ref() is not None] == []
    assert sums() is not None
    loss.backward()
    del loss
    assert sums() is None
    assert all(p.grad is not None for p in model.parameters())


def test_a_replaced_optimizer_leaves_as_much_memory_as_it_found(no_collector: None) -> None:
    """Fifty optimizers of one model, one after the other."""
    with MemoryMeter() as meter:
        model = net(torch.float32)
        live = []
        for _ in range(50):
            optimizer = KFAC(model)
            train(model, optimizer, 1)
            del optimizer
            live.append(meter.current)
    assert live[-1] == live[1]
