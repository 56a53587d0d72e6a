"""Which backward passes leave statistics: those that make the gradient of the layer's weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACPreconditioner

TOLERANCE = 1e-10


def network(width: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    return net.double()


def explicit(
    net: nn.Sequential, x: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> tuple[float, list[Tensor], list[Tensor]]:
    """Loss terms, and for each linear layer the sums of a a^T and g g^T, with g from autograd.grad(loss, layer output)."""
    seen: list[tuple[Tensor, Tensor]] = []
    value = x
    for module in net:
        before, value = value, module(value)
        if isinstance(module, nn.Linear):
            seen.append((before, value))
    gradients = torch.autograd.grad(loss_of(x, value), [out for _, out in seen], materialize_grads=True)
    a = [torch.cat([before, torch.ones_like(before[:, :1])], 1).detach() for before, _ in seen]
    return len(x), [rows.T @ rows for rows in a], [g.T @ g for g in gradients]


def require_factors(
    optimizer: KFACPreconditioner | KFAC, net: nn.Sequential, x: Tensor, loss_of: Callable[[Tensor, Tensor], Tensor]
) -> None:
    """The factors are those of the loss: A the mean of a a^T, G N times the sum of g g^T."""
    terms, squares, gradients = explicit(net, x, loss_of)
    for (a, g), true_a, true_g in zip(optimizer.factors().values(), squares, gradients, strict=True):
        assert relative_error(a, true_a / len(x)) <= TOLERANCE
        assert relative_error(g, true_g * terms) <= TOLERANCE


def force_field(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Energies, and forces as their derivatives by the input."""

    def loss(x: Tensor, energy: Tensor) -> Tensor:
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return (energy - x.sum(1, keepdim=True).sin()).square().mean() + weight * (forces - x.cos()).square().sum(1).mean()

    return loss


def laplace(weight: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Second derivatives, one input at a time."""

    def loss(x: Tensor, u: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1])]
        return u.square().mean() + weight * (torch.stack(second).sum(0) + 1).square().mean()

    return loss


@pytest.mark.parametrize("examples", [8, 32, 128, 512])
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("kind", [force_field, laplace])
def test_derivatives_by_the_input_in_the_loss(
    kind: Callable[[float], Callable[[Tensor, Tensor], Tensor]], weight: float, examples: int
) -> None:
    net = network()
    x = torch.randn(examples, 3, dtype=torch.float64, requires_grad=True)
    loss_of = kind(weight)
    with KFACPreconditioner(net) as ours:
        loss_of(x, net(x)).backward()
        ours.precondition_()
        require_factors(ours, net, x, loss_of)
        # A derivative that is not in the loss leaves nothing at all.
        if not weight:
            require_factors(
                ours,
                net,
                x,
                {
                    force_field: lambda x, u: (u - x.sum(1, keepdim=True).sin()).square().mean(),
                    laplace: lambda x, u: u.square().mean(),
                }[kind],
            )


def test_saliency_and_attacks_on_the_forward_pass_of_the_loss() -> None:
    net, x, y = network(), torch.randn(16, 3, dtype=torch.float64, requires_grad=True), torch.randn(16, 1, dtype=torch.float64)

    def loss_of(x: Tensor, u: Tensor) -> Tensor:
        return F.mse_loss(u, y)

    with KFACPreconditioner(net) as ours:
        loss = loss_of(x, net(x))
        (sign,) = torch.autograd.grad(loss, x, retain_graph=True)  # the loss's gradient, but none of a weight
        torch.autograd.backward(loss, inputs=[x], retain_graph=True)
        assert torch.equal(sign, x.grad)
        loss.backward()
        ours.precondition_()
        require_factors(ours, net, x.detach(), lambda x, u: F.mse_loss(u, y))


def test_gradients_of_some_weights_leave_statistics_of_these() -> None:
    """By autograd.grad, which returns them, and by backward(inputs=...)."""
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    first, middle, last = (m for m in net if isinstance(m, nn.Linear))
    with KFACPreconditioner(net) as ours:
        counts = [s.counts for s in ours.engine.statistics]
        torch.autograd.grad(net(x).square().mean(), [middle.weight, middle.bias])
        counts = [s.counts.tolist() for s in ours.engine.statistics]
        assert counts == [[0, 0], [16, 16], [0, 0]]
        net(x).square().mean().backward(inputs=[last.weight, first.weight])
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[16, 16], [16, 16], [16, 16]]
        net(x).square().mean().backward(inputs=[first.bias])  # a bias alone is not the weight
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[16, 16], [16, 16], [16, 16]]


def test_a_gradient_penalty_with_a_forward_pass_of_its_own() -> None:
    """One call makes the loss, the other the penalty; both are in the loss's backward pass."""
    net = network()
    x, z = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in (12, 12))

    def penalty(z: Tensor, u: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(u.sum(), z, create_graph=True)
        return (slope.norm(dim=1) - 1).square().mean()

    with KFACPreconditioner(net) as ours:
        (net(x).square().mean() + penalty(z, net(z))).backward()
        ours.precondition_()
        terms, _, real = explicit(net, x, lambda x, u: u.square().mean())
        _, _, other = explicit(net, z, penalty)
        for (_, g), true, also in zip(ours.factors().values(), real, other, strict=True):
            assert relative_error(g, terms * (true + also)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_penalty_on_the_gradient_of_the_weights() -> None:
    """The loss's backward pass makes gradients of weights, and so does that of their norm."""
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    with KFACPreconditioner(net) as ours:
        loss = net(x).square().mean()
        loss.backward(create_graph=True)
        norm = sum(p.grad.square().sum() for p in net.parameters())
        norm.backward()
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[32, 32]] * 3
    for p in net.parameters():
        p.grad = None


def test_reentrant_checkpoints_still_leave_statistics() -> None:
    net, x = network(), torch.randn(16, 3, dtype=torch.float64, requires_grad=True)

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net[4](checkpoint(self.net[:4], x, use_reentrant=True))

    with KFACPreconditioner(Checkpointed()) as ours:
        ours._model(x).square().mean().backward()
        ours.precondition_()
        require_factors(ours, net, x, lambda x, u: u.square().mean())


def test_paused_is_for_backward_passes_too() -> None:
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    with KFACPreconditioner(net) as ours:
        loss = net(x).square().mean()
        with ours.paused():
            loss.backward(retain_graph=True)
            with ours.paused():
                loss.backward(retain_graph=True)
            loss.backward(retain_graph=True)
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[0, 0]] * 3
        loss.backward()
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[16, 16]] * 3


def test_paused_is_for_compiled_backward_passes_too() -> None:
    torch.compiler.reset()
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    with KFACPreconditioner(net) as ours:
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        for pause in (False, True, False):
            loss = compiled(x).square().mean()
            if pause:
                with ours.paused():
                    loss.backward()
            else:
                loss.backward()
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[32, 32]] * 3


def test_another_weight_in_the_place_of_the_layers() -> None:
    """Of torch.func.functional_call: a leaf has its own gradient; what is made of the weight passes its own on to it."""
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    others = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    with KFACPreconditioner(net) as ours:
        torch.func.functional_call(net, others, (x,)).square().mean().backward()
        assert all(p.grad is None for p in net.parameters())
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[0, 0]] * 3
        moved = {name: 0.9 * p for name, p in net.named_parameters()}
        torch.func.functional_call(net, moved, (x,)).square().mean().backward()
        assert all(p.grad is not None for p in net.parameters())
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[16, 16]] * 3


def test_statistics_that_zero_grad_throws_away_are_named() -> None:
    """The Fisher's loss first, then zero_grad(), then the loss through the same forward pass."""
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    optimizer = KFAC(net, lr=0.1)
    output = net(x)
    output.sum().backward(retain_graph=True)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"zero_grad\(\) threw away the statistics"):
        output.square().mean().backward()
    optimizer.step()


def test_the_statistics_of_one_loss_with_the_gradient_of_another() -> None:
    """The way to do it: model.zero_grad() keeps statistics, and paused() leaves none."""
    net, x = network(), torch.randn(16, 3, dtype=torch.float64)
    with KFAC(net, lr=0.1) as optimizer:
        output = net(x)
        output.sum(1).mean().backward(retain_graph=True)
        net.zero_grad()
        with optimizer.paused():
            output.square().mean().backward()
        gradient = net[0].weight.grad.clone()
        optimizer.step()
        require = explicit(network(), x, lambda x, u: u.sum(1).mean())
        for (_, g), true in zip(optimizer.factors().values(), require[2], strict=True):
            assert relative_error(g, 16 * true) <= TOLERANCE
        assert not torch.equal(gradient, torch.zeros_like(gradient))
