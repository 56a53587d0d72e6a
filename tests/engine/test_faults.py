"""The engine under bad numbers and missing statistics."""

from __future__ import annotations

import warnings

import pytest
import torch
from support.helpers import backward_of_mlp, batch_for_mlp, mlp
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

# Bad numbers


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_a_bad_number_drops_that_layers_statistics_only(bad: float, where: str) -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model)
    engine = preconditioner.engine
    backward_of_mlp(model)
    preconditioner.precondition_()
    before = preconditioner.factors()

    x, y = batch_for_mlp(1)
    model.zero_grad()
    if where == "activation":
        handle = model[1].register_forward_hook(lambda m, args, out: out.index_fill(0, torch.tensor([3]), bad))
    else:
        # into the gradient of the second layer's output alone
        handle = model[2].register_forward_hook(lambda m, args, out: _poison(out, bad))
    nn.functional.cross_entropy(model(x), y).backward()
    handle.remove()
    clean = {"activation": "0", "gradient": "4"}[where]  # overwriting the activation also cuts its example off from layer 0
    preconditioner.precondition_()

    layers = preconditioner.diagnostics()["layers"]
    for name, pair in preconditioner.factors().items():
        assert all(torch.isfinite(side).all() for side in pair)
        if name == clean:
            assert layers[name]["dropped_statistics"] == 0
            assert not torch.equal(pair[0], before[name][0])
        else:
            assert layers[name]["dropped_statistics"] == 1
            assert layers[name]["updates"] == 1
            assert all(torch.equal(a, b) for a, b in zip(pair, before[name], strict=True))
    assert all(torch.isfinite(i.values).all() for i in engine.curvature.inverses)

    backward_of_mlp(model, seed=2)  # and the next good batch counts again, as if the bad one had not been
    preconditioner.precondition_()
    assert all(layer["updates"] >= 2 for layer in preconditioner.diagnostics()["layers"].values())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


class _Poison(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, bad: float) -> Tensor:
        ctx.bad = bad  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        gradient[0, 0] = ctx.bad  # type: ignore[attr-defined]
        return gradient, None


def _poison(x: Tensor, bad: float) -> Tensor:
    return _Poison.apply(x, bad)


def test_a_layer_with_a_bad_gradient_gets_no_update_and_stops_no_other() -> None:
    model = mlp()
    optimizer = KFAC(model, lr=0.1, momentum=0.0)
    backward_of_mlp(model)
    model[2].weight.grad[0, 0] = torch.nan
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    after = list(model.parameters())
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [True, True, False, False, True, True]
    assert all(torch.isfinite(p).all() for p in after)
    layers = optimizer.diagnostics()["layers"]
    assert [layer["dropped_gradients"] for layer in layers.values()] == [0, 1, 0]


def test_overflowing_statistics_are_dropped() -> None:
    model = nn.Linear(3, 2)
    preconditioner = KFACPreconditioner(model)
    model(torch.full((4, 3), 1e25)).sum().backward()  # finite, but its square is not
    preconditioner.precondition_()
    assert preconditioner.diagnostics()["layers"][""]["dropped_statistics"] == 1


# Missing statistics


def test_a_layer_that_never_runs_is_named_once_and_still_trains() -> None:
    idle = nn.Linear(8, 8)
    model = nn.ModuleDict({"idle": idle, "head": nn.Linear(8, 3)})
    optimizer = KFAC(model, lr=0.1, momentum=0.0, damping=0.1)
    before = idle.weight.detach().clone()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            x = torch.randn(4, 5, 8)
            model["head"](nn.functional.linear(x, idle.weight)).square().mean().backward()
            optimizer.step()
    messages = [str(w.message) for w in caught if "no statistics came" in str(w.message)]
    assert len(messages) == 1
    assert "'idle'" in messages[0]
    assert "'head'" not in messages[0]
    assert optimizer.diagnostics()["without_statistics"] == ["idle"]
    assert not torch.equal(idle.weight, before)


def test_a_layer_without_statistics_goes_along_its_raw_gradient() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizer = KFAC(model, lr=0.5, momentum=0.0)
    x = torch.randn(6, 3)
    before = model[1].weight.detach().clone()
    loss = model[0](x).square().mean() + nn.functional.linear(x, model[1].weight).square().mean()
    loss.backward()
    with pytest.warns(UserWarning, match="'1'"):
        optimizer.step()
    torch.testing.assert_close(model[1].weight, before - 0.5 * model[1].weight.grad)


def test_a_layer_that_no_example_reaches_keeps_its_factors() -> None:
    """A mixture of experts: this step's batch went to the other expert."""
    experts = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizer = KFAC(experts, lr=0.1)
    for expert in (0, 1, 0):
        optimizer.zero_grad()
        experts[expert](torch.randn(6, 3)).square().mean().backward()
        optimizer.step()
    updates = [layer["updates"] for layer in optimizer.diagnostics()["layers"].values()]
    assert updates == [2, 1]


def test_late_attachment_to_a_compiled_model_warns() -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    run = torch.compile(model, backend="aot_eager")
    run(torch.randn(6, 4)).sum().backward()
    optimizer = KFAC(model, lr=0.1)
    optimizer.zero_grad()
    run(torch.randn(6, 4)).sum().backward()
    with pytest.warns(UserWarning, match=r"make it first, or call torch.compiler.reset"):
        optimizer.step()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_diagonal_factors_recover_from_a_bad_step(bad: float) -> None:
    """The sum that a bad step left is not read by the next one: nothing times zero is nothing, but of NaN it is NaN."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    ours = KFACPreconditioner(model, damping=0.1, oversize="diagonal", max_factor_size=3)
    for step in range(3):
        x = torch.randn(6, 3, dtype=torch.float64)
        if step == 1:
            x[2, 1] = bad
        model.zero_grad()
        model(x).square().mean().backward()
        ours.precondition_()
    layers = ours.diagnostics()["layers"]
    assert all(layer["dropped_statistics"] == 1 and layer["updates"] == 2 for layer in layers.values())
    assert all(side.isfinite().all() for pair in ours.factors().values() for side in pair)
    assert all(p.grad.isfinite().all() for p in model.parameters())
