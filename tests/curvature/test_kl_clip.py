"""The KL clip: its formula, its bound, and layers whose product is not a number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_triton.curvature.preconditioning import kl_clip_scale

TYPES = [torch.float32, torch.float64]
layers_of_a_model = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 10)), min_size=1, max_size=6)


@settings(deadline=None)
@given(layers_of_a_model, st.floats(1e-8, 1e3), st.sampled_from(TYPES))
def test_formula(layers: list[tuple[float, float]], kl_clip: float, dtype: torch.dtype) -> None:
    """min(1, sqrt(kl_clip / sum lr^2 <V, W>)) in Python floats; a scalar tensor of the products' type."""
    products, rates = (torch.tensor(column, dtype=dtype) for column in zip(*layers, strict=True))
    nu = kl_clip_scale(products, rates, kl_clip)
    total = math.fsum(r * r * p for p, r in zip(products.tolist(), rates.tolist(), strict=True))
    truth = min(1.0, math.sqrt(kl_clip / total)) if total > 0 else 1.0
    assert nu.shape == ()
    assert nu.dtype == dtype
    assert nu.item() == pytest.approx(truth, rel=1e-5 if dtype == torch.float32 else 1e-12)


@settings(deadline=None)
@given(layers_of_a_model, st.floats(1e-8, 1e3))
def test_the_scaled_step_is_within_the_bound_and_no_shorter_than_it_has_to_be(
    layers: list[tuple[float, float]], kl_clip: float
) -> None:
    products, rates = (torch.tensor(column, dtype=torch.float64) for column in zip(*layers, strict=True))
    nu = kl_clip_scale(products, rates, kl_clip).item()
    quadratic = nu**2 * float((rates**2 * products).sum())
    assert 0 < nu <= 1
    assert quadratic <= kl_clip * (1 + 1e-12)
    assert nu == 1 or quadratic >= kl_clip * (1 - 1e-12)


def test_no_clip() -> None:
    assert kl_clip_scale(torch.tensor([1e30]), torch.ones(1), None) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_broken_layer_does_not_take_part(bad: float) -> None:
    products, rates = torch.tensor([3.0, bad, 5.0]), torch.tensor([1.0, 2.0, 2.0])
    assert kl_clip_scale(products, rates, 0.5) == kl_clip_scale(products[[0, 2]], rates[[0, 2]], 0.5)
    assert kl_clip_scale(torch.tensor([bad]), torch.ones(1), 0.5) == 1


@pytest.mark.parametrize("rate", [0.0, 1e-30])
def test_nothing_to_clip(rate: float) -> None:
    assert kl_clip_scale(torch.tensor([5.0]), torch.tensor([rate]), 1e-3) == 1
    assert kl_clip_scale(torch.zeros(2), torch.ones(2), 1e-3) == 1


def test_a_negative_sum_is_no_reason_to_clip() -> None:
    """<V, W> is positive for positive definite inverses; rounding of a tiny one may not be."""
    assert kl_clip_scale(torch.tensor([-1e-3]), torch.ones(1), 1e-3) == 1
