"""lr="auto" with losses of derivatives by the input, which the closure takes by autograd.grad: PINNs, force fields."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from kfac_triton import KFAC
from kfac_triton.steps import auto
from kfac_triton.steps.forward_mode import jacobian_products

Closure = Callable[[], tuple[Tensor, Tensor]]
Problem = tuple[nn.Module, Closure]


def _gradient(u: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return gradient


def _net(inputs: int, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).double()


def _poisson(width: int = 16, points: int = 64) -> Problem:
    """Poisson's equation on the unit square, with zero on its boundary; the Laplacian is made of two nested derivatives."""
    net = _net(2, width)
    inside = torch.rand(points, 2, dtype=torch.float64).requires_grad_()
    t, zero = torch.rand(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    boundary = torch.cat([torch.stack(pair, 1) for pair in ((t, zero), (t, zero + 1), (zero, t), (zero + 1, t))])
    source = 2 * math.pi**2 * torch.sin(math.pi * inside.detach()).prod(1)

    def closure() -> tuple[Tensor, Tensor]:
        slope = _gradient(net(inside), inside)
        laplacian = sum(_gradient(slope[:, i], inside)[:, i] for i in range(2))
        outputs = torch.cat([0.1 * (laplacian + source), 3 * net(boundary)[:, 0]])[:, None]
        return outputs, torch.zeros_like(outputs)

    return net, closure


def _force_field() -> Problem:
    """Energies of examples, and forces: minus their gradients by the positions."""
    net = _net(6)
    positions = torch.randn(32, 6, dtype=torch.float64).requires_grad_()
    with torch.enable_grad():
        true_energy = positions.sin().sum(1, keepdim=True) + positions.prod(1, keepdim=True)
        targets = torch.cat([true_energy, -_gradient(true_energy, positions)], 1).detach()

    def closure() -> tuple[Tensor, Tensor]:
        energy = net(positions)
        return torch.cat([energy, -_gradient(energy, positions)], 1), targets

    return net, closure


def _advection() -> Problem:
    """A first derivative alone, with inputs that the closure makes, and targets by a part without gradients."""
    net, x = _net(2), torch.rand(32, 2, dtype=torch.float64)

    def closure() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        slope = _gradient(net(leaf), leaf)
        with torch.no_grad():
            targets = x.sum(1, keepdim=True).cos()
        return slope[:, :1] + 0.5 * slope[:, 1:], targets

    return net, closure


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Poisson": _poisson,
    "force field": _force_field,
    "advection": _advection,
}


def _jacobian(net: nn.Module, closure: Closure) -> Tensor:
    """Of the outputs with respect to all parameters, in reverse mode, row by row."""
    with torch.enable_grad():
        outputs, _ = closure()
        parameters = list(net.parameters())
        rows = [
            torch.autograd.grad(y, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for y in outputs.flatten()
        ]
    return torch.stack([torch.cat([p.flatten() for p in row]) for row in rows])


@pytest.mark.parametrize("name", PROBLEMS)
def test_jacobian_products(name: str) -> None:
    net, closure = PROBLEMS[name]()
    parameters = list(net.parameters())
    directions = [[torch.randn_like(p) for p in parameters], [torch.randn_like(parameters[0]), *[None] * (len(parameters) - 1)]]
    products = jacobian_products(net, torch.enable_grad()(closure), parameters, directions)
    jacobian = _jacobian(net, closure)
    for product, direction in zip(products, directions, strict=True):
        pairs = zip(direction, parameters, strict=True)
        vector = torch.cat([(torch.zeros_like(p) if d is None else d).flatten() for d, p in pairs])
        assert not product.requires_grad
        torch.testing.assert_close(product.flatten(), jacobian @ vector, rtol=1e-10, atol=1e-12)


def test_jacobian_products_are_those_of_functional_transforms() -> None:
    """Against torch.func, which takes the derivatives by the input in another way, too."""
    net, _ = _poisson()
    x = torch.rand(6, 2, dtype=torch.float64)
    parameters = dict(net.named_parameters())

    def laplacian(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        return torch.func.hessian(lambda z: functional_call(net, parameters, (z,))[0])(point).trace()

    leaf = x.clone().requires_grad_()

    def closure() -> tuple[Tensor, Any]:
        slope = _gradient(net(leaf), leaf)
        return torch.stack([_gradient(slope[:, i], leaf)[:, i] for i in range(2)]).sum(0), None

    direction = [torch.randn_like(p) for p in parameters.values()]
    (product,) = jacobian_products(net, torch.enable_grad()(closure), list(parameters.values()), [direction])
    rows = [jacrev(laplacian)({n: p.detach() for n, p in parameters.items()}, point) for point in x]
    expected = [sum((row[n] * d).sum() for n, d in zip(parameters, direction, strict=True)) for row in rows]
    torch.testing.assert_close(product, torch.stack(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_step_minimizes_the_quadratic_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the second step, in which there is momentum, by an explicit Gauss-Newton matrix."""
    net, closure = PROBLEMS[name]()
    optimizer = KFAC(net, lr="auto", loss=nn.MSELoss(), damping=0.1)
    optimizer.step(closure)
    jacobian, (outputs, targets) = _jacobian(net, closure), closure()
    residual = (outputs - targets).detach().flatten()
    slope = 2 / len(residual) * (jacobian.T @ residual)
    curvature = 2 / len(residual) * (jacobian.T @ jacobian)
    curvature.diagonal().add_(optimizer._run.auto.controller.damping)
    found: dict[str, Any] = {}
    combined = auto.combined

    def look(coefficients: Any, directions: Any) -> Any:
        pairs = [zip(direction, net.parameters(), strict=True) for direction in directions]
        found["directions"] = [torch.cat([(torch.zeros_like(p) if d is None else d).flatten() for d, p in ds]) for ds in pairs]
        return combined(coefficients, directions)

    monkeypatch.setattr(auto, "combined", look)
    optimizer.step(closure)
    basis = torch.stack(found["directions"], 1)
    expected = torch.linalg.solve(basis.T @ curvature @ basis, -basis.T @ slope)
    report = optimizer._run.auto.report
    # With a derivative alone, the output of the last layer is not in the loss: it has no statistics, and moves by its gradient.
    assert basis.shape[1] == (3 if name == "advection" else 2)
    torch.testing.assert_close(
        torch.tensor([report[x] for x in ("lr", "lr_others", "momentum") if x != "lr_others" or len(expected) == 3]).double(),
        expected,
        rtol=1e-6,
        atol=1e-9,
    )
    assert report["predicted"] == pytest.approx(float(slope @ basis @ expected / 2), rel=1e-6)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_loss_falls(name: str) -> None:
    net, closure = PROBLEMS[name]()
    optimizer = KFAC(net, lr="auto", loss=nn.MSELoss(), damping=0.1, fisher="ggn")
    losses = [float(optimizer.step(closure)) for _ in range(50)]
    assert losses[-1] < 0.01 * losses[0]
    assert optimizer.diagnostics()["rejected_steps"] < 10


@pytest.mark.parametrize("differentiates", [True, False])
def test_gradients_are_enabled_where_the_closure_differentiates(differentiates: bool) -> None:
    net, x = _net(2), torch.rand(16, 2, dtype=torch.float64).requires_grad_()
    seen = []

    def closure() -> tuple[Tensor, Tensor]:
        seen.append(torch.is_grad_enabled())
        u = net(x)
        return (_gradient(u, x) if differentiates else u), torch.ones(16, 2 if differentiates else 1, dtype=torch.float64)

    optimizer = KFAC(net, lr="auto", loss=nn.MSELoss(), damping=0.1)
    optimizer.step(closure)
    optimizer.step(closure)
    # Without a third direction, of the last layer if its output is not in the loss.
    assert len(seen) == (9 if differentiates else 7)
    assert seen == ([True] * 9 if differentiates else [True, False, False, True, False, False, False])


def test_random_numbers_and_running_statistics() -> None:
    """All evaluations of a step have the same dropout mask, and running statistics advance once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1)).double()
    x = torch.rand(32, 2, dtype=torch.float64).requires_grad_()
    optimizer = KFAC(net, lr="auto", loss=nn.MSELoss(), damping=1.0)

    def closure() -> tuple[Tensor, Tensor]:
        outputs = _gradient(net(x), x)
        return outputs, torch.ones_like(outputs)

    for _ in range(5):
        optimizer.step(closure)
    assert int(net[1].num_batches_tracked) == 5
    assert optimizer.diagnostics()["rejected_steps"] == 0


class _Cube(torch.autograd.Function):
    """A cube whose backward has no forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * 3 * torch.cdist(x[:, None], torch.zeros_like(x)[:, None])[:, 0] ** 2

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * tangent


def test_a_backward_formula_without_a_forward_derivative_is_named() -> None:
    net, x = _net(2), torch.rand(16, 2, dtype=torch.float64).requires_grad_()
    optimizer = KFAC(net, lr="auto", loss=nn.MSELoss(), damping=0.1)
    before = [p.detach().clone() for p in net.parameters()]

    def closure() -> tuple[Tensor, Tensor]:
        outputs = _gradient(_Cube.apply(net(x)), x)
        return outputs, torch.ones_like(outputs)

    with pytest.raises(RuntimeError, match=r"and of backward passes in the closure.*_cdist_forward.*pass a number as lr"):
        optimizer.step(closure)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
