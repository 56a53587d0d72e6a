"""The engine: schedules, channel groups, shared stacks, the KL clip, types."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import backward_of_mlp, conv_net, mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.engine import Engine
from kfac_triton.settings import Settings


def _snapshot(engine: Engine) -> list[Tensor]:
    return [stack.factors.clone() for stack in engine.bank.stacks]


# Schedules


def test_statistics_every_and_inverse_every() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model, statistics_every=2, inverse_every=3)
    engine = preconditioner.engine
    updates, changed = [], []
    before = [i.values.clone() for i in engine.curvature.inverses]
    for step in range(7):
        backward_of_mlp(model, seed=step)
        preconditioner.precondition_()
        updates.append(int(engine.bank.updates[0]))
        changed.append(any(not torch.equal(a, b.values) for a, b in zip(before, engine.curvature.inverses, strict=True)))
        before = [i.values.clone() for i in engine.curvature.inverses]
    assert updates == [1, 1, 2, 2, 3, 3, 4]
    assert changed == [True, False, False, True, False, False, True]


def test_forward_passes_off_schedule_leave_no_statistics() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model, statistics_every=2)
    backward_of_mlp(model)
    preconditioner.precondition_()
    backward_of_mlp(model, seed=1)
    assert all(s.counts.tolist() == [0, 0] for s in preconditioner.engine.statistics)


def test_moving_average_is_the_weighted_mean_of_the_batches() -> None:
    model, decay = mlp(), 0.8
    preconditioner = KFACPreconditioner(model, ema_decay=decay)
    singles = []
    for seed in range(4):
        with preconditioner.paused(), KFACPreconditioner(model) as single:
            backward_of_mlp(model, seed)
            single.precondition_()
            singles.append(single.factors())
        backward_of_mlp(model, seed)
        preconditioner.precondition_()
    weights = [decay ** (3 - i) for i in range(4)]
    for name, pair in preconditioner.factors().items():
        for side in (0, 1):
            mean = sum(w * s[name][side] for w, s in zip(weights, singles, strict=True)) / sum(weights)
            assert relative_error(pair[side], mean) <= 1e-13


def test_a_step_without_statistics_changes_no_factor() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model)
    backward_of_mlp(model)
    preconditioner.precondition_()
    factors, updates = _snapshot(preconditioner.engine), preconditioner.engine.bank.updates.clone()
    preconditioner.precondition_()
    assert all(torch.equal(a, b) for a, b in zip(factors, _snapshot(preconditioner.engine), strict=True))
    assert torch.equal(updates, preconditioner.engine.bank.updates)


def test_first_statistics_after_a_fake_step_do_not_wait_for_their_inverse() -> None:
    """Some checkpoint tools take a step with zero gradients first; the next inverse would be ten steps away."""
    model = mlp()
    preconditioner = KFACPreconditioner(model, inverse_every=10, kl_clip=None)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.warns(UserWarning, match="no statistics came"):
        preconditioner.precondition_()
    backward_of_mlp(model)
    preconditioner.precondition_()
    result = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with KFACPreconditioner(model, kl_clip=None) as fresh:
        backward_of_mlp(model)
        fresh.precondition_()
    for value, p in zip(result, model.parameters(), strict=True):
        assert p.grad is not None
        assert relative_error(value, p.grad) <= 1e-12


def test_damping_can_be_changed_between_steps() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model, damping=1.0, kl_clip=None)
    backward_of_mlp(model)
    preconditioner.precondition_()
    preconditioner.change(damping=1e-3)
    backward_of_mlp(model)
    preconditioner.precondition_()
    with KFACPreconditioner(model, damping=1e-3, kl_clip=None) as fresh:
        expected = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        backward_of_mlp(model)
        fresh.precondition_()
    for value, p in zip(expected, model.parameters(), strict=True):
        assert p.grad is not None
        assert relative_error(value, p.grad) <= 1e-12


def test_a_bad_change_changes_nothing() -> None:
    preconditioner = KFACPreconditioner(mlp(), damping=0.5)
    with pytest.raises(ValueError, match=r"kl_clip must be .* but is -1"):
        preconditioner.change(damping=0.1, kl_clip=-1)
    assert preconditioner.engine.settings.damping == 0.5
    with pytest.raises(TypeError, match=r"dampening is not a setting; these can be changed: damping, "):
        preconditioner.change(dampening=0.1)
    with pytest.raises(TypeError, match="backend is fixed at construction: make a new optimizer"):
        preconditioner.change(damping=0.1, backend="torch")
    assert preconditioner.engine.settings.damping == 0.5


# Which layers


def test_models_without_a_layer_are_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="no layer that K-FAC covers"):
        Engine(nn.PReLU(4), Settings())
    frozen = nn.Sequential(nn.Linear(3, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="0: its weight is frozen"):
        Engine(frozen, Settings())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but is list; pass the model itself"):
        Engine([1], Settings())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="run one forward pass"):
        Engine(nn.LazyLinear(3), Settings())


def test_shared_parametrized_and_overridden_layers_are_left_out_with_a_reason() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.Linear(4, 4), Doubled(4, 4))
    model[1].weight = model[0].weight
    nn.utils.parametrizations.weight_norm(model[2])
    engine = Engine(model, Settings())
    assert [layer.name for layer in engine.layers] == ["3"]
    assert "shared" in engine.skipped["0"]
    assert "shared" in engine.skipped["1"]
    assert "parameter of its own" in engine.skipped["2"]


def test_linear_layers_that_share_a_weight_are_one_layer_called_twice() -> None:
    """Their own biases stay out of it, and train along their gradients."""
    torch.manual_seed(1)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    tied[2].weight = tied[0].weight
    shared = nn.Linear(4, 4, bias=False).double()
    shared.weight = tied[0].weight
    x = torch.randn(6, 4, dtype=torch.float64)
    with KFACPreconditioner(tied, kl_clip=None) as ours:
        tied(x).square().sum().backward()
        ours.precondition_()
        factors, update = ours.factors()["0"], tied[0].weight.grad
        bias = tied[2].bias.grad.clone()
    tied[0].weight.grad = None
    with KFACPreconditioner(shared, kl_clip=None) as twice:
        hidden = torch.tanh(shared(x) + tied[0].bias.detach())
        (shared(hidden) + tied[2].bias).square().sum().backward()
        twice.precondition_()
    for one, other in zip(factors, twice.factors()[""], strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(update, shared.weight.grad)
    torch.testing.assert_close(tied[2].bias.grad, 2 * bias)  # added to, never preconditioned


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_channel_groups_are_independent_blocks(groups: int) -> None:
    """A grouped convolution is preconditioned as that many separate convolutions."""
    conv = nn.Conv2d(4, 8, 3, padding=1, groups=groups).double()
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    whole = KFACPreconditioner(conv, damping=0.1, kl_clip=None)
    conv(x).square().mean().backward()
    whole.precondition_()

    parts = nn.ModuleList([nn.Conv2d(4 // groups, 8 // groups, 3, padding=1) for _ in range(groups)]).double()
    separate = KFACPreconditioner(parts, damping=0.1, kl_clip=None)
    outputs = []
    for i, part in enumerate(parts):
        rows = slice(i * (8 // groups), (i + 1) * (8 // groups))
        part.weight.data, part.bias.data = conv.weight.data[rows].clone(), conv.bias.data[rows].clone()
        outputs.append(part(x.chunk(groups, 1)[i]))
    torch.cat(outputs, 1).square().mean().backward()
    separate.precondition_()
    assert relative_error(conv.weight.grad, torch.cat([p.weight.grad for p in parts])) <= 1e-12
    assert relative_error(conv.bias.grad, torch.cat([p.bias.grad for p in parts])) <= 1e-12


def test_layers_of_one_shape_share_a_stack() -> None:
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(6)], nn.Linear(20, 5))
    engine = Engine(model, Settings())
    assert len(engine.bank.groups) == 2
    assert sorted(len(stack) for stack in engine.bank.stacks) == [1, 13]  # 21 and 20 both pad to 32, 5 to 16


# The KL clip


def test_kl_clip_bounds_the_quadratic_form_of_the_step() -> None:
    model, lr, kl_clip = mlp(), 0.7, 1e-4
    preconditioner = KFACPreconditioner(model, lr=lr, damping=1e-2, kl_clip=kl_clip)
    backward_of_mlp(model)
    raw = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    preconditioner.precondition_()
    nu = preconditioner.diagnostics()["kl_clip_scale"]
    assert 0 < nu < 1
    product = sum(float((p.grad * g).sum()) for p, g in zip(model.parameters(), raw, strict=True) if p.grad is not None)
    # the update is nu V: lr^2 nu^2 <V, grad> = kl_clip
    assert lr**2 * nu * product == pytest.approx(kl_clip, rel=1e-10)


def test_kl_clip_leaves_short_steps_alone() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model, lr=1e-6)
    backward_of_mlp(model)
    preconditioner.precondition_()
    assert preconditioner.diagnostics()["kl_clip_scale"] == 1.0


@pytest.mark.parametrize("make_model", [mlp, conv_net])
def test_float32_follows_float64(make_model: Callable[..., nn.Module]) -> None:
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = make_model(dtype)
        shape = (12, 5) if make_model is mlp else (12, 2, 9, 10)
        preconditioner = KFACPreconditioner(model, damping=1e-2)
        nn.functional.cross_entropy(model(torch.randn(shape).to(dtype)), torch.randint(4, (12,))).backward()
        preconditioner.precondition_()
        results.append([p.grad.double() for p in model.parameters() if p.grad is not None])
    for single, double in zip(*results, strict=True):
        assert relative_error(single, double) <= 1e-2


def test_bfloat16_model_has_float32_factors() -> None:
    model = nn.Linear(6, 4).to(torch.bfloat16)
    optimizer = KFAC(model, lr=0.1)
    model(torch.randn(8, 6, dtype=torch.bfloat16)).square().mean().backward()
    optimizer.step()
    assert all(side.dtype == torch.float32 for side in optimizer.factors()[""])
    assert model.weight.dtype == torch.bfloat16
    assert torch.isfinite(model.weight).all()
