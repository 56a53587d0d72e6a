"""state_dict and load_state_dict with factors."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from support.helpers import mlp
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.steps import param_groups


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
    assert resumed.engine.progress.steps == 3
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
    before, step = optimizer.factors(), optimizer.engine.progress.steps
    with pytest.raises(ValueError, match=r"has format 2, but this version .* reads formats up to 1; install a newer one"):
        optimizer.load_state_dict(saved)
    assert optimizer.engine.progress.steps == step
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


def test_a_checkpoint_from_before_the_first_statistics_says_that_there_are_none() -> None:
    """Gradients without any are used as they are; a damping alone would scale them up."""
    model, start = mlp(), mlp()
    optimizer = KFAC(model, lr=0.1, momentum=0.0, kl_clip=None)
    optimizer.load_state_dict(KFAC(start, lr=0.1, momentum=0.0, kl_clip=None).state_dict())
    with optimizer.paused():
        model(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
    expected = [p.detach() - 0.1 * p.grad for p in model.parameters()]
    with pytest.warns(UserWarning, match="no statistics came"):
        optimizer.step()
    for p, value in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("key", ["kfac_A", "kfac_G", "kfac_basis_A", "kfac_moments", "kfac_refreshed"])
def test_a_checkpoint_with_an_infinite_number_is_refused(key: str, bad: float) -> None:
    """But for a residual, which is infinite where there is no inverse yet."""
    model = mlp()
    optimizer = KFAC(model, curvature="ekfac")
    saved = optimizer.state_dict()
    assert torch.isinf(saved["state"][0]["kfac_certificates"]).any()
    optimizer.load_state_dict(saved)
    saved["state"][0][key].view(-1)[0] = bad
    with pytest.raises(ValueError, match=f"{key} of layer '0' has values that are not finite"):
        optimizer.load_state_dict(saved)


def test_one_weight_of_a_newer_format_is_enough_to_be_refused() -> None:
    _, optimizer = _stepped(1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2]["kfac_format"] += 1
    with pytest.raises(ValueError, match="has format 2"):
        optimizer.load_state_dict(saved)


@pytest.mark.parametrize("auto", [False, True])
def test_what_is_announced_in_the_state_is_what_the_state_dict_has(auto: bool) -> None:
    """Checkpoint tools load nothing else. A change of settings, or of what is trained, is followed."""
    model = mlp()
    model[0].requires_grad_(False)
    settings = {"lr": "auto", "loss": nn.CrossEntropyLoss()} if auto else {"lr": 0.1}
    optimizer = KFAC(model, list(model.parameters()), inverse="cholesky", **settings)

    def keys() -> list[set[str]]:
        saved = optimizer.state_dict()["state"]
        assert [set(optimizer.state[p]) for p in model.parameters()] == [set(saved[i]) for i in range(6)]
        return [set(saved[i]) for i in range(6)]

    plain = keys()
    assert "kfac_inverse_A" not in plain[2]
    optimizer.change(inverse_every=3)
    assert "kfac_inverse_A" in keys()[2]
    optimizer.change(inverse_every=1)
    assert keys() == plain
    model[0].requires_grad_(True)
    optimizer.zero_grad()
    assert "kfac_A" in keys()[0]
    optimizer.load_state_dict(optimizer.state_dict(include_factors=False))
    assert keys()[2:] == plain[2:]


def test_state_follows_a_parameter_and_leaves_the_one_before() -> None:
    old, new, last = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = torch.optim.SGD([old, last], lr=0.1)
    optimizer.state[old]["momentum_buffer"] = torch.ones(2)
    optimizer.param_groups[0]["params"][0] = new
    now = param_groups.rekey_swapped(optimizer, [old, last])
    assert [id(p) for p in now] == [id(new), id(last)]
    assert set(optimizer.state) == {new}  # and none made up for one that had no state


@pytest.mark.parametrize("capturable", [False, True])
def test_state_follows_to_another_device_but_for_counters_of_the_host(capturable: bool) -> None:
    """A counter that is to be part of a recorded graph goes along, too."""
    p = nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.Adam([p], capturable=capturable)
    optimizer.state[p].update(step=torch.zeros(()), exp_avg=torch.ones(2), name=None)
    param_groups.move_state(optimizer)
    assert optimizer.state[p]["step"].device.type == ("meta" if capturable else "cpu")
    assert optimizer.state[p]["exp_avg"].device.type == "meta"


@pytest.mark.parametrize("auto", [False, True])
def test_an_empty_dict_stands_for_what_a_checkpoint_lacks(auto: bool) -> None:
    """Flat distributed checkpoints have it so; the tail's own state begins at zero then, and factors anew."""
    settings = {"lr": "auto", "loss": nn.CrossEntropyLoss()} if auto else {"lr": 0.1}
    saved = KFAC(mlp(), **settings).state_dict()
    for values in saved["state"].values():
        values.update({key: {} for key in values if key != "step"})
    model = mlp()
    optimizer = KFAC(model, **settings)
    optimizer.load_state_dict(saved)
    assert optimizer.engine.progress.steps == 0
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in model.parameters())
    assert all((side == 0).all() for pair in optimizer.factors().values() for side in pair)


def test_a_preconditioners_step_goes_on_whatever_layers_are_saved() -> None:
    preconditioner = KFACPreconditioner(mlp())
    saved = preconditioner.state_dict()
    with pytest.raises(ValueError, match="has format 2"):
        preconditioner.load_state_dict({**saved, "kfac_format": 2, "kfac_steps": 9})
    assert preconditioner.engine.progress.steps == 0
    preconditioner.load_state_dict({**saved, "kfac_steps": 9, "layers": {}})
    assert preconditioner.engine.progress.steps == 9


def test_a_layer_of_another_size_begins_anew_and_the_others_go_on() -> None:
    """Its bias is trained from now on; what was not given is not covered."""
    model = mlp()
    model[0].bias.requires_grad_(False)
    optimizer = KFAC(model, [model[0].weight, *model[2].parameters()], lr=0.1)
    x = torch.randn(8, 5, dtype=torch.float64)
    for bias in (False, True):
        if bias:
            before = optimizer.factors()
            model[0].bias.requires_grad_(True)
            optimizer.add_param_group({"params": [model[0].bias]})
            assert optimizer.engine.progress.steps == 1
            assert torch.equal(optimizer.factors()["2"][0], before["2"][0])
            assert optimizer.engine.progress.without_statistics == {0}
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert set(optimizer.factors()) == {"0", "2"}
        ones = torch.cat([x, torch.ones(8, 1, dtype=torch.float64)], 1) if bias else x
        torch.testing.assert_close(optimizer.factors()["0"][0], ones.mT @ ones / 8)


def test_steps_go_on_where_no_layer_does() -> None:
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    optimizer = KFAC(model, [model.weight], lr=0.1)
    _steps(model, optimizer, range(3))
    model.bias.requires_grad_(True)
    optimizer.add_param_group({"params": [model.bias]})
    assert optimizer.engine.progress.steps == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certificates_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = _model(dtype)
    optimizer, other = KFAC(model, lr=0.1, inverse_every=3), KFAC(_model(dtype), lr=0.1, inverse_every=3)
    _step(model, optimizer, 0)
    other.load_state_dict(optimizer.state_dict())
    for (one, _), (its, _) in zip(optimizer.engine.curvature.inverse_at, other.engine.curvature.inverse_at, strict=True):
        assert torch.equal(one.damping, its.damping)
        assert torch.equal(one.residual, its.residual)
        assert (one.damping > 0).any()
    assert optimizer.engine.progress.damping == other.engine.progress.damping


def test_of_a_layer_that_is_left_out_now_nothing_stays() -> None:
    model = mlp()
    optimizer = KFAC(model, skip="0")
    optimizer.load_state_dict(KFAC(mlp()).state_dict())
    assert set(optimizer.state[model[0].weight]) == {"step", "momentum_buffer"}
    assert set(optimizer.state_dict()["state"][0]) == {"step", "momentum_buffer"}


def test_layers_behind_one_that_is_not_saved_are_checked() -> None:
    preconditioner = KFACPreconditioner(mlp())
    saved = preconditioner.state_dict()
    del saved["layers"]["0"]
    preconditioner.load_state_dict(saved)
    saved["layers"]["4"]["kfac_A"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="kfac_A of layer '4' has values that are not finite"):
        preconditioner.load_state_dict(saved)


@pytest.mark.parametrize("key", ["kfac_A", "kfac_G"])
def test_a_factor_without_the_other_is_refused(key: str) -> None:
    _, optimizer = _stepped(1)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][0][key]
    with pytest.raises(ValueError, match=f"has no {key} of layer '0'"):
        optimizer.load_state_dict(saved)
