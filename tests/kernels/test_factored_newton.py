"""Warm refresh of the inverse Cholesky factor: contraction, changes of factor and damping, and starts from far off."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import energy_error
from support.refreshes import assert_honest, exact_root, refresh, with_condition

from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.kernels.certificate import damped, mirror, root_residual
from kfac_triton.kernels.factored_newton.reference import _spectral_bounds


@settings(max_examples=80, deadline=None)
@given(n=st.integers(1, 80), power=st.floats(1, 6), size=st.floats(1e-6, 0.5), seed=st.integers(0, 2**32))
def test_one_step_contracts_quadratically(n: int, power: float, size: float, seed: int) -> None:
    """||R'|| <= 1.5 ||R||^2 + 0.5 ||R||^3 for R = I - c M, and the residual that comes out says just that."""
    torch.manual_seed(seed)
    factor, damping = with_condition(n, 10**power)[None], torch.ones(1, dtype=torch.float64)
    target = damped(factor, damping)
    noise = torch.randn(n, n, dtype=torch.float64).tril()
    start = (torch.eye(n, dtype=torch.float64) + 0.4 * size * noise / torch.linalg.matrix_norm(noise)) @ exact_root(target)
    energy, unscaled, rounding = root_residual(target, start)
    assert unscaled <= 0.5
    scale = energy.diagonal(dim1=-2, dim2=-1).sum(-1) / energy.square().sum((-2, -1))
    _, before, _ = root_residual(target, scale.sqrt() * start)
    assert before <= unscaled + rounding
    root, residual = refresh(factor, damping, start, max_steps=1)
    _, after, _ = root_residual(target, root)
    bound = 1.5 * before**2 + 0.5 * before**3
    assert after <= bound + 10 * rounding
    # The refresh takes its distance from c M, while `before` comes from the product made anew with the scaled root. Each is off
    # by the rounding at most, and the bound by that times its derivative.
    widest = before + 2 * rounding
    atol = float(2 * rounding * (3 * widest + 1.5 * widest**2))
    torch.testing.assert_close(residual, bound + scale * rounding, rtol=1e-12, atol=atol)


def test_steps_add_up_to_convergence() -> None:
    """Digits double: from a tenth to the rounding error in four steps, and repeated calls stay there."""
    factor, damping = with_condition(50, 1e3)[None], torch.ones(1, dtype=torch.float64)
    target = damped(factor, damping)
    noise = torch.randn(50, 50, dtype=torch.float64).tril()
    root = (torch.eye(50, dtype=torch.float64) + 0.05 * noise / torch.linalg.matrix_norm(noise)) @ exact_root(target)
    errors = []
    for _ in range(8):
        root, residual = refresh(factor, damping, root, max_steps=1)
        errors.append(energy_error(target[0], root[0].T @ root[0]))
        assert errors[-1] <= residual
    assert errors[0] <= 2e-2
    assert errors[3] <= 1e-12
    assert errors[7] <= 1e-12
    torch.testing.assert_close(root[0].T @ root[0], torch.linalg.inv(target[0]), rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 80),
    changes=st.lists(st.floats(0.05, 0.3), min_size=1, max_size=4),
    power=st.floats(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_warm_refresh_after_a_step_of_the_moving_average(
    n: int, changes: list[float], power: float, dtype: torch.dtype, seed: int
) -> None:
    """Fresh statistics with a weight of 5 to 30 % in a factor of the same distribution: certified, and nearly exact."""
    torch.manual_seed(seed)
    units = torch.logspace(0, -power / 2, n, dtype=torch.float64)
    damping = torch.tensor([10**-power * (1 + i) for i in range(len(changes))], dtype=dtype)
    factors, roots = [], []
    for change, d in zip(changes, damping.double(), strict=True):
        old, new = (torch.randn(3 * n + 10, n, dtype=torch.float64) * units for _ in range(2))
        old, new = old.T @ old / len(old), new.T @ new / len(new)
        roots.append(exact_root(old + d * torch.eye(n, dtype=torch.float64)))
        factors.append(mirror((1 - change) * old + change * new))
    factor, root = torch.stack(factors).to(dtype), torch.stack(roots).to(dtype)
    root, residual = refresh(factor, damping, root)
    assert_honest(factor, damping, root, residual)
    assert (residual <= 0.05).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 80),
    power=st.floats(1, 8),
    jumps=st.lists(st.sampled_from([0.1, 0.5, 2.0, 10.0]), min_size=1, max_size=4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_jumps_of_the_damping(n: int, power: float, jumps: list[float], dtype: torch.dtype, seed: int) -> None:
    """Ten times up or down: honest at any condition number, and certified where the type has the digits."""
    torch.manual_seed(seed)
    factor = torch.stack([with_condition(n, 10**power) for _ in jumps])
    root = exact_root(damped(factor, torch.ones(len(jumps), dtype=torch.float64))).to(dtype)
    factor, damping = factor.to(dtype), torch.tensor(jumps, dtype=dtype)
    root, residual = refresh(factor, damping, root)
    assert_honest(factor, damping, root, residual)
    if power <= 4 or dtype == torch.float64:
        assert (residual <= ACCEPT).all()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    power=st.floats(0.1, 8),
    off=st.floats(-12, 12),
    kind=st.sampled_from(["noise", "scaled", "zero", "diagonal", "flipped"]),
    steps=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_starts_from_far_off(n: int, power: float, off: float, kind: str, steps: int, dtype: torch.dtype, seed: int) -> None:
    """Certified rightly or not at all."""
    torch.manual_seed(seed)
    factor, damping = with_condition(n, 10**power)[None], torch.ones(1, dtype=torch.float64)
    root = {
        "noise": 10**off * torch.randn(1, n, n, dtype=torch.float64).tril(),
        "scaled": 10**off * exact_root(damped(factor, damping)),
        "zero": torch.zeros(1, n, n, dtype=torch.float64),
        "diagonal": 10**off * torch.eye(n, dtype=torch.float64)[None],
        "flipped": exact_root(damped(factor, damping)).flip(1, 2).mT.tril(),
    }[kind]
    factor, damping = factor.to(dtype), damping.to(dtype)
    root, residual = refresh(factor, damping, root.to(dtype), max_steps=steps)
    assert_honest(factor, damping, root, residual)
    if kind == "zero":
        assert residual > ACCEPT


@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e10, 1e15, 1e18])
def test_squares_beyond_the_type_do_not_stop_a_repair(scale: float) -> None:
    """The residual's entries are numbers, the sum of their squares is not."""
    factor, damping = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.ones(1)
    start = scale * torch.tensor([[[1.0, 0.0], [0.5, -0.3]]])
    root, residual = refresh(factor, damping, start)
    assert_honest(factor, damping, root, residual)
    assert (residual <= 0.05) == (scale > 1e-20)


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("scale", [1e20, 1e30])
def test_a_start_whose_residual_overflows_keeps_its_root(scale: float, steps: int) -> None:
    factor, damping = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.ones(1)
    start = scale * torch.tensor([[[1.0, 0.0], [0.5, -0.3]]])
    root, residual = refresh(factor, damping, start, max_steps=steps)
    assert_honest(factor, damping, root, residual)
    assert residual == torch.inf
    assert torch.equal(root, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-2, 10.0, 1e6])
def test_a_wrong_unit_is_repaired(scale: float, dtype: torch.dtype) -> None:
    """The scaled step centres the spectrum first, so a factor of a million costs no more than a factor of ten."""
    factor, damping = with_condition(30, 1e2)[None], torch.ones(1, dtype=torch.float64)
    root = scale * exact_root(damped(factor, damping))
    root, residual = refresh(factor.to(dtype), damping.to(dtype), root.to(dtype), max_steps=4)
    assert residual <= 0.05
    assert_honest(factor.to(dtype), damping.to(dtype), root, residual)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_factor_that_is_not_finite_keeps_its_root_and_harms_no_other(bad: float) -> None:
    factor = torch.stack([with_condition(12, 1e3)] * 3)
    damping = torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64)
    root = exact_root(damped(1.2 * factor, damping))
    clean, certificates = refresh(factor, damping, root)
    broken = factor.clone()
    broken[1, 4, 7] = broken[1, 7, 4] = bad
    result, residual = refresh(broken, damping, root)
    assert residual[1] == torch.inf
    assert torch.equal(result[1], root[1])
    torch.testing.assert_close(result[[0, 2]], clean[[0, 2]], rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(residual[[0, 2]], certificates[[0, 2]], rtol=1e-6, atol=1e-15)


def test_a_root_that_is_not_finite_is_not_certified() -> None:
    factor, damping = torch.stack([with_condition(6, 10.0)] * 2), torch.ones(2, dtype=torch.float64)
    root = exact_root(damped(factor, damping))
    root[0, 3, 1] = torch.nan
    _, residual = refresh(factor, damping, root)
    assert residual[0] == torch.inf
    assert residual[1] <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrices_of_one_stack_do_not_know_each_other(dtype: torch.dtype) -> None:
    """Near and far ones, dampings apart: each as if it were alone, also in the number of its steps."""
    factor = torch.stack([with_condition(20, c) for c in (10.0, 1e3, 1e5, 1e2)])
    damping = torch.tensor([1.0, 3.0, 0.5, 1e-2], dtype=torch.float64)
    start = exact_root(damped(factor, torch.ones(4, dtype=torch.float64))).to(dtype)
    factor, damping = factor.to(dtype), damping.to(dtype)
    root, residual = refresh(factor, damping, start)
    for i in range(4):
        alone, certificate = refresh(factor[i : i + 1], damping[i : i + 1], start[i : i + 1])
        torch.testing.assert_close(root[i], alone[0], rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6)
        torch.testing.assert_close(residual[i], certificate[0], rtol=1e-2, atol=1e-6)


def test_one_step_is_taken_in_any_case_and_no_more_than_needed() -> None:
    """From an exact root one step is enough whatever is allowed; inputs stay."""
    factor, damping = with_condition(15, 1e2)[None], torch.ones(1, dtype=torch.float64)
    start, before = exact_root(damped(factor, damping)), factor.clone()
    once, residual = refresh(factor, damping, start, tolerance=0.05, max_steps=1)
    many, certificate = refresh(factor, damping, start, tolerance=0.05, max_steps=8)
    assert torch.equal(once, many)
    assert torch.equal(residual, certificate)
    assert torch.equal(factor, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 60), power=st.floats(0, 6), unit=st.floats(-6, 6), seed=st.integers(0, 2**32))
def test_spectral_bounds_are_within_reach(n: int, power: float, unit: float, seed: int) -> None:
    """Estimates, not bounds: the top within 0.5 to 1.05 times the largest eigenvalue, the bottom between 0 and the top."""
    torch.manual_seed(seed)
    matrix = 10**unit * (with_condition(n, 10**power) + torch.eye(n, dtype=torch.float64))
    lower, upper = _spectral_bounds(matrix[None])
    largest = torch.linalg.matrix_norm(matrix, 2)
    assert 0.5 * largest <= upper <= 1.05 * largest * (1 + 1e-12)
    assert 0 < lower <= upper
    assert 1e-3 * upper <= lower * (1 + 1e-12)


def test_what_is_lost_below_the_normal_numbers_is_in_the_residual() -> None:
    """T B is a number of few digits here, which makes M wrong by more than its rounding."""
    factor = torch.logspace(-43.2, -38, 2000, dtype=torch.float64).float()[:, None, None]
    root = 10 ** torch.empty(len(factor)).uniform_(2.5, 4)[:, None, None]
    damping = torch.full((len(factor),), 1.4e-45)
    root, residual = refresh(factor, damping, root, backend="torch")
    error = (root.double() ** 2 * (factor.double() + damping.double()[:, None, None]) - 1).abs().flatten()
    certified = residual.isfinite()
    assert certified.sum() > 1000
    floor = 2e-6  # below it a certificate says no more than that float32 was used
    assert error[certified].max() > floor
    assert (error <= residual.clamp_min(floor))[certified].all()
