"""Every Fisher, form and model against curvlinops in float64; the table is printed."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator, KFACType
from curvlinops.inverse import KFACInverseLinearOperator
from support.helpers import conv_net, mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner

TOLERANCE = 1e-10
DAMPING = 1e-2
ORACLE_FISHERS = {"empirical": FisherType.EMPIRICAL, "mc": FisherType.MC, "ggn": FisherType.TYPE2}


class AttentionBlock(nn.Module):
    """Causal attention with weights of its own for q, k, v and out; the mean over tokens makes one prediction."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (2, 3)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k = k * torch.arange(1, x.shape[1] + 1)[:, None]  # or gradients of keys would sum to zero over positions
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (10, 5)),
    "conv": (conv_net, (6, 2, 9, 10)),
    "attention": (lambda: AttentionBlock().double(), (8, 3, 6)),
}
LOSSES: dict[str, Callable[[], nn.Module]] = {
    "cross entropy": nn.CrossEntropyLoss,
    "squared error": nn.MSELoss,
    "binary cross entropy": nn.BCEWithLogitsLoss,
}


def _data(shape: tuple[int, ...], loss: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(shape, dtype=torch.float64)
    if loss == "cross entropy":
        return x, torch.randint(4, shape[:1])
    return x, torch.randint(2, (shape[0], 4)).double()


def _oracle(
    model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], fisher: str, weight_sharing: str, draws: int = 1
) -> KFACLinearOperator:
    oracle = KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [data],
        fisher_type=ORACLE_FISHERS[fisher],
        mc_samples=draws,
        kfac_approx=KFACType.EXPAND if weight_sharing == "expand" else KFACType.REDUCE,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    oracle.compute_kronecker_factors()
    if fisher == "empirical" and not isinstance(loss, nn.CrossEntropyLoss):
        # A loss that also averages over 4 outputs is its likelihood's over 4: curvlinops takes gradients times 4^1/2, so that
        # this Fisher has the GGN's scale. Ours is E[g g^T] of the loss as it is.
        for covariance in oracle._gradient_covariances.values():
            covariance.div_(4)
    return oracle


def _precondition(model: nn.Module, loss: nn.Module, data: tuple[Tensor, Tensor], **settings: object) -> KFACPreconditioner:
    x, y = data
    ours = KFACPreconditioner(model, damping=DAMPING, kl_clip=None, loss=loss, **settings)
    outputs = model(x)
    ours.accumulate_fisher(outputs, y)
    assert all(p.grad is None for p in model.parameters())
    loss(outputs, y).backward()
    ours.precondition_()
    return ours


def _errors(ours: KFACPreconditioner, oracle: KFACLinearOperator) -> tuple[float, float]:
    factors = ours.factors()
    assert factors.keys() == oracle._input_covariances.keys()
    return (
        max(relative_error(a, oracle._input_covariances[name]) for name, (a, _) in factors.items()),
        max(relative_error(g, oracle._gradient_covariances[name]) for name, (_, g) in factors.items()),
    )


def _gradient_error(model: nn.Module, expected: list[Tensor]) -> float:
    return max(relative_error(p.grad, truth) for p, truth in zip(model.parameters(), expected, strict=True))


@functools.cache
def _table() -> list[str]:
    return [f"{'model':10} {'loss':21} {'Fisher':9} {'sharing':7} {'A':>8} {'G':>8} {'V split':>8} {'V exact':>8}"]


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_exact_fishers(name: str, loss_name: str, fisher: str, weight_sharing: str, show: Callable[..., None]) -> None:
    """Factors, and the gradient preconditioned with split and with exact damping."""
    make_model, shape = MODELS[name]
    model, loss, data = make_model(), LOSSES[loss_name](), _data(shape, loss_name)
    oracle = _oracle(model, loss, data, fisher, weight_sharing)
    gradient = list(torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters())))
    errors = []
    for exact in (False, True):
        inverse = KFACInverseLinearOperator(oracle, damping=DAMPING, use_heuristic_damping=not exact, use_exact_damping=exact)
        model.zero_grad()
        with _precondition(model, loss, data, fisher=fisher, weight_sharing=weight_sharing, exact_damping=exact) as ours:
            a_error, g_error = _errors(ours, oracle)
        errors.append(_gradient_error(model, inverse @ gradient))
    lines = _table()
    if len(lines) == 1:
        show("\nLargest relative errors against curvlinops, float64:", lines[0])
    figures = " ".join(f"{error:8.1e}" for error in (a_error, g_error, *errors))
    lines.append(f"{name:10} {loss_name:21} {fisher:9} {weight_sharing:7} {figures}")
    show(lines[-1])
    assert max(a_error, g_error, *errors) <= TOLERANCE


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", MODELS)
def test_sampled_fisher(name: str, weight_sharing: str, show: Callable[..., None]) -> None:
    """20,000 draws: near the exact Fisher, which for these losses is the GGN, and that from curvlinops' own draws."""
    draws = 20_000
    make_model, shape = MODELS[name]
    model, loss, data = make_model(), nn.CrossEntropyLoss(), _data(shape, "cross entropy")
    # Draws as copies of the batch: 200 in one backward pass, by the scaling of a Fisher with the same factors; half as samples.
    copies, samples = 100, 2
    x = data[0].repeat(copies, *[1] * (data[0].dim() - 1))
    exact = _oracle(model, loss, data, "ggn", weight_sharing)
    with KFACPreconditioner(
        model, fisher="mc", loss=loss, weight_sharing=weight_sharing, fisher_samples=samples, ema_decay=1 - 1e-9
    ) as ours:
        for _ in range(draws // copies // samples):
            ours.accumulate_fisher(model(x))
            ours.engine.precondition(lambda _: 0.1)
        _, g_error = _errors(ours, exact)
    theirs = _oracle(model, loss, data, "mc", weight_sharing, draws=200)
    their_error = max(relative_error(theirs._gradient_covariances[n], g) for n, g in exact._gradient_covariances.items())
    show(f"\nmc, {draws} draws, {name}, {weight_sharing}: G off by {g_error:.1e} (curvlinops' 200 draws: {their_error:.1e})")
    assert g_error <= 0.03
    assert 0.2 <= (g_error * draws**0.5) / (their_error * 200**0.5) <= 5


@pytest.mark.parametrize("weight_sharing", ["expand"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
@pytest.mark.parametrize("name", MODELS)
def test_ekfac(name: str, fisher: str, weight_sharing: str, show: Callable[..., None]) -> None:
    """The corrected eigenvalues, as the preconditioned gradient shows them, and their sum as they are."""
    make_model, shape = MODELS[name]
    model, loss, data = make_model(), nn.CrossEntropyLoss(), _data(shape, "cross entropy")
    oracle = EKFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [data],
        fisher_type=ORACLE_FISHERS[fisher],
        kfac_approx=KFACType.EXPAND,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    oracle.compute_kronecker_factors()
    oracle.compute_eigenvalue_correction()
    inverse = KFACInverseLinearOperator(oracle, damping=DAMPING, use_exact_damping=True)
    gradient = list(torch.autograd.grad(loss(model(data[0]), data[1]), list(model.parameters())))
    expected = inverse @ gradient
    with KFACPreconditioner(
        model, damping=DAMPING, kl_clip=None, loss=loss, fisher=fisher, curvature="ekfac", ema_decay=0.0, inverse_every=9
    ) as ours:
        for _ in range(2):  # the second pass is the first to find a basis
            model.zero_grad()
            outputs = model(data[0])
            ours.accumulate_fisher(outputs, data[1])
            loss(outputs, data[1]).backward()
            ours.precondition_()
        corrected = oracle._corrected_eigenvalues
        ours_sum = sum(float(s.values.sum()) for s in ours.engine.curvature._ekfac_solves)
    error = _gradient_error(model, expected)
    total = sum(float(part.sum()) for v in corrected.values() for part in (v.values() if isinstance(v, dict) else [v]))
    show(f"\nEKFAC {name}, {fisher}: V off by {error:.1e}, sum of eigenvalues {ours_sum:.6e} and {total:.6e}")
    assert error <= TOLERANCE
    assert ours_sum == pytest.approx(total, rel=1e-10)
