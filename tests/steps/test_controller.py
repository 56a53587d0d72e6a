"""The controller: exact steps on quadratic problems, Levenberg-Marquardt, rejections that leave no trace."""

from __future__ import annotations

import pytest
import torch
from support.controllers import Gradients, Run, curvature_of, flat, gradient_of, regression, spoiling
from support.helpers import batch_for_mlp, mlp, relative_error
from torch import Tensor, nn

from kfac_triton.steps.controller import REJECTION_FACTOR
from kfac_triton.steps.forward_mode import jacobian_products


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

    run.auto.loss = weakened
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
