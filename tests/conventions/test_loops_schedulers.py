"""Schedulers: what they make of lr, momentum and betas is what the steps are taken with."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.contenders import net, train, vector
from support.helpers import relative_error
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler, swa_utils

from kfac_triton import KFAC

Scheduler = lr_scheduler.LRScheduler
SCHEDULERS: dict[str, Callable[[Optimizer], Scheduler]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3], 0.3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=8),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, step_size_up=2),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=2), lr_scheduler.CosineAnnealingLR(o, 4)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def _advance(scheduler: Scheduler) -> None:
    scheduler.step(*[1.0] * isinstance(scheduler, lr_scheduler.ReduceLROnPlateau))


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1, dtype=torch.float64)], ids=["number", "tensor"])
@pytest.mark.parametrize("tail", ["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str, tail: str, rate: float | Tensor) -> None:
    """The run in which lr, momentum and betas are set by hand, to what the scheduler makes of them for SGD, or AdamW."""
    dummy = [nn.Parameter(torch.ones(1))]
    theirs = torch.optim.SGD(dummy, 0.1, 0.9) if tail == "sgd" else torch.optim.AdamW(dummy, 0.1)
    schedule = SCHEDULERS[name](theirs)
    models = [net(), net()]
    ours, by_hand = (KFAC(m, lr=lr, damping=0.1, tail=tail) for m, lr in zip(models, (copy.deepcopy(rate), 0.1), strict=True))
    scheduler, seen = SCHEDULERS[name](ours), set()
    for step in range(7):
        values = {key: theirs.param_groups[0][key] for key in ("lr", "momentum" if tail == "sgd" else "betas")}
        by_hand.param_groups[0].update(values)
        seen.add(tuple(values.values()))
        for model, optimizer in zip(models, (ours, by_hand), strict=True):
            train(model, optimizer, 1, first=step)
        theirs.step()
        _advance(schedule)
        _advance(scheduler)
    assert len(seen) > 1
    assert isinstance(ours.param_groups[0]["lr"], Tensor) == isinstance(rate, Tensor)
    assert relative_error(vector(models[0]), vector(models[1])) <= 1e-12
