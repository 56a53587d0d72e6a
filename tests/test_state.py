"""state_dict and load_state_dict with factors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import mlp
from torch import Tensor, nn

from kfac_triton import KFAC


def _model(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3), nn.LayerNorm(3)).to(dtype)


def _step(model: nn.Module, optimizer: KFAC, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 2, 6, generator=generator).to(next(model.parameters()).dtype)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def _vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_resumed_run_is_the_uninterrupted_one(dtype: torch.dtype) -> None:
    """Bit for bit, through torch.save and a load that allows plain values only; inverses are made anew from the factors."""
    model = _model(dtype)
    optimizer = KFAC(model, lr=0.1, statistics_every=2)
    for seed in range(5):
        _step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for seed in range(5, 9):
        _step(model, optimizer, seed)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = _model(dtype)
    resumed.load_state_dict(saved["model"])
    fresh = KFAC(resumed, lr=0.7, statistics_every=2)
    fresh.load_state_dict(saved["optimizer"])
    assert all(side.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) for side in fresh.factors()["3"])
    for seed in range(5, 9):
        _step(resumed, fresh, seed)
    assert torch.equal(_vector(resumed), _vector(model))
    assert fresh.diagnostics()["steps"] == 9


def test_a_checkpoint_of_another_shape_or_with_nan_changes_nothing() -> None:
    model = mlp()
    optimizer = KFAC(model, lr=0.1)
    before = optimizer.factors()
    for damage, message in ((lambda a: a[:, :2, :2], "must have shape"), (lambda a: a * torch.nan, "not finite")):
        state = KFAC(mlp(), lr=0.7).state_dict()
        state["state"][2]["kfac_A"] = damage(state["state"][2]["kfac_A"])
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        after = optimizer.factors()
        assert all(torch.equal(a, b) for name in before for a, b in zip(before[name], after[name], strict=True))
        assert optimizer.param_groups[0]["lr"] == 0.1


def test_state_dict_is_a_copy_of_the_factors() -> None:
    model = _model(torch.float32)
    optimizer = KFAC(model, lr=0.1)
    _step(model, optimizer, 0)
    saved = optimizer.state_dict()["state"][0]["kfac_A"]
    before = saved.clone()
    _step(model, optimizer, 1)
    assert torch.equal(saved, before)


def _stepped(steps: int) -> tuple[nn.Module, KFAC]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    optimizer = KFAC(model, damping=lambda step: 0.1 * (step + 1), statistics_every=2)
    _steps(model, optimizer, range(steps))
    return model, optimizer


def _steps(model: nn.Module, optimizer: KFAC, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def test_a_checkpoint_without_factors_is_small_and_goes_on_with_the_step() -> None:
    """Momentum, schedule and intervals go on; factors begin anew with the next statistics."""
    model, optimizer = _stepped(3)
    small, whole = optimizer.state_dict(include_factors=False), optimizer.state_dict()
    assert not any(key in ("kfac_A", "kfac_G") for values in small["state"].values() for key in values)
    assert any("kfac_A" in values for values in whole["state"].values())
    other, resumed = _stepped(0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(small))
    assert resumed.engine.steps == 3
    assert not resumed.engine.gate.open  # statistics come in step 4
    assert (resumed.engine.bank.updates == 0).all()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], resumed.state[q]["momentum_buffer"])
    _steps(other, resumed, range(3, 5))
    assert resumed.diagnostics()["damping"] == pytest.approx(0.5)
    assert resumed.diagnostics()["layers"]["0"]["updates"] == 1


def test_a_checkpoint_of_a_newer_format_is_refused_and_changes_nothing() -> None:
    _, optimizer = _stepped(2)
    saved = copy.deepcopy(optimizer.state_dict())
    for values in saved["state"].values():
        if "kfac_format" in values:
            values["kfac_format"] += 1
    before, step = optimizer.factors(), optimizer.engine.steps
    with pytest.raises(ValueError, match=r"is of format 2, and this version .* reads formats up to 1; install a newer"):
        optimizer.load_state_dict(saved)
    assert optimizer.engine.steps == step
    for name, pair in optimizer.factors().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))


def test_a_checkpoint_without_a_format_is_of_the_first() -> None:
    _, optimizer = _stepped(2)
    saved = copy.deepcopy(optimizer.state_dict())
    for values in saved["state"].values():
        values.pop("kfac_format", None)
    _, other = _stepped(0)
    other.load_state_dict(saved)
    for name, pair in optimizer.factors().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, other.factors()[name], strict=True))
