"""Copies and pickles of an optimizer: with the model they make a pair that goes on as the original does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from runs import SETTINGS, hooks, net, same_factors, train, vector
from torch import nn

from kfac_triton import KFAC, KFACPreconditioner

WAYS: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x))}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_a_pair_goes_on_as_the_original(way: str, settings: dict[str, Any]) -> None:
    model = net()
    optimizer = KFAC(model, **{"lr": 0.1, **settings})
    train(model, optimizer, range(4))
    twin, its = WAYS[way]((model, optimizer))
    assert hooks(twin) == hooks(model)
    before = vector(twin)
    train(model, optimizer, range(4, 8))
    assert torch.equal(vector(twin), before)  # nothing is shared
    train(twin, its, range(4, 8))
    assert torch.equal(vector(twin), vector(model))
    assert same_factors(optimizer, its)


@pytest.mark.parametrize("way", WAYS)
def test_lr_auto_goes_on_as_the_original(way: str) -> None:
    model = net(torch.float64)
    optimizer = KFAC(model, lr="auto", loss=nn.MSELoss(), damping=1.0, damping_every=2)
    train(model, optimizer, range(3))
    twin, its = WAYS[way]((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(twin, its, range(3, 6))
    assert torch.equal(vector(twin), vector(model))
    assert its.diagnostics()["damping"] == optimizer.diagnostics()["damping"] != 1.0


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_alone_brings_a_model_of_its_own(way: str) -> None:
    """As a copy of AdamW has parameters of its own."""
    model = net()
    optimizer = KFAC(model, lr=0.1)
    train(model, optimizer, range(2))
    before, count = vector(model), hooks(model)
    its = WAYS[way](optimizer)
    params = [p for group in its.param_groups for p in group["params"]]
    assert not {id(p) for p in params} & {id(p) for p in model.parameters()}
    for p in params:
        p.grad = torch.ones_like(p)
    its.step()
    assert torch.equal(vector(model), before)
    assert hooks(model) == count
    assert all(not torch.equal(p, q) for p, q in zip(params, model.parameters(), strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_preconditioner_comes_with_its_optimizer(way: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    preconditioner = KFACPreconditioner(model, inverse_every=3)
    preconditioner.attach(optimizer)
    train(model, optimizer, range(4))
    twin, its, its_preconditioner = WAYS[way]((model, optimizer, preconditioner))
    train(model, optimizer, range(4, 8))
    train(twin, its, range(4, 8))
    assert torch.equal(vector(twin), vector(model))
    assert same_factors(preconditioner, its_preconditioner)


def test_a_copy_of_a_closed_optimizer_is_closed() -> None:
    model = net()
    optimizer = KFAC(model)
    optimizer.close()
    twin, its = copy.deepcopy((model, optimizer))
    assert hooks(twin) == 0
    with pytest.raises(RuntimeError, match="closed"):
        its.step()


def test_settings_come_along() -> None:
    model = net()
    optimizer = KFAC(model, damping=0.5, kl_clip=None, skip="conv", stats_fraction=0.5)
    optimizer.change(ema_decay=0.3)
    its = copy.deepcopy(optimizer)
    assert its.engine.settings == optimizer.engine.settings
    assert its.diagnostics()["skipped"] == optimizer.diagnostics()["skipped"]


def test_copies_of_a_copied_model_keep_one_hook_a_layer() -> None:
    """The inert hooks that copying leaves behind do not pile up."""
    model = net()
    count = 0
    for _ in range(3):
        optimizer = KFAC(model)
        count = count or hooks(model)
        assert hooks(model) == count
        model = copy.deepcopy(model)
        del optimizer
