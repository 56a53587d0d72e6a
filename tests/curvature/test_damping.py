"""Factored Tikhonov damping: the formula, its invariances, and layers without a usable trace."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_triton.curvature.damping import pi_split

TYPES = [torch.float32, torch.float64]
positive = st.floats(1e-6, 1e6)


@settings(deadline=None)
@given(
    layers=st.lists(st.tuples(positive, st.integers(1, 5000), positive, st.integers(1, 5000)), min_size=1, max_size=5),
    damping=st.floats(1e-12, 1e3),
    dtype=st.sampled_from(TYPES),
    as_tensor=st.booleans(),
)
def test_formula(layers: list[tuple[float, int, float, int]], damping: float, dtype: torch.dtype, as_tensor: bool) -> None:
    """Martens and Grosse 2015, section 6.3, in Python floats."""
    trace_a, size_a, trace_g, size_g = (torch.tensor(column, dtype=dtype) for column in zip(*layers, strict=True))
    split = pi_split(trace_a / size_a, trace_g / size_g, torch.tensor(damping) if as_tensor else damping)
    rtol = {torch.float32: 1e-5, torch.float64: 1e-6 if as_tensor else 1e-12}[dtype]
    for i, (ta, na, tg, ng) in enumerate(layers):
        pi = math.sqrt((ta / na) / (tg / ng))
        assert split.pi[i].item() == pytest.approx(pi, rel=rtol)
        assert split.a[i].item() == pytest.approx(math.sqrt(damping) * pi, rel=rtol)
        assert split.g[i].item() == pytest.approx(math.sqrt(damping) / pi, rel=rtol)
    assert split.a.dtype == split.g.dtype == split.pi.dtype == dtype


@settings(deadline=None)
@given(ta=positive, tg=positive, na=st.integers(1, 100), ng=st.integers(1, 100), damping=st.floats(1e-12, 1e3))
def test_the_product_is_the_damping_and_the_ratio_that_of_the_means(
    ta: float, tg: float, na: int, ng: int, damping: float
) -> None:
    """The damping that each factor gets is the same share of its mean eigenvalue."""
    split = pi_split(*(torch.tensor([x], dtype=torch.float64) for x in (ta / na, tg / ng)), damping)
    assert (split.a * split.g).item() == pytest.approx(damping, rel=1e-12)
    assert (split.a / (ta / na)).item() == pytest.approx((split.g / (tg / ng)).item(), rel=1e-12)


@settings(deadline=None)
@given(ta=positive, tg=positive, power=st.integers(-8, 8))
def test_moving_a_unit_from_inputs_to_gradients_moves_the_damping(ta: float, tg: float, power: int) -> None:
    """A -> s^2 A, G -> G / s^2 is the same Fisher matrix: damped alike, to the last bit for powers of two."""
    scale = 4.0**power
    plain = pi_split(torch.tensor([ta]).double(), torch.tensor([tg]).double(), 0.25)
    moved = pi_split(torch.tensor([ta * scale]).double(), torch.tensor([tg / scale]).double(), 0.25)
    assert torch.equal(moved.a, plain.a * scale)
    assert torch.equal(moved.g, plain.g / scale)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("trace_a", "trace_g"),
    [
        (0.0, 1.0),
        (1.0, 0.0),
        (0.0, 0.0),
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, 1.0),
        (1.0, math.inf),
        (math.inf, math.inf),
        (-1.0, 1.0),
    ],
)
def test_without_a_usable_trace_the_split_is_even(trace_a: float, trace_g: float, dtype: torch.dtype) -> None:
    """And the layer beside it does not notice."""
    split = pi_split(torch.tensor([trace_a, 4.0], dtype=dtype), torch.tensor([trace_g, 1.0], dtype=dtype), torch.tensor(0.25))
    assert split.pi.tolist() == [1.0, 2.0]
    assert split.a.tolist() == [0.5, 1.0]
    assert split.g.tolist() == [0.5, 0.25]


def test_one_damping_a_layer() -> None:
    one = torch.ones(3)
    split = pi_split(one, one, torch.tensor([1.0, 4.0, 9.0]))
    assert split.a.tolist() == split.g.tolist() == [1.0, 2.0, 3.0]
