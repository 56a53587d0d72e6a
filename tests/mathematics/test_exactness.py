"""Where theory says that K-FAC is no approximation (Martens and Grosse 2015; Bernacchia et al. 2018; Dangel et al. 2025)."""

from __future__ import annotations

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner

DAMPING = 1e-3


def _ggn_block(model: nn.Module, layer: nn.Linear, x: Tensor) -> Tensor:
    """The exact block of the mean squared error's GGN for [weight | bias], row by row: (1/N) sum_n J_n^T (2/D) J_n."""
    names = [name for name, p in model.named_parameters() if any(p is q for q in layer.parameters())]
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(some: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, {**parameters, **some}, (x,)).flatten(1)

    jacobians = torch.func.jacrev(outputs)({name: parameters[name] for name in names})
    weight = jacobians[names[0]].flatten(3)
    if len(names) > 1:
        weight = torch.cat([weight, jacobians[names[1]].unsqueeze(-1)], -1)
    j = weight.flatten(2)
    return 2 / j.shape[1] * torch.einsum("nci,ncj->ij", j, j) / len(x)


def _deep_linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(3, 4, bias=False), nn.Linear(4, 2)).double()


def _kfac(model: nn.Module, x: Tensor, **settings: object) -> tuple[KFACPreconditioner, list[Tensor]]:
    loss, y = nn.MSELoss(), torch.randn(len(x), 2, dtype=torch.float64)
    ours = KFACPreconditioner(model, damping=DAMPING, kl_clip=None, fisher="ggn", loss=loss, **settings)
    outputs = model(x)
    ours.accumulate_fisher(outputs, y)
    loss(outputs, y).backward()
    raw = [p.grad.clone() for p in model.parameters()]
    ours.precondition_()
    return ours, raw


@pytest.mark.parametrize("n", [1, 7])
def test_a_deep_linear_net_with_squared_error(n: int) -> None:
    """Gradients of its outputs do not depend on the example, so E[a a^T (x) g g^T] = E[a a^T] (x) E[g g^T], for any batch."""
    model, x = _deep_linear(), torch.randn(n, 4, dtype=torch.float64)
    ours, raw = _kfac(model, x, exact_damping=True)
    gradients = iter(raw)
    for name, layer in model.named_children():
        a, g = ours.factors()[name]
        exact = _ggn_block(model, layer, x)
        assert relative_error(torch.kron(g, a), exact) <= 1e-12
        gradient = [next(gradients) for _ in layer.parameters()]
        stacked = torch.cat([gradient[0], *(b[:, None] for b in gradient[1:])], 1)
        step = torch.linalg.solve(exact + DAMPING * torch.eye(len(exact), dtype=torch.float64), stacked.flatten())
        got = torch.cat([layer.weight.grad, *(p.grad[:, None] for p in list(layer.parameters())[1:])], 1)
        assert relative_error(got.flatten(), step) <= 1e-9


def test_any_net_with_one_example() -> None:
    """Of a single example A has rank one, and the Kronecker product is exact whatever comes after the layer."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.GELU(), nn.Linear(3, 2)).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    ours, _ = _kfac(model, x)
    for name, (a, g) in ours.factors().items():
        assert relative_error(torch.kron(g, a), _ggn_block(model, model[int(name)], x)) <= 1e-12


def test_a_nonlinear_net_with_several_examples_is_approximated() -> None:
    """The control: here the two differ."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    x = 2 * torch.randn(7, 4, dtype=torch.float64)
    ours, _ = _kfac(model, x)
    a, g = ours.factors()["0"]
    assert relative_error(torch.kron(g, a), _ggn_block(model, model[0], x)) > 1e-2


class _Shared(nn.Module):
    """Linear weight sharing: a deep linear net over positions whose outputs are summed, or kept."""

    def __init__(self, reduce: bool) -> None:
        super().__init__()
        self.first, self.second, self.reduce = nn.Linear(3, 4), nn.Linear(4, 2), reduce

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return x.mean(1) if self.reduce else x


@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_linear_nets_that_share_weights(setting: str) -> None:
    """K-FAC-expand is exact where positions are loss terms, -reduce where they are averaged (Eschenhagen et al. 2023)."""
    model, x = _Shared(setting == "reduce").double(), torch.randn(5, 3, 3, dtype=torch.float64)
    loss = nn.MSELoss()
    terms = "examples" if setting == "reduce" else "tokens"
    ours = KFACPreconditioner(
        model, fisher="ggn", loss=loss, weight_sharing=setting, loss_terms=terms, kl_clip=None, damping=DAMPING
    )
    outputs = model(x)
    ours.accumulate_fisher(outputs)
    outputs.sum().backward()
    ours.precondition_()
    for name, layer in model.named_children():
        a, g = ours.factors()[name]
        # `_ggn_block` averages over all 6 outputs of an example where it has 3 terms of 2.
        exact = _ggn_block(model, layer, x)
        assert relative_error(torch.kron(g, a), exact) <= 1e-12
