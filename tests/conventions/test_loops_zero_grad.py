"""Gradients that are thrown away, and the statistics that belong to them: zero_grad, GANs, penalties, closures that raise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.contenders import batch, equal, factors, loss_of, net, vector
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

LOSS = nn.CrossEntropyLoss()
Step = Callable[[nn.Module, KFAC, int, bool], object]


def _run(step: Step, set_to_none: bool = True, **settings: Any) -> list[Tensor]:
    model = net()
    optimizer = KFAC(model, lr=0.1, damping=0.1, loss=LOSS, **settings)
    for number in range(3):
        step(model, optimizer, number, set_to_none)
        optimizer.step()
    return [vector(model), *factors(optimizer)]


def _forward(model: nn.Module, optimizer: KFAC, number: int) -> Tensor:
    """Loss of a batch, and the Fisher pass, with the same draws each time."""
    x, y = batch(model, number)
    outputs = model(x)
    torch.manual_seed(number)
    optimizer.accumulate_fisher(outputs, y)
    return LOSS(outputs, y)


def _counts(optimizer: KFAC) -> list[list[float]]:
    return [s.counts.tolist() for s in optimizer.engine.statistics]


def _first(model: nn.Module, optimizer: KFAC, number: int, set_to_none: bool) -> None:
    optimizer.zero_grad(set_to_none)
    _forward(model, optimizer, number).backward()


def _between(model: nn.Module, optimizer: KFAC, number: int, set_to_none: bool) -> None:
    loss = _forward(model, optimizer, number)
    optimizer.zero_grad(set_to_none)
    optimizer.zero_grad(set_to_none)
    loss.backward()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fisher", ["empirical", "mc", "ggn"])
def test_zero_grad_before_backward_loses_nothing(fisher: str, set_to_none: bool) -> None:
    """After the forward pass and the Fisher pass, and twice."""
    assert equal(_run(_between, set_to_none, fisher=fisher), _run(_first, fisher=fisher))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("fisher", ["empirical", "mc", "ggn"])
def test_zero_grad_throws_away_what_belongs_to_the_gradients(fisher: str, set_to_none: bool) -> None:
    """Of micro-batches whose step was skipped."""

    def step(model: nn.Module, optimizer: KFAC, number: int, set_to_none: bool) -> None:
        for skipped in (50, 51):
            _forward(model, optimizer, skipped).backward()
        assert all(rows == 24 for rows, _ in _counts(optimizer))
        optimizer.zero_grad(set_to_none)
        assert all(rows == terms == 0 for rows, terms in _counts(optimizer))
        _forward(model, optimizer, number).backward()

    assert equal(_run(step, set_to_none, fisher=fisher), _run(_first, fisher=fisher))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("way", ["zero_grad", "paused", "frozen"])
def test_a_generator_sent_back_through_its_discriminator(way: str, set_to_none: bool) -> None:
    """The discriminator's next zero_grad forgets it: both train as where it is paused, or frozen, meanwhile."""
    assert equal(_adversaries(way, set_to_none), _adversaries("paused", True))


def _adversaries(way: str, set_to_none: bool) -> list[Tensor]:
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    ours, theirs = (KFAC(model, lr=0.05, damping=0.1) for model in (generator, discriminator))
    loss = nn.functional.binary_cross_entropy_with_logits
    ones = torch.ones(12, 1, dtype=torch.float64)
    for _ in range(4):
        real, noise, more = (torch.randn(12, size, dtype=torch.float64) for size in (4, 3, 3))
        theirs.zero_grad(set_to_none)
        (loss(discriminator(real), ones) + loss(discriminator(generator(noise).detach()), 0 * ones)).backward()
        theirs.step()
        ours.zero_grad(set_to_none)
        discriminator.requires_grad_(way != "frozen")
        with theirs.paused() if way == "paused" else nullcontext():
            loss(discriminator(generator(more)), ones).backward()
        discriminator.requires_grad_(True)
        ours.step()
    return [vector(generator), vector(discriminator), *factors(ours), *factors(theirs)]


def test_a_gradient_penalty_while_paused() -> None:
    """Its gradient counts, as autograd has it; its statistics do not."""

    def losses(model: nn.Module, optimizer: KFAC | None) -> tuple[Tensor, Tensor]:
        x = batch(model, 9)[0].requires_grad_()
        with nullcontext() if optimizer is None else optimizer.paused():
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return loss_of(model, 0), (slope.norm(dim=1) - 1).square().mean()

    model, plain_model, bare = net(), net(), net()
    optimizer, plain = KFAC(model), KFAC(plain_model)
    sum(losses(model, optimizer)).backward()
    expected = torch.autograd.grad(sum(losses(bare, None)), list(bare.parameters()))
    assert equal([p.grad for p in model.parameters()], list(expected))
    loss_of(plain_model, 0).backward()
    optimizer.step()
    plain.step()
    assert equal(factors(optimizer), factors(plain))
    assert not torch.equal(vector(model), vector(plain_model))


@pytest.mark.parametrize("where", ["before forward", "before backward", "after backward"])
@pytest.mark.parametrize("attached", [False, True], ids=["KFAC", "KFACPreconditioner"])
def test_a_closure_that_raises_changes_nothing(attached: bool, where: str) -> None:
    """Neither at once nor in the steps after it; each closure begins with zero_grad."""
    results = []
    for raises in (False, True):
        model = net()
        owner: Any = KFACPreconditioner(model, damping=0.1) if attached else KFAC(model, lr=0.1, damping=0.1)
        optimizer: Any = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) if attached else owner
        if attached:
            owner.attach(optimizer)

        def closure(number: int, fails: str = "", model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            if fails == "before forward":
                raise ArithmeticError
            loss = loss_of(model, number)
            if fails == "before backward":
                raise ArithmeticError
            loss.backward()
            if fails == "after backward":
                raise ArithmeticError
            return loss

        for number in range(4):
            if raises and number == 2:
                before = [vector(model), *factors(owner)]
                with pytest.raises(ArithmeticError):
                    optimizer.step(lambda closure=closure: closure(50, where))
                assert equal(before, [vector(model), *factors(owner)])
                assert owner.diagnostics()["steps"] == 2
            optimizer.step(lambda closure=closure, number=number: closure(number))
        results.append([vector(model), *factors(owner)])
    assert equal(*results)
