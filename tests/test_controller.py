"""The controller: exact steps on quadratic problems, Levenberg-Marquardt, rejections that leave no trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from helpers import batch_for_mlp, mlp, relative_error
from torch import Tensor, nn

from kfac_triton.controller import REJECTION_FACTOR, Controller
from kfac_triton.losses import likelihood_of
from kfac_triton.quadratic import jacobian_products

Gradients = list[Tensor | None]


class Run:
    """A controller with plain gradients in place of the engine: V = h for the first `covered` parameters."""

    def __init__(self, model: nn.Module, batch: Any, loss: nn.Module, covered: int | None = None, **options: Any) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.parameters = list(model.parameters())
        self.covered = len(self.parameters) if covered is None else covered
        self.controller = Controller(model, self.parameters, loss, likelihood_of(loss), **options)
        self.dampings: list[float] = []
        self.calls = 0

    def evaluate(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.model(self.batch[0]), self.batch[1]

    def differentiate(self, outputs: Tensor, targets: Tensor, loss: Tensor) -> Gradients:
        return list(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def precondition(self, gradient: Gradients, damping: float) -> Gradients:
        self.dampings.append(damping)
        return [g if i < self.covered else None for i, g in enumerate(gradient)]

    def step(self, **options: Any) -> dict[str, Any]:
        return self.controller.step(self.evaluate, self.differentiate, self.precondition, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def loss_of(run: Run) -> Tensor:
    return run.loss(run.model(run.batch[0]), run.batch[1])


def gradient_of(run: Run) -> Tensor:
    return flat(torch.autograd.grad(loss_of(run), run.parameters))


def regression(reduction: str = "mean") -> tuple[nn.Linear, tuple[Tensor, Tensor], nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    return model, (x, torch.randn(20, 2, dtype=torch.float64)), nn.MSELoss(reduction=reduction)


def curvature_of(run: Run) -> Tensor:
    """The dense Hessian of a regression's loss."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(run), run.parameters, create_graph=True)])
    return torch.stack([flat(torch.autograd.grad(g, run.parameters, retain_graph=True)) for g in gradient])


def bn_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 4)).double()


def spoiling(run: Run, value: float = 1e3) -> Callable[[], tuple[Tensor, Tensor]]:
    """A closure whose outputs are off as soon as a parameter has moved, which its derivatives do not show."""
    before, plain = flat(run.parameters).clone(), run.evaluate

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs, targets = plain()
        moved = all(type(p) is nn.Parameter for p in run.model.parameters()) and not torch.equal(flat(run.parameters), before)
        return (outputs * value if moved else outputs), targets

    return evaluate


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_newton_direction_finds_the_minimizer_in_one_step(reduction: str) -> None:
    model, batch, loss = regression(reduction)
    run = Run(model, batch, loss, damping=1e-8)
    H = curvature_of(run)

    def newton(gradient: Gradients, damping: float) -> Gradients:
        v = torch.linalg.solve(H, flat(gradient)) * 7  # of any length: alpha makes up for it
        return [t.view_as(g) for t, g in zip(v.split([g.numel() for g in gradient]), gradient, strict=True)]

    run.precondition = newton
    report = run.step()
    design = torch.cat([batch[0], torch.ones(20, 1, dtype=torch.float64)], 1)
    truth = torch.linalg.lstsq(design, batch[1]).solution.T
    assert relative_error(torch.cat([model.weight, model.bias[:, None]], 1), truth) < 1e-6
    assert report["lr"] == pytest.approx(1 / 7, rel=1e-6)
    assert report["reduction_ratio"] == pytest.approx(1, rel=1e-6)
    assert float(loss(model(batch[0]), batch[1]) - report["loss"]) == pytest.approx(report["predicted"], rel=1e-6)
    assert not report["rejected"]
    assert run.calls == 3  # the gradient, one direction, the new loss


def test_steps_with_momentum_are_conjugate_gradients() -> None:
    run = Run(*regression(), damping=1e-12, damping_floor=1e-12)
    H, theta = curvature_of(run), flat(run.parameters)
    residual = -gradient_of(run)
    direction = residual
    for k in range(6):
        alpha = residual @ residual / (direction @ H @ direction)
        theta = theta + alpha * direction
        new = residual - alpha * (H @ direction)
        direction = new + (new @ new) / (residual @ residual) * direction
        residual = new
        report = run.step()
        assert relative_error(flat(run.parameters), theta) < 1e-9
        assert (report["momentum"] > 0) == (k > 0)
    assert run.calls == 3 + 5 * 4


def test_three_directions_are_combined_best() -> None:
    model, batch = mlp(), batch_for_mlp()
    run = Run(model, batch, nn.CrossEntropyLoss(), covered=4, damping=0.01)
    first = run.step()
    assert first["lr"] > 0
    assert first["lr_others"] > 0
    assert first["momentum"] == 0
    theta, previous = flat(run.parameters), flat([d for d in run.controller.previous if d is not None])
    h = gradient_of(run)
    count = sum(p.numel() for p in run.parameters[:4])
    p = model(batch[0]).detach().softmax(-1)
    D = torch.stack([torch.cat([-h[:count], 0 * h[count:]]), torch.cat([0 * h[:count], -h[count:]]), previous])
    parts = [
        [t.view_as(q) for t, q in zip(d.split([q.numel() for q in run.parameters]), run.parameters, strict=True)] for d in D
    ]
    J = torch.stack(jacobian_products(model, run.evaluate, run.parameters, parts))
    B = torch.einsum("inc,ncd,jnd->ij", J, p.diag_embed() - p[:, :, None] * p[:, None], J) / 12 + 0.01 * D @ D.T
    second = run.step()
    c = torch.tensor([second[k] for k in ("lr", "lr_others", "momentum")], dtype=torch.float64)
    assert relative_error(flat(run.parameters) - theta, c @ D) < 1e-12

    def change(c: Tensor) -> Tensor:
        return c @ D @ h + c @ B @ c / 2

    assert float(change(c)) == pytest.approx(second["predicted"], rel=1e-5)
    assert all(change(c * scale) > change(c) for scale in 1 + 0.05 * torch.cat([torch.eye(3), -torch.eye(3)]).double())


def test_a_sum_takes_the_same_steps_as_a_mean() -> None:
    ends, ratios = [], []
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        eta = 0.3 if reduction == "mean" else 0.3 * 12
        loss = nn.CrossEntropyLoss(reduction=reduction)
        run = Run(mlp(), batch_for_mlp(), loss, covered=4, damping=0.1, weight_decay=eta)
        ratios.append([run.step()["reduction_ratio"] for _ in range(4)])
        ends.append(flat(run.parameters))
        assert run.dampings == [pytest.approx(0.4)] * 4
    assert relative_error(*ends) < 1e-9
    assert ratios[0] == pytest.approx(ratios[1])


def test_weight_decay_is_in_gradient_curvature_and_objective() -> None:
    run = Run(*regression(), damping=1e-9, damping_floor=1e-9, weight_decay=[0.7, 0.2])
    eta = torch.tensor([0.7] * 8 + [0.2] * 2, dtype=torch.float64)
    theta, H = flat(run.parameters), curvature_of(run) + eta.diag()
    h = gradient_of(run) + eta * theta
    report = run.step()
    assert relative_error(flat(run.parameters), theta - h @ h / (h @ H @ h) * h) < 1e-7
    assert report["reduction_ratio"] == pytest.approx(1, rel=1e-6)
    assert run.dampings == [pytest.approx(1e-9 + (8 * 0.7 + 2 * 0.2) / 10)]


@pytest.mark.parametrize(("scale", "change"), [(1.0, 0.95**5), (0.001, 1 / 0.95**5), (0.5, 1.0)])
def test_levenberg_marquardt(scale: float, change: float) -> None:
    """A closure whose steps do only a part of what the model promises, by a loss that moves back to the old one."""
    model, batch, loss = regression()
    run = Run(model, batch, loss, damping=0.1)
    current: list[Tensor] = []

    def weakened(outputs: Tensor, targets: Tensor) -> Tensor:
        value = loss(outputs, targets)
        if outputs.requires_grad or not current:
            current[:] = [value.detach()]
            return value
        return current[0] + scale * (value - current[0])

    run.controller.loss = weakened
    for k in range(1, 11):
        before = run.controller.damping
        report = run.step()
        assert report["damping"] == pytest.approx(before * (change if k % 5 == 0 else 1.0), rel=1e-12)
        assert not report["rejected"]


def test_damping_stays_between_floor_and_ceiling() -> None:
    model, batch, loss = regression()
    run = Run(model, batch, loss, damping=1.0, damping_floor=0.9, damping_every=1)
    assert [run.step()["damping"] for _ in range(3)] == [0.95, 0.9025, 0.9]
    rejecting = Run(model, batch, loss, damping=1.0, damping_ceiling=REJECTION_FACTOR * 2)
    rejecting.evaluate = spoiling(rejecting)
    assert [rejecting.step()["damping"] for _ in range(2)] == [REJECTION_FACTOR, REJECTION_FACTOR * 2]
    assert Run(model, batch, loss, damping=10.0, damping_ceiling=5.0).controller.damping == 5.0


@pytest.mark.parametrize("value", [1e3, math.nan, math.inf])
def test_a_rejected_step_leaves_no_trace(value: float) -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), covered=2, damping=0.1)
    run.step()
    assert run.step()["momentum"] != 0
    before = snapshot(run.model)
    report = run.controller.step(spoiling(run, value), run.differentiate, run.precondition)
    assert report["rejected"]
    assert unchanged(run.model, before)
    assert report["damping"] == 0.1 * REJECTION_FACTOR
    assert run.controller.rejected == 1
    after = run.step()
    assert not after["rejected"]
    assert after["momentum"] == 0
    assert run.step()["momentum"] != 0


def test_a_closure_that_raises_at_the_new_point_leaves_no_trace() -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss())
    before = snapshot(run.model)
    evaluate = spoiling(run)

    def broken() -> tuple[Tensor, Tensor]:
        outputs, targets = evaluate()
        if float(outputs.detach().abs().max()) > 100:
            raise KeyError("no memory")
        return outputs, targets

    with pytest.raises(KeyError, match="no memory"):
        run.controller.step(broken, run.differentiate, run.precondition)
    assert unchanged(run.model, before)


def test_a_rise_within_rounding_is_no_reason_to_reject() -> None:
    run = Run(*regression(), damping=1e-12, damping_floor=1e-12)
    for _ in range(40):  # conjugate gradients are at the minimum after ten
        report = run.step()
        assert not report["rejected"]
    assert math.isnan(report["reduction_ratio"])


def test_statistics_and_random_numbers_advance_once_a_step() -> None:
    run, plain = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), damping=0.1), bn_net()
    torch.manual_seed(3)
    plain(batch_for_mlp()[0])
    torch.rand(5)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    masks: list[Tensor] = []
    backward = run.differentiate
    run.differentiate = lambda *a: [torch.rand(5), *backward(*a)][1:]  # draws, as for labels
    run.model[3].register_forward_hook(lambda module, args, output: masks.append(output.detach() == 0))
    assert not run.step()["rejected"]
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(run.model.state_dict()[f"1.{key}"], plain.state_dict()[f"1.{key}"])
    assert len(masks) == 3
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0].any()


def test_hooks_are_paused_except_in_the_first_pass() -> None:
    run = Run(*regression())
    inside, depth, losses = list[bool](), [0], list[int]()

    @contextmanager
    def paused() -> Any:
        depth[0] += 1
        yield
        depth[0] -= 1

    run.model.register_forward_hook(lambda *_: inside.append(depth[0] > 0))
    run.loss.register_forward_hook(lambda *_: losses.append(0))
    run.step(paused=paused)
    assert len(losses) == 3  # old, new, and the derivative that is checked in the first step
    run.step(paused=paused)
    assert len(losses) == 5
    assert inside == [False, True, True, False, True, True, True]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(where: str) -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), damping=0.1)
    run.step()
    before, state = snapshot(run.model), run.controller.state()
    asked = len(run.dampings)
    if where == "loss":
        run.batch = (run.batch[0] * math.nan, run.batch[1])
    else:
        run.differentiate = lambda *_: [torch.full_like(p, math.inf) for p in run.parameters]
    report = run.step()
    assert report["skipped"]
    assert not report["rejected"]
    assert unchanged(run.model, before)
    assert run.controller.state() == {**state, "skipped": 1}
    assert len(run.dampings) == asked


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_without_terms_changes_nothing(reduction: str) -> None:
    x, y = batch_for_mlp()
    run = Run(mlp(), (x, torch.full_like(y, -100)), nn.CrossEntropyLoss(reduction=reduction))
    before = snapshot(run.model)
    assert run.step()["skipped"]
    assert unchanged(run.model, before)


def test_a_preconditioner_that_is_not_finite_is_a_rejection() -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), damping=0.1)
    run.precondition = lambda h, damping: [g * math.nan for g in h]
    before = snapshot(run.model)
    assert run.step()["rejected"]
    assert unchanged(run.model, before)


def test_a_zero_gradient_moves_nothing() -> None:
    model, (x, _), loss = regression()
    run = Run(model, (x, model(x).detach()), loss)
    before = snapshot(model)
    report = run.step()
    assert unchanged(model, before)
    assert (report["predicted"], report["rejected"], report["lr"]) == (0, False, 0)
    assert math.isnan(report["reduction_ratio"])


def test_a_parameter_without_gradient_stays() -> None:
    model, batch = mlp(), batch_for_mlp()
    run = Run(model, batch, nn.CrossEntropyLoss(), weight_decay=0.1)
    run.step()
    plain = run.differentiate
    run.differentiate = lambda *a: [None, *plain(*a)[1:]]
    before = model[0].weight.detach().clone()
    report = run.step()
    assert torch.equal(model[0].weight, before)
    assert not report["rejected"]
    run.differentiate = lambda *_: [None] * 6
    whole = snapshot(model)
    assert run.step()["predicted"] == 0
    assert unchanged(model, whole)


def test_a_checkpoint_goes_on_as_if_nothing_had_happened() -> None:
    def make() -> Run:
        torch.manual_seed(0)
        return Run(mlp(), batch_for_mlp(), nn.CrossEntropyLoss(), covered=4, damping=0.1)

    whole, first, second = make(), make(), make()
    for _ in range(7):
        whole.step()
    for _ in range(5):
        first.step()
    second.model.load_state_dict(first.model.state_dict())
    second.controller.load(first.controller.state())
    for _ in range(2):
        second.step()
    assert torch.equal(flat(second.parameters), flat(whole.parameters))
    assert second.controller.damping == whole.controller.damping == 0.1 * 0.95**5
    with pytest.raises(ValueError, match="lacks damping"):
        second.controller.load({k: v for k, v in first.controller.state().items() if k != "damping"})
    state = first.controller.state() | {"previous": [torch.ones(1)] * 6, "damping": 3.0}
    with pytest.raises(ValueError, match="same model"):
        second.controller.load(state)
    assert second.controller.damping == whole.controller.damping


def test_bad_closures_are_told_what_to_return() -> None:
    run = Run(*regression())
    x, y = run.batch
    with pytest.raises(TypeError, match=r"closure must return \(outputs, targets\)"):
        run.controller.step(lambda: run.model(x), run.differentiate, run.precondition)
    with pytest.raises(ValueError, match="without a graph"):
        run.controller.step(lambda: (run.model(x).detach(), y), run.differentiate, run.precondition)
    batches = iter(torch.randn(9, 20, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="same batch each time"):
        run.controller.step(lambda: (run.model(next(batches)), y), run.differentiate, run.precondition)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"damping": 0.0}, ValueError, "damping must be finite and greater than 0"),
        ({"damping_every": 0}, ValueError, "damping_every must be at least 1"),
        ({"damping_floor": 0.0}, ValueError, "damping_floor"),
        ({"damping_floor": 1.0, "damping_ceiling": 0.5}, ValueError, "damping_ceiling"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"weight_decay": [0.1]}, ValueError, "one for each of 2 parameters, but has 1"),
        ({"damping": "high"}, TypeError, "damping must be a real number"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Run(*regression(), **options)


def test_training_with_float32_reaches_a_low_loss() -> None:
    run = Run(mlp(torch.float32), batch_for_mlp(), nn.CrossEntropyLoss())
    run.batch = (run.batch[0].float(), run.batch[1])
    reports = [run.step() for _ in range(150)]
    assert float(reports[-1]["loss"]) < 0.05 * float(reports[0]["loss"])
    assert sum(r["rejected"] for r in reports) < 15
