"""Copies and pickles of an optimizer: with the model they make a pair that goes on as the original does."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.runs import SETTINGS, backward, hooks, net, same_factors, train, vector
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


@pytest.mark.parametrize("way", WAYS)
def test_a_preconditioner_keeps_its_own_rate_and_its_closing(way: str) -> None:
    model = net()
    preconditioner = KFACPreconditioner(model, lr=0.37)
    twin, its = WAYS[way]((model, preconditioner))
    for one, face in ((model, preconditioner), (twin, its)):
        backward(one, 0)
        face.precondition_()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert its.diagnostics()["kl_clip_scale"] == preconditioner.diagnostics()["kl_clip_scale"] < 1
    preconditioner.close()
    twin, its = WAYS[way]((model, preconditioner))
    assert hooks(twin) == 0
    with pytest.raises(RuntimeError, match="closed"):
        its.precondition_()


def test_lr_auto_keeps_its_intervals_and_bounds() -> None:
    model = net(torch.float64)
    bounds = {"damping_every": 2, "damping_range": (1e-3, 1e3)}
    optimizer = KFAC(model, lr="auto", loss=nn.MSELoss(), damping=1.0, **bounds)
    train(model, optimizer, range(2))
    _twin, its = copy.deepcopy((model, optimizer))
    for face in (optimizer, its):
        controller = face._run.auto.controller
        assert (controller.damping_every, controller.damping_floor, controller.damping_ceiling) == (2, 1e-3, 1e3)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, range(2, 4))
    assert all(
        torch.equal(s["kfac_previous"], t["kfac_previous"])
        for s, t in zip(state["state"].values(), its.state_dict()["state"].values(), strict=True)
    )


def test_two_on_one_model_leave_each_other_alone() -> None:
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3))
    first, second = KFACPreconditioner(model), KFACPreconditioner(model)
    count = hooks(model)
    backward(model, 0)
    first.forget_statistics()
    assert all(s.counts.min() > 0 for s in second.engine.statistics)
    second.close()
    assert 0 < hooks(model) < count
    backward(model, 1)
    assert all(s.counts.min() > 0 for s in first.engine.statistics)


@pytest.mark.parametrize("way", WAYS)
def test_inert_hooks_go_with_all_that_was_noted_of_them(way: str) -> None:
    """In another process their number may be another hook's, which would be called with keywords then."""
    model = net()
    optimizer = KFAC(model)
    twin = WAYS[way](model)
    optimizer.close()
    its = KFAC(twin)
    for module in twin.modules():
        assert set(module._forward_hooks_with_kwargs) <= set(module._forward_hooks)
        assert set(module._forward_pre_hooks_with_kwargs) <= set(module._forward_pre_hooks)
    its.close()
    assert not any(m._forward_hooks or m._forward_hooks_with_kwargs or m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("way", WAYS)
def test_lr_auto_before_its_first_step_has_no_step_before(way: str) -> None:
    """What stands for it in a checkpoint is zero, and not a direction."""
    model = net(torch.float64)
    optimizer = KFAC(model, lr="auto", loss=nn.MSELoss(), damping=1.0)
    _, its = WAYS[way]((model, optimizer))
    its.load_state_dict(optimizer.state_dict())
    assert its._run.auto.controller.previous == [None] * len(list(model.parameters()))


def test_a_closed_one_follows_no_model() -> None:
    """Whether it moves, or more of it is trained."""
    model = net()
    model.head.weight.requires_grad_(False)
    optimizer = KFAC(model, list(model.parameters()))
    engine = optimizer.engine
    with optimizer.paused():
        optimizer.close()
    assert not engine.gate.open
    engine._devices = [torch.device("meta")] * len(engine.layers)
    model.head.weight.requires_grad_(True)
    optimizer.zero_grad()
    optimizer.state_dict()
    assert optimizer.engine is engine


def test_a_model_that_moved_leaves_no_statistics_in_the_old_place() -> None:
    model = net()
    preconditioner = KFACPreconditioner(model)
    for statistics in preconditioner.engine.statistics:
        statistics.device = torch.device("meta")
    backward(model, 0)
    assert all(s.counts.tolist() == [0, 0] for s in preconditioner.engine.statistics)


@pytest.mark.parametrize("name", ["CaptureHook", "CastHook"])
def test_a_pickle_names_hooks_by_their_chapter(name: str) -> None:
    """As those do that were written when the chapter was one file."""
    hook = pickle.loads(f"ckfac_triton.capture\n{name}\n(tR.".encode())
    assert type(hook).__name__ == name
    assert hook.statistics is None
