"""Factors and preconditioned gradients against curvlinops in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from curvlinops import FisherType, KFACLinearOperator, KFACType
from curvlinops.inverse import KFACInverseLinearOperator
from support.helpers import TokenModel, conv_net, mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner

TOLERANCE = 1e-10


def _mlp_data() -> tuple[Tensor, Tensor]:
    return torch.randn(10, 5, dtype=torch.float64), torch.randint(4, (10,))


def _conv_data() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 2, 9, 10, dtype=torch.float64), torch.randint(4, (6,))


def _token_data() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 5, dtype=torch.float64), torch.randint(4, (8,))


def _language_data() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 3, 5, dtype=torch.float64), torch.randint(4, (8, 3))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]], str]] = {
    "mlp": (mlp, _mlp_data, "examples"),
    "mlp-without-bias": (lambda: mlp(bias=False), _mlp_data, "examples"),
    "conv": (conv_net, _conv_data, "examples"),
    "tokens-pooled": (lambda: TokenModel().double(), _token_data, "examples"),
    "tokens-as-loss-terms": (lambda: TokenModel(pool=False).double(), _language_data, "tokens"),
}


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "newton_schulz", "factored"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_factors_and_preconditioned_gradient(case: str, weight_sharing: str, inverse: str) -> None:
    make_model, make_data, loss_terms = CASES[case]
    model, (x, y), damping = make_model(), make_data(), 1e-2
    loss_function = nn.CrossEntropyLoss()
    params = list(model.parameters())

    oracle = KFACLinearOperator(
        model,
        loss_function,
        params,
        [(x, y)],
        fisher_type=FisherType.EMPIRICAL,
        kfac_approx=KFACType.EXPAND if weight_sharing == "expand" else KFACType.REDUCE,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    oracle.compute_kronecker_factors()
    inverse_oracle = KFACInverseLinearOperator(oracle, damping=damping, use_heuristic_damping=True)
    expected = inverse_oracle @ list(torch.autograd.grad(loss_function(model(x), y), params))

    ours = KFACPreconditioner(
        model,
        damping=damping,
        kl_clip=None,
        weight_sharing=weight_sharing,
        loss_terms=loss_terms,
        inverse=inverse,
        inverse_tolerance=1e-12 if inverse in ("newton_schulz", "factored") else 0.05,
    )
    loss_function(model(x), y).backward()
    ours.precondition_()

    factors = ours.factors()
    assert factors.keys() == oracle._input_covariances.keys()
    for name, (a, g) in factors.items():
        assert relative_error(a, oracle._input_covariances[name]) <= TOLERANCE
        assert relative_error(g, oracle._gradient_covariances[name]) <= TOLERANCE
    if inverse != "factored":  # whose cold start is Cholesky; its refresh has a test of its own below
        layers = ours.diagnostics()["layers"].values()
        assert all(layer["fallbacks_A"] == layer["fallbacks_G"] == 0 for layer in layers)
    for parameter, truth in zip(params, expected, strict=True):
        assert parameter.grad is not None
        assert relative_error(parameter.grad, truth) <= TOLERANCE


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_a_warm_refresh_reaches_the_same_gradient(case: str, weight_sharing: str) -> None:
    """Two batches through the moving average: the second inverse comes from the first by factored Newton alone."""
    make_model, make_data, loss_terms = CASES[case]
    results = {}
    for inverse in ("factored", "cholesky"):
        torch.manual_seed(1)
        model = make_model()
        ours = KFACPreconditioner(
            model,
            damping=0.1,
            kl_clip=None,
            weight_sharing=weight_sharing,
            loss_terms=loss_terms,
            inverse=inverse,
            inverse_tolerance=1e-12,
        )
        for _ in range(2):
            x, y = make_data()
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            ours.precondition_()
        results[inverse] = [p.grad for p in model.parameters()]
        assert all(x["fallbacks_A"] == x["fallbacks_G"] == 0 for x in ours.diagnostics()["layers"].values())
    for warm, exact in zip(results["factored"], results["cholesky"], strict=True):
        assert warm is not None
        assert exact is not None
        assert relative_error(warm, exact) <= TOLERANCE


def test_a_moving_average_of_one_batch_is_the_batch() -> None:
    """Bias correction: repeating a batch leaves the factors where the first one put them."""
    model, (x, y) = mlp(), _mlp_data()
    ours = KFACPreconditioner(model, damping=1e-2, ema_decay=0.9)
    seen = []
    for _ in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        ours.precondition_()
        seen.append(ours.factors())
    for name in seen[0]:
        for first, last in zip(seen[0][name], seen[2][name], strict=True):
            assert relative_error(last, first) <= 1e-14
