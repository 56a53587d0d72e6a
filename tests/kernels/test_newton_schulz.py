"""Newton-Schulz cold start against torch.linalg in float64, and the schedule that it follows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.kernels import ops
from kfac_triton.kernels.certificate import mirror
from kfac_triton.kernels.newton_schulz.reference import chebyshev_step


def with_condition(n: int, condition: float, damping: float = 1.0) -> Tensor:
    """A factor in float64 whose damped eigenvalues go from damping to damping * condition."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return mirror((basis * damping * (torch.logspace(0, math.log10(condition), n, dtype=torch.float64) - 1)) @ basis.T)


def invert(factor: Tensor, damping: Tensor, tolerance: float = 1e-3, max_steps: int = 40) -> tuple[Tensor, Tensor]:
    """Outputs start as NaN: they are not read."""
    inverse, residual = torch.full_like(factor, torch.nan), torch.full_like(damping, torch.nan)
    ops.newton_schulz_inverse(factor, damping, inverse, residual, tolerance, max_steps)
    return inverse, residual


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 80),
    conditions=st.lists(st.floats(1, 8), min_size=1, max_size=4),
    unit=st.floats(-10, 10),
    tolerance=st.sampled_from([1e-1, 1e-3, 1e-9]),
    seed=st.integers(0, 2**32),
)
def test_against_linalg(n: int, conditions: list[float], unit: float, tolerance: float, seed: int) -> None:
    """Each matrix with a damping of its own; the eigenvalues of X B end within the tolerance below 1."""
    torch.manual_seed(seed)
    dampings = torch.tensor([10 ** (unit + i) for i in range(len(conditions))], dtype=torch.float64)
    factors = torch.stack([with_condition(n, 10**c, d) for c, d in zip(conditions, dampings.tolist(), strict=True)])
    inverses, residual = invert(factors, dampings, tolerance)
    assert torch.equal(inverses, inverses.mT)
    identity = torch.eye(n, dtype=torch.float64)
    for factor, damping, inverse, certificate, power in zip(
        factors, dampings, inverses, residual.tolist(), conditions, strict=True
    ):
        lower = torch.linalg.cholesky(factor + damping * identity)
        values = torch.linalg.eigvalsh(lower.T @ inverse @ lower)
        noise = 1e-13 * n * 10**power
        assert values[0] >= 1 - tolerance - noise
        assert values[-1] <= 1 + noise
        assert certificate <= math.sqrt(n) * tolerance + noise
        if tolerance == 1e-9:
            truth = torch.linalg.inv(factor + damping * identity)
            assert torch.linalg.matrix_norm(inverse - truth, 2) <= (tolerance + noise) * torch.linalg.matrix_norm(truth, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_one_stack_do_not_know_each_other(dtype: torch.dtype) -> None:
    """Fast and slow ones together: each as if it were alone."""
    factors = torch.stack([with_condition(33, c) for c in (1.5, 1e2, 1e7, 1e3)]).to(dtype)
    damping = torch.tensor([1.0, 10.0, 1.0, 0.1], dtype=dtype)
    inverses, residual = invert(factors, damping)
    for i in range(4):
        alone, certificate = invert(factors[i : i + 1], damping[i : i + 1])
        torch.testing.assert_close(inverses[i], alone[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(residual[i], certificate[0], rtol=1e-3, atol=1e-7)


def test_inputs_are_not_written() -> None:
    factors, damping = with_condition(10, 1e3)[None], torch.ones(1, dtype=torch.float64)
    before = factors.clone()
    invert(factors, damping)
    assert torch.equal(factors, before)
    assert damping.item() == 1


@settings(max_examples=200, deadline=None)
@given(st.floats(-12, -1e-6))
def test_a_step_maps_the_spectrum_into_its_new_bounds(exponent: float) -> None:
    """h(m) = h0 m + h1 m^2 takes [lower, 1] into [after, 1], and the smallest eigenvalue grows."""
    lower = torch.tensor([10.0**exponent], dtype=torch.float64)
    h0, h1, after = chebyshev_step(lower)
    spectrum = torch.cat([lower, torch.logspace(exponent, 0, 2001, dtype=torch.float64).clamp(lower.item(), 1.0)])
    image = h0 * spectrum + h1 * spectrum**2
    assert image.min() >= after * (1 - 1e-12)
    assert image.max() <= 1 + 1e-12
    assert after > lower
    assert after <= 1
    # at least the doubling of plain Newton-Schulz
    assert after >= lower * (2 - lower) * (1 - 1e-12)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-12, -1e-6), min_size=1, max_size=6))
def test_steps_of_a_batch_are_elementwise(exponents: list[float]) -> None:
    lower = 10 ** torch.tensor(exponents, dtype=torch.float64)
    batch = torch.stack(chebyshev_step(lower))
    alone = torch.cat([torch.stack(chebyshev_step(x[None])) for x in lower], 1)
    torch.testing.assert_close(batch, alone, rtol=1e-14, atol=0)


def doublings(condition: float) -> int:
    lower, count = torch.tensor([1 / condition], dtype=torch.float64), 0
    while 1 - lower > 1e-3:
        lower, count = chebyshev_step(lower.clamp_max(1 - 1e-12))[2], count + 1
    return count


def plain_doublings(condition: float) -> int:
    lower, count = 1 / condition, 0
    while 1 - lower > 1e-3:
        lower, count = lower * (2 - lower), count + 1
    return count


def test_numbers_of_doublings() -> None:
    """Fewer than two thirds of plain Newton-Schulz; far from the default limit of 40 steps."""
    conditions = [1e2, 1e3, 1e4, 1e8]
    assert [doublings(c) for c in conditions] == [6, 8, 10, 17]
    assert [plain_doublings(c) for c in conditions] == [10, 13, 17, 30]


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_too_few_steps_are_not_certified(steps: int) -> None:
    factor, damping = with_condition(20, 1e6)[None], torch.ones(1, dtype=torch.float64)
    inverse, residual = invert(factor, damping, max_steps=steps)
    assert residual > 0.3
    error = energy_error(factor[0] + torch.eye(20, dtype=torch.float64), inverse[0])
    assert error <= residual.item() * (1 + 1e-9)  # and still honest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-30, 1e-10, 1.0, 1e10, 1e30])
def test_powers_of_two_as_units_change_nothing(unit: float, dtype: torch.dtype) -> None:
    """(s A + s d I)^-1 = (A + d I)^-1 / s, bit for bit when s is a power of two."""
    scale = 2.0 ** round(math.log2(unit))
    factor, damping = with_condition(24, 1e4)[None].to(dtype), torch.ones(1, dtype=dtype)
    factor, damping = factor / 1e4, damping / 1e4
    plain, residual = invert(factor, damping)
    scaled, certificate = invert(factor * scale, damping * scale)
    assert torch.equal(scaled * scale, plain)
    assert torch.equal(certificate, residual)


@pytest.mark.parametrize("bad", [0.0, -0.5, torch.nan, torch.inf])
def test_a_damping_that_is_no_lower_bound_is_not_certified(bad: float) -> None:
    """Of a factor that is not definite without it; its neighbour is inverted."""
    factor = torch.stack([torch.diag(torch.tensor([1.0, 0.0, 0.0]))] * 2)
    _, residual = invert(factor, torch.tensor([bad, 0.5]))
    assert not residual[0] <= 0.3
    assert residual[1] <= 1e-2
