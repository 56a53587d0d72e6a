"""The pi split of the damping."""

from __future__ import annotations

import torch

from kfac_triton.damping import pi_split


def test_product_is_the_damping_and_pi_balances_the_traces() -> None:
    trace_a, size_a = torch.tensor([8.0, 3.0]), torch.tensor([4, 3])
    trace_g, size_g = torch.tensor([1.0, 12.0]), torch.tensor([2, 3])
    split = pi_split(trace_a, size_a, trace_g, size_g, 0.09)
    torch.testing.assert_close(split.a * split.g, torch.full((2,), 0.09))
    torch.testing.assert_close(split.pi, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(split.a, 0.3 * split.pi)


def test_scaling_one_factor_scales_its_damping() -> None:
    """For any c, c A (x) G / c is the same curvature: the split must not see c."""
    one = torch.ones(1)
    plain, scaled = pi_split(4 * one, one, one, one, 0.01), pi_split(400 * one, one, one / 100, one, 0.01)
    torch.testing.assert_close(scaled.a, 100 * plain.a)
    torch.testing.assert_close(scaled.g, plain.g / 100)


def test_dead_layers_split_evenly() -> None:
    traces = torch.tensor([0.0, 1.0, 0.0, torch.nan, torch.inf])
    split = pi_split(traces, torch.ones(5), traces.flip(0) * 0, torch.ones(5), 0.04)
    assert split.pi.tolist() == [1.0] * 5
    torch.testing.assert_close(split.a, torch.full((5,), 0.2))
