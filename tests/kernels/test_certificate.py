"""Certificates of inverses against the energy-norm error in float64, over five families of spectra."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.curvature.factorizations import cholesky, eigh
from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.kernels import ops
from kfac_triton.kernels.certificate import (
    COMPUTED,
    damped,
    inverse_residual,
    mirror,
    probe_error,
    root_residual,
    rounding_error,
)

# What holds in float32: a certified inverse has at most this many times the error that its certificate states. The largest in
# 1e7 matrices of two to four rows for Newton-Schulz, 5e5 for the others, condition numbers to 1e9: 2.46.
SLACK = 2.5

FAMILIES = ["log-spaced", "rank-deficient", "spike", "flat", "scaled Gram"]


def factor(family: str, n: int, condition: float) -> Tensor:
    """A positive semidefinite matrix in float64 with largest eigenvalue about 1."""
    log = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    if family == "scaled Gram":  # of half rank, columns in units far apart
        rows = torch.randn(max(1, n // 2), n, dtype=torch.float64) * log.sqrt()
        return mirror(rows.T @ rows / len(rows))
    spectrum = {
        "log-spaced": log,
        "rank-deficient": torch.where(torch.arange(n) < max(1, n // 2), log, 0.0),
        "spike": torch.full_like(log, 1 / condition).index_fill(0, torch.tensor(0), 1.0),
        "flat": torch.ones_like(log),
    }[family]
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return mirror((basis * spectrum) @ basis.T)


@st.composite
def stacks(draw: st.DrawFn, most: int = 80, power: float = 8) -> tuple[Tensor, Tensor]:
    """(factors, dampings) in float64: one size, each matrix of a family, a condition number and a unit of its own."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, most))
    factors, dampings = [], []
    for _ in range(draw(st.integers(1, 4))):
        condition, unit = 10 ** draw(st.floats(1, power)), 10 ** draw(st.floats(-6, 6))
        factors.append(unit * factor(draw(st.sampled_from(FAMILIES)), n, condition))
        dampings.append(unit / condition)
    return torch.stack(factors), torch.tensor(dampings, dtype=torch.float64)


def newton_schulz(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    inverse, residual = torch.full_like(factors, torch.nan), torch.full_like(damping, torch.nan)
    ops.newton_schulz_inverse(factors, damping, inverse, residual, tolerance=1e-2)
    return inverse.double(), residual


def coarse_newton_schulz(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    inverse, residual = torch.full_like(factors, torch.nan), torch.full_like(damping, torch.nan)
    ops.newton_schulz_inverse(factors, damping, inverse, residual, tolerance=0.29)
    return inverse.double(), residual


def factored_newton(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """From the root of a matrix that a quarter of the way leads away from."""
    n = factors.shape[-1]
    rows = torch.randn(len(factors), 2 * n, n, dtype=torch.float64) @ factors.double()
    drift = rows.mT @ rows
    drift *= (factors.double().abs().amax((-2, -1)) / drift.abs().amax((-2, -1)).clamp_min(1e-30))[:, None, None]
    before = mirror(0.75 * factors.double() + 0.25 * drift)
    root, _ = cholesky(before, damping.double(), True, torch.float64)
    root, residual = root.to(factors.dtype), torch.full_like(damping, torch.nan)
    ops.factored_newton_refresh([factors], [damping], [root], [residual])
    return root.double().mT @ root.double(), residual


def cholesky_root(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    root, residual = cholesky(factors, damping, True, factors.dtype)
    return root.double().mT @ root.double(), residual


def cholesky_inverse(factors: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    return cholesky(factors, damping, False, factors.dtype)


METHODS: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = [
    newton_schulz,
    coarse_newton_schulz,
    factored_newton,
    cholesky_root,
    cholesky_inverse,
    eigh,
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@settings(max_examples=80, deadline=None, derandomize=True)  # the slack rests on a search, not on a proof
@given(stack=stacks())
def test_what_is_certified_is_positive_definite_and_as_exact_as_said(
    method: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], stack: tuple[Tensor, Tensor]
) -> None:
    factors, damping = (x.float() for x in stack)
    inverses, residual = method(factors, damping)
    assert not residual.isnan().any()
    identity = torch.eye(factors.shape[-1], dtype=torch.float64)
    for matrix, shift, inverse, certificate in zip(
        factors.double(), damping.double(), inverses, residual.tolist(), strict=True
    ):
        if certificate > ACCEPT:
            continue
        # Cholesky in float64 raises for a damped factor that is not definite: nothing certifies an inverse of such a one
        error = energy_error(matrix + shift * identity, inverse)
        assert error < 1
        assert error <= SLACK * certificate


# Found by hill climbing from random matrices of that kind: almost of rank one, with a damping that float32 just does not lose.
WORST = {
    "newton_schulz, n = 2": (
        [[0.1453515887260437, -0.025432324036955833], [-0.025432324036955833, 0.004449923988431692]],
        1.4679554238838932e-09,
    ),
    "newton_schulz, n = 3": (
        [
            [0.003565022023394704, 0.09250796586275101, -0.013837798498570919],
            [0.09250796586275101, 3.1128289699554443, -0.5571627616882324],
            [-0.013837798498570919, -0.5571627616882324, 0.10879542678594589],
        ],
        1.386741033115868e-08,
    ),
}


@pytest.mark.parametrize("tolerance", [1e-3, 5e-3, 5e-2])
@pytest.mark.parametrize("name", WORST)
def test_the_worst_matrices_that_a_search_found(name: str, tolerance: float) -> None:
    matrix, damping = torch.tensor([WORST[name][0]]), torch.tensor([WORST[name][1]])
    inverse, residual = torch.empty_like(matrix), torch.empty_like(damping)
    ops.newton_schulz_inverse(matrix, damping, inverse, residual, tolerance)
    target = matrix[0].double() + damping.double() * torch.eye(matrix.shape[-1], dtype=torch.float64)
    assert residual > ACCEPT or energy_error(target, inverse[0]) < 1


@pytest.mark.parametrize("method", [m for m in METHODS if m is not coarse_newton_schulz], ids=lambda m: m.__name__)
def test_well_conditioned_matrices_are_certified(method: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """A certificate that refused everything would pass the test above."""
    factors = torch.stack([factor(family, 40, 1e4) for family in FAMILIES]).float()
    inverses, residual = method(factors, torch.full((5,), 1e-3))
    assert (residual <= ACCEPT).all()
    assert inverses.isfinite().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", [(0, 0), (2, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("method", METHODS[:-1], ids=lambda m: m.__name__)  # eigh: LAPACK may refuse the whole stack
def test_a_matrix_that_is_not_finite_is_never_certified_and_harms_no_other(
    method: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], where: tuple[int, int], bad: float
) -> None:
    clean = torch.stack([factor(family, 4, 1e3) for family in FAMILIES[:3]]).float()
    damping = torch.tensor([1e-2, 1e-3, 1e-1])
    broken = clean.clone()
    broken[1][where] = broken[1][where[::-1]] = bad
    torch.manual_seed(0)
    inverses, residual = method(broken, damping)
    assert residual[1] == torch.inf
    torch.manual_seed(0)
    expected, certificates = method(clean, damping)
    for i in (0, 2):
        torch.testing.assert_close(inverses[i], expected[i], rtol=1e-6, atol=0)
        torch.testing.assert_close(residual[i], certificates[i], rtol=1e-3, atol=1e-7)


@settings(max_examples=60, deadline=None)
@given(stacks(40, power=5), st.floats(1e-6, 1.0))
def test_the_trace_of_the_squared_residual_is_the_energy_norm(stack: tuple[Tensor, Tensor], size: float) -> None:
    """Truncation alone, in float64: the Frobenius norm of I - L^T X L, however badly scaled the matrix is."""
    target = damped(*stack)
    n = target.shape[-1]
    # a wrong inverse with a known error E: X = L^-T (I - E) L^-1
    noise = mirror(torch.randn(target.shape, dtype=torch.float64))
    noise *= size / torch.linalg.matrix_norm(noise)[:, None, None]
    root = torch.linalg.inv(torch.linalg.cholesky(target))
    inverse = mirror(root.mT @ (torch.eye(n, dtype=torch.float64) - noise) @ root)
    rounding = rounding_error(target, inverse.diagonal(dim1=-2, dim2=-1), torch.float64)
    torch.testing.assert_close(
        inverse_residual(target, inverse) - rounding, torch.full_like(rounding, size), rtol=1e-5, atol=1e-8
    )


@settings(max_examples=60, deadline=None)
@given(stacks(40), st.floats(1e-6, 1.0))
def test_root_residual_is_the_distance_of_its_energy_matrix_from_one(stack: tuple[Tensor, Tensor], size: float) -> None:
    target = damped(*stack)
    n = target.shape[-1]
    root = torch.linalg.inv(torch.linalg.cholesky(target))
    root = (torch.eye(n, dtype=torch.float64) + size * torch.randn(n, n, dtype=torch.float64).tril() / n) @ root
    energy, distance, rounding = root_residual(target, root)
    assert torch.equal(energy, energy.mT)
    # the same matrix from factors: T L (T L)^T, which does not cancel
    product = root @ torch.linalg.cholesky(target)
    exact = product @ product.mT
    allowed = 20 * n * rounding
    assert torch.linalg.matrix_norm(energy - exact).le(allowed).all()
    truth = torch.linalg.matrix_norm(exact - torch.eye(n, dtype=torch.float64))
    assert (distance - truth).abs().le(allowed).all()


@settings(max_examples=60, deadline=None)
@given(stacks(40), st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**32))
def test_rounding_error_is_its_formula_and_does_not_know_units(
    stack: tuple[Tensor, Tensor], dtype: torch.dtype, seed: int
) -> None:
    """Rescaling rows and columns by powers of two changes not one bit of it."""
    target = damped(*stack)
    diagonal = torch.linalg.inv(target).diagonal(dim1=-2, dim2=-1).abs()
    torch.manual_seed(seed)
    units = 2.0 ** torch.randint(-20, 21, (target.shape[-1],))
    rounding = rounding_error(target, diagonal, dtype)
    assert torch.equal(rounding_error(target * units[:, None] * units, diagonal / units**2, dtype), rounding)
    unit_roundoff = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}[dtype]
    truth = [COMPUTED * unit_roundoff * float((b.diag() * x).sum()) for b, x in zip(target, diagonal, strict=True)]
    torch.testing.assert_close(rounding.tolist(), truth, rtol=1e-12, atol=0)
    assert (rounding >= COMPUTED * unit_roundoff * target.shape[-1] * (1 - 1e-6)).all()  # B_kk X_kk >= 1


@settings(max_examples=60, deadline=None)
@given(stacks(40), st.floats(0, 3))
def test_the_probe_never_sees_more_than_there_is(stack: tuple[Tensor, Tensor], size: float) -> None:
    """It is a Rayleigh quotient of I - B^1/2 X B^1/2."""
    target = damped(*stack)
    exact = torch.linalg.inv(target)
    wrong = mirror(exact + size * mirror(torch.randn(target.shape, dtype=torch.float64)) * exact.abs().amax((-2, -1), True))
    for matrix, inverse, seen in zip(target, wrong, probe_error(target, wrong).tolist(), strict=True):
        error = energy_error(matrix, inverse)
        assert seen <= error * (1 + 1e-6) + 1e-6


@pytest.mark.parametrize(("scale", "expected"), [(0.0, 1.0), (1.0, 0.0), (2.0, 1.0), (-1.0, 2.0), (torch.nan, torch.nan)])
def test_the_probe_sees_a_wrong_scale(scale: float, expected: float) -> None:
    target = damped(factor("log-spaced", 30, 1e3)[None], torch.tensor([1e-2], dtype=torch.float64))
    seen = probe_error(target, scale * torch.linalg.inv(target))
    torch.testing.assert_close(seen, torch.tensor([expected], dtype=torch.float64), atol=1e-10, rtol=0, equal_nan=True)


def test_mirror_takes_the_lower_triangle() -> None:
    matrix = torch.randn(3, 5, 5)
    result = mirror(matrix)
    assert torch.equal(result, result.mT)
    assert torch.equal(result.tril(), matrix.tril())


def test_damped_adds_to_the_diagonal_of_a_copy() -> None:
    matrix, damping = torch.randn(3, 5, 5), torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    before = matrix.clone()
    result = damped(matrix, damping)
    assert torch.equal(matrix, before)
    assert result.dtype == torch.float32
    assert torch.equal(result, matrix + damping.float()[:, None, None] * torch.eye(5))
