"""What benchmarks/steps/refresh_steps.py observes of refreshes: steps, power iterations, certificates and errors."""

from __future__ import annotations

import math

import pytest
import torch
from support.helpers import energy_error
from support.refreshes import exact_root, with_condition
from torch import Tensor

from benchmarks.steps import refresh_steps
from benchmarks.steps.refresh_steps import Observation, Recorder, row, summary
from kfac_triton.kernels import ops

SIDE = 24


def stack(*scales: float, condition: float = 1e3) -> tuple[Tensor, Tensor, Tensor]:
    """Factors with damping 1, and the roots of factors that are so many times as large: a scale of 1 is an exact start."""
    torch.manual_seed(0)
    factors = [with_condition(SIDE, condition) for _ in scales]
    starts = [exact_root(scale * factor + torch.eye(SIDE)) for factor, scale in zip(factors, scales, strict=True)]
    return torch.stack(factors).float(), torch.ones(len(scales)), torch.stack(starts).float()


def test_the_results_are_those_of_the_operation() -> None:
    factor, damping, start = stack(1.0, 1.2, 4.0)
    expected, found = start.clone(), start.clone()
    bounds, certificates = torch.empty(3), torch.empty(3)
    ops.factored_newton_refresh([factor], [damping], [expected], [bounds])
    Recorder()([factor], [damping], [found], [certificates])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(certificates, bounds, rtol=1e-3, atol=1e-5)


def test_the_steps_are_the_fewest_that_give_the_result() -> None:
    factor, damping, start = stack(1.0, 1.2, 4.0, 30.0)
    recorder = Recorder()
    recorder([factor], [damping], [start.clone()], [torch.empty(4)])
    for i, observation in enumerate(recorder.observations):
        one = slice(i, i + 1)
        results = []
        for steps in range(1, 9):
            root = start[one].clone()
            ops.factored_newton_refresh([factor[one]], [damping[one]], [root], [torch.empty(1)], max_steps=steps)
            results.append(root)
        fewest = next(steps for steps, root in enumerate(results, start=1) if torch.equal(root, results[-1]))
        assert observation.steps == fewest
    assert [o.side for o in recorder.observations] == [SIDE] * 4
    assert recorder.observations[0].steps == 1 < recorder.observations[2].steps
    assert recorder.observations[0].iterated == 0 < recorder.observations[3].iterated


def test_errors_are_computed_where_they_are_asked_for() -> None:
    factor, damping, start = stack(1.0, 1.2)
    recorder, root = Recorder(), start.clone()
    recorder([factor], [damping], [root], [torch.empty(2)])
    for i, observation in enumerate(recorder.observations):
        target = factor[i].double() + torch.eye(SIDE, dtype=torch.float64)
        exact = energy_error(target, root[i].double().T @ root[i].double())
        assert observation.error is not None
        assert exact * (1 - 1e-6) <= observation.error <= max(observation.certificate, exact * (1 + 1e-6))
    recorder = Recorder(checks=False)
    recorder([factor], [damping], [start.clone()], [torch.empty(2)])
    assert [o.error for o in recorder.observations] == [None, None]


def test_the_norm_is_exact_where_its_bound_does_not_settle_it() -> None:
    target = torch.eye(4, dtype=torch.float64)
    root = 2 * target  # I - B^1/2 X B^1/2 = -3 I, of 2-norm 3 and Frobenius norm 6
    assert refresh_steps.energy_error(target, root, enough=6.0) == pytest.approx(6.0)
    assert refresh_steps.energy_error(target, root, enough=5.0) == pytest.approx(3.0)


def test_a_refused_inverse_is_a_fallback_and_its_start_no_refresh() -> None:
    factor, damping, start = stack(1.0, 1e12)
    recorder = Recorder()
    recorder([factor], [damping], [start.clone()], [torch.empty(2)], 0.05, 1)
    assert [o.certificate <= 0.3 for o in recorder.observations] == [True, False]
    assert recorder.observations[1].error is None
    assert summary(recorder.observations)["fallbacks"] == 1
    recorder = Recorder()
    recorder([factor], [damping], [torch.zeros_like(start)], [torch.empty(2)])  # as a refused inverse leaves it
    assert recorder.observations == []


def test_the_number_of_steps_can_be_limited() -> None:
    """Where the first step needs the power iteration, one step is not enough."""
    stacks = [[x] for x in stack(30.0)]
    recorder = Recorder(most_steps=1)
    recorder(*stacks, [torch.empty(1)], 0.05, 8)
    assert [(o.steps, o.iterated) for o in recorder.observations] == [(1, 1)]
    assert summary(recorder.observations)["fallbacks"] == 1


def test_the_decay_is_that_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[float] = []
    monkeypatch.setattr(refresh_steps, "make_kfac", lambda model, given: settings.append(given["ema_decay"]) or 1 / 0)
    for decay in (None, 0.5):
        with pytest.raises(ZeroDivisionError):
            refresh_steps.measure("gpt", 0.1, steps=1, width=0.03, decay=decay)
    assert settings == [0.95, 0.5]


def test_summary_by_hand() -> None:
    observations = [
        Observation(8, 1, 0, 0.04, 0.01),
        Observation(8, 1, 0, 0.04, 0.05),  # above its certificate, but not above what is accepted
        Observation(8, 2, 1, 0.04, None),
        Observation(8, 5, 3, 0.2, 0.4),  # missed
        Observation(8, 8, 8, math.inf, None),  # refused
    ]
    found = summary(observations)
    assert found == {
        "refreshes": 5, "one": 0.4, "two": 0.2, "three": 0.0, "four": 0.0, "more": 0.4, "mean": 17 / 5, "iterated": 0.6,
        "fallbacks": 1, "checked": 3, "above": 2, "missed": 1, "worst": 0.4,
    }  # fmt: skip
    assert row("a", found, 1.5).count("|") == refresh_steps.HEADER.splitlines()[0].count("|")


@pytest.mark.parametrize("name", refresh_steps.MODELS)
def test_a_training_run_in_miniature(name: str) -> None:
    observations, loss = refresh_steps.measure(name, 0.1, steps=3, check_every=3, width=0.03, decay=0.6)
    assert math.isfinite(loss)
    found = summary(observations)
    assert found["fallbacks"] == found["missed"] == 0
    # Two refreshes of each factor, as the first step inverts from scratch; errors in the third step.
    assert len(observations) == found["refreshes"] == 2 * found["checked"] > 0


def test_a_run_with_another_rule() -> None:
    """A rule that never finds anything wrong: what it observes is its own, and the package's is as before."""
    calls: list[int] = []
    code = """
def root_energy(target, root):
    return root @ target @ root.mT, 0.0
def _spectral_bounds(matrix):
    return matrix, matrix
def rule(factors, dampings, roots, residuals, tolerance, max_steps):
    calls.append(max_steps)
    for _ in range(2):
        root_energy(factors[0], roots[0])
    _spectral_bounds(factors[0])
    residuals[0].fill_(0.01)
"""
    names = {"calls": calls}
    exec(code, names)
    original = ops.factored_newton_refresh
    observations, _ = refresh_steps.measure("gpt", 0.1, steps=2, check_every=9, width=0.03, refresh=names["rule"])  # type: ignore[arg-type]
    assert len(calls) == len(observations) > 0
    assert {(o.steps, o.iterated, o.error) for o in observations} == {(2, 1, None)}
    assert ops.factored_newton_refresh is original
