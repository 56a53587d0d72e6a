"""The four inverse methods: their error table, their certificates, and what happens when a method is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.curvature import factorizations
from kfac_triton.curvature.inverse import ACCEPT, InverseStack, resolve
from kfac_triton.kernels.certificate import mirror
from kfac_triton.settings import METHODS

NAMED_METHODS = [m for m in METHODS if m != "auto"]
SIZE = 96
CONDITIONS = [10.0**k for k in range(1, 9)]


def _with_spectrum(spectrum: Tensor) -> Tensor:
    basis = torch.linalg.qr(torch.randn(len(spectrum), len(spectrum), dtype=torch.float64))[0]
    return mirror((basis * spectrum) @ basis.mT)


def _stack() -> tuple[list[str], Tensor, Tensor]:
    """(names, float64 factors, dampings): conditions 1e1 to 1e8 after damping, rank-deficient and zero factors."""
    names, factors, dampings = [], [], []
    for condition in CONDITIONS:
        exponents = torch.linspace(0, -1, SIZE, dtype=torch.float64) * torch.log10(torch.tensor(condition))
        damping = 1 / condition
        names.append(f"condition {condition:.0e}")
        factors.append(_with_spectrum((10**exponents - damping).clamp_min(0)))
        dampings.append(damping)
    for rank, damping in ((SIZE // 2, 1e-3), (1, 1e-5)):
        spectrum = torch.zeros(SIZE, dtype=torch.float64)
        spectrum[:rank] = 1.0
        names.append(f"rank {rank} of {SIZE}, damping {damping:.0e}")
        factors.append(_with_spectrum(spectrum))
        dampings.append(damping)
    for damping in (1e-3, 1e-30):
        names.append(f"zero, damping {damping:.0e}")
        factors.append(torch.zeros(SIZE, SIZE, dtype=torch.float64))
        dampings.append(damping)
    return names, torch.stack(factors), torch.tensor(dampings, dtype=torch.float64)


def _as_inverse(stack: InverseStack) -> Tensor:
    values = stack.values.double()
    return values.mT @ values if stack.factored else values


def _refreshed(method: str, factors: Tensor, damping: Tensor) -> InverseStack:
    """The method's own result: for the warm refresh, from the inverse of a factor that is 10 % away."""
    stack = InverseStack(factors, method, tolerance=0.05)
    if method == "factored":
        count, size = len(factors), factors.shape[-1]
        noise = factors.double() @ torch.randn(count, size, 4 * size, dtype=torch.float64)
        drift = noise @ noise.mT
        drift *= (
            factors.double().diagonal(dim1=-2, dim2=-1).sum(-1) / drift.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(1e-30)
        )[:, None, None]
        stack.refresh(mirror(0.9 * factors.double() + 0.1 * drift).to(factors.dtype), damping)
        stack.fallbacks.zero_()
    stack.refresh(factors, damping)
    return stack


def test_energy_error_table(show: Callable[..., None]) -> None:
    """Nothing non-finite or indefinite is certified, and no certificate is smaller than the error it stands for."""
    names, exact, damping = _stack()
    factors = exact.float()
    identity = torch.eye(SIZE, dtype=torch.float64)
    rows = [[name] for name in names]
    for method in NAMED_METHODS:
        stack = _refreshed(method, factors, damping.float())
        inverses = _as_inverse(stack)
        for i, row in enumerate(rows):
            certificate = float(stack.residual[i])
            used = float(stack.damping[i].double())
            assert torch.isfinite(inverses[i]).all()
            assert certificate <= ACCEPT, f"{method} left {names[i]} without an inverse"
            # float32 inputs: the error counts against the matrix that the method was given
            error = energy_error(factors[i].double() + used * identity, inverses[i])
            assert error < 1, f"{method} certified an indefinite inverse of {names[i]}"
            assert error <= max(certificate, 1e-6), f"{method}: {names[i]}: error {error} above certificate {certificate}"
            marks = ("*" if stack.fallbacks[i] else "") + (f" damping x{10 ** int(stack.raised[i])}" if stack.raised[i] else "")
            row.append(f"{error:.0e} ({certificate:.0e}){marks}")
    show(f"\nEnergy error (certificate) in float32, n = {SIZE}; * fell back to Cholesky")
    header = ["factor", *NAMED_METHODS]
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        show("  " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


@pytest.mark.parametrize("method", NAMED_METHODS)
def test_the_method_itself_serves_ordinary_conditions(method: str) -> None:
    """Up to 1e5, where K-FAC lives, no method needs its fallback."""
    _, exact, damping = _stack()
    stack = _refreshed(method, exact[:5].float(), damping[:5].float())
    assert stack.fallbacks.tolist() == [0] * 5
    assert stack.raised.tolist() == [0] * 5
    assert (stack.residual <= 0.05).all()


@pytest.mark.parametrize("method", NAMED_METHODS)
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_badly_scaled_factors(method: str, scale: float) -> None:
    _, exact, damping = _stack()
    factors = (exact[:4] * scale).float()
    stack = InverseStack(factors, method, tolerance=0.05)
    stack.refresh(factors, (damping[:4] * scale).float())
    assert (stack.residual <= ACCEPT).all()
    for i in range(4):
        used = stack.damping[i].double() * torch.eye(SIZE, dtype=torch.float64)
        assert energy_error(factors[i].double() + used, _as_inverse(stack)[i]) < 1


@pytest.mark.parametrize("method", NAMED_METHODS)
def test_a_matrix_that_is_not_finite_gets_no_inverse_and_harms_no_other(method: str) -> None:
    _, exact, damping = _stack()
    clean, damping = exact[:3].float(), damping[:3].float()
    alone = InverseStack(clean, method, tolerance=0.05)
    alone.refresh(clean, damping)
    for bad in (torch.nan, torch.inf):
        factors = clean.clone()
        factors[1, 2, 3] = factors[1, 3, 2] = bad
        stack = InverseStack(factors, method, tolerance=0.05)
        stack.refresh(factors, damping)
        assert stack.residual[1] == torch.inf
        assert (stack.values[1] == 0).all()
        for i in (0, 2):
            torch.testing.assert_close(_as_inverse(stack)[i], _as_inverse(alone)[i], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", NAMED_METHODS)
def test_indefinite_input_is_inverted_with_the_least_damping_that_makes_it_definite(method: str) -> None:
    factor = torch.eye(8)[None] * 1.0
    factor[0, 0, 0] = -0.5  # no covariance; what a broken checkpoint could hold
    stack = InverseStack(factor, method, tolerance=0.05)
    stack.refresh(factor, torch.tensor([0.1]))
    assert (stack.residual <= ACCEPT).all()
    inverse = _as_inverse(stack)[0]
    assert torch.linalg.eigvalsh(inverse)[0] > 0


@pytest.mark.parametrize("lie", [1.5, -1.0, float("nan")])
def test_a_library_routine_that_returns_garbage_is_not_believed(monkeypatch: pytest.MonkeyPatch, lie: float) -> None:
    """The a-priori bound of Cholesky trusts LAPACK; the probe does not."""
    honest = factorizations.symmetric_product
    monkeypatch.setattr(factorizations, "symmetric_product", lambda root: honest(root) * lie)
    _, exact, damping = _stack()
    factors = exact[:2].float()
    stack = InverseStack(factors, "cholesky", tolerance=0.05)
    stack.refresh(factors, damping[:2].float())
    assert (stack.residual == torch.inf).all()
    assert (stack.values == 0).all()


def test_eigh_that_does_not_converge_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    _, exact, damping = _stack()
    factors = exact[:2].float()
    stack = InverseStack(factors, "eigh", tolerance=0.05)
    stack.refresh(factors, damping[:2].float())
    assert stack.fallbacks.tolist() == [1, 1]
    assert (stack.residual <= ACCEPT).all()


@pytest.mark.parametrize("change", [1e-4, 1e-2, 1e2, 1e4])
def test_warm_refresh_follows_a_jump_of_the_damping(change: float) -> None:
    """Near or far, the result is certified; the method decides itself when to start again from Cholesky."""
    _, exact, damping = _stack()
    factors, damping = exact[:6].float(), damping[:6].float()
    stack = InverseStack(factors, "factored", tolerance=0.05)
    stack.refresh(factors, damping)
    stack.refresh(factors, damping * change)
    assert (stack.residual <= ACCEPT).all()
    for i in range(6):
        used = stack.damping[i].double() * torch.eye(SIZE, dtype=torch.float64)
        assert energy_error(factors[i].double() + used, _as_inverse(stack)[i]) <= max(float(stack.residual[i]), 1e-6)


def test_auto_is_cholesky_on_a_cpu_and_the_warm_refresh_on_a_gpu() -> None:
    assert resolve("auto", torch.device("cpu")) == "cholesky"
    assert resolve("auto", torch.device("cuda")) == "factored"
    assert [resolve(m, torch.device("cuda")) for m in NAMED_METHODS] == NAMED_METHODS
