"""Damping means the same at any batch size, number of accumulation steps and loss scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import TokenModel, conv_net, mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

TOLERANCE = 1e-6  # what we promise; the assertions below hold with a margin in float64

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (12, 5)),
    "conv": (conv_net, (12, 2, 9, 10)),
    "tokens": (lambda: TokenModel().double(), (12, 3, 5)),
}


def _preconditioned(
    case: str, backward: Callable[[nn.Module, Tensor, Tensor], Any], unscale: float = 1.0, **settings: Any
) -> list[Tensor]:
    make_model, shape = CASES[case]
    torch.manual_seed(0)
    model = make_model()
    x, y = torch.randn(shape, dtype=torch.float64), torch.randint(4, shape[:1])
    preconditioner = KFACPreconditioner(model, damping=1e-2, kl_clip=0.05, lr=1.0, **settings)
    backward(model, x, y)
    for p in model.parameters():
        assert p.grad is not None
        p.grad /= unscale
    preconditioner.precondition_()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _plain(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y).backward()


def _duplicated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    _plain(model, torch.cat([x, x, x]), torch.cat([y, y, y]))


def _accumulated(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for part, labels in ((x[:6], y[:6]), (x[6:], y[6:])):
        (nn.functional.cross_entropy(model(part), labels) / 2).backward()


def _accumulated_unevenly(model: nn.Module, x: Tensor, y: Tensor) -> None:
    for part, labels in ((x[:3], y[:3]), (x[3:], y[3:])):
        (nn.functional.cross_entropy(model(part), labels, reduction="sum") / len(x)).backward()


def _scaled(model: nn.Module, x: Tensor, y: Tensor) -> None:
    (1024.0 * nn.functional.cross_entropy(model(x), y)).backward()


def _summed(model: nn.Module, x: Tensor, y: Tensor) -> None:
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("backward", "unscale", "settings"),
    [
        pytest.param(_duplicated, 1.0, {}, id="every sample three times"),
        pytest.param(_accumulated, 1.0, {}, id="two accumulation steps"),
        pytest.param(_accumulated_unevenly, 1.0, {}, id="two uneven accumulation steps"),
        pytest.param(_scaled, 1024.0, {"loss_scale": 1024.0}, id="loss scaled"),
        pytest.param(_scaled, 1024.0, {"loss_scale": lambda: 1024.0}, id="loss scaled by a callable"),
        pytest.param(_summed, 12.0, {"loss_reduction": "sum"}, id="summed loss"),
    ],
)
def test_preconditioned_gradient_is_unchanged(
    case: str,
    weight_sharing: str,
    backward: Callable[[nn.Module, Tensor, Tensor], Any],
    unscale: float,
    settings: dict[str, Any],
) -> None:
    expected = _preconditioned(case, _plain, weight_sharing=weight_sharing)
    result = _preconditioned(case, backward, unscale, weight_sharing=weight_sharing, **settings)
    for value, truth in zip(result, expected, strict=True):
        assert relative_error(value, truth) <= TOLERANCE


def test_a_wrong_loss_scale_is_seen() -> None:
    """The same comparison can fail: forgetting the scale changes the gradient by far more than the tolerance."""
    expected = _preconditioned("mlp", _plain)
    result = _preconditioned("mlp", _scaled, 1024.0)
    assert relative_error(result[0], expected[0]) > 0.1


@pytest.mark.parametrize("tokens", [4, 16])
def test_sequence_length_does_not_change_the_factors(tokens: int) -> None:
    """Repeating every position of an example: the mean over loss terms and both factors stay."""
    torch.manual_seed(0)
    model = TokenModel(pool=False).double()
    x, y = torch.randn(8, 1, 5, dtype=torch.float64), torch.randint(4, (8, 1))
    results = []
    for count in (1, tokens):
        model.zero_grad()
        with KFACPreconditioner(model, loss_terms="tokens") as preconditioner:
            nn.functional.cross_entropy(model(x.expand(-1, count, -1)), y.expand(-1, count)).backward()
            preconditioner.precondition_()
            results.append(preconditioner.factors())
    for name in results[0]:
        for one, many in zip(results[0][name], results[1][name], strict=True):
            assert relative_error(many, one) <= 1e-12


def test_grad_scaler_trains_as_without() -> None:
    """The real GradScaler, float32: unscaling before the step and its scale in the statistics."""
    weights = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = mlp(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=enabled)
        optimizer = KFAC(model, lr=0.1, damping=0.1, loss_scale=scaler.get_scale)
        for _ in range(5):
            x, y = torch.randn(16, 5), torch.randint(4, (16,))
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert relative_error(weights[1], weights[0]) <= TOLERANCE
