"""One step of orthogonal iteration against the library's QR, in float64 and float32, and what must hold after any step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import emulated_tf32
from support.bases import F64, Bases, orthonormality, positive_qr, random_basis, shifted, step, symmetric, turned
from torch import Tensor

from kfac_triton.kernels import ops

MOST = 1e-4  # ||Q^T Q - I||_F of a basis in float32


@pytest.fixture(params=["float32", "tf32"])
def arithmetic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Float32, and the products of the kernels emulated."""
    if request.param == "tf32":
        emulated_tf32.use(monkeypatch)
    yield request.param


def graded(n: int, decades: float) -> Tensor:
    return torch.logspace(0, -decades, n, dtype=F64)


def spectra(n: int) -> dict[str, Tensor]:
    some = torch.arange(n) < max(2, n // 3)
    return {
        "graded": graded(n, 4),
        "steep": graded(n, 9),
        "rank deficient": torch.where(some, graded(n, 2), 0.0),
        "repeated": torch.where(some, 1.0, 0.01).to(F64),
        "the same": torch.ones(n, dtype=F64),
    }


def case(values: Tensor, angle: float, count: int = 3) -> Bases:
    """Factors whose eigenvectors are the basis turned by an angle."""
    basis = random_basis(count, len(values))
    return Bases(symmetric(values.expand(count, -1), turned(basis, angle)), basis)


@pytest.mark.parametrize("kind", spectra(2))
@pytest.mark.parametrize("angle", [0.0, 0.03, 0.3])
@pytest.mark.parametrize("n", [1, 2, 7, 48])
def test_it_is_the_library_s_qr_in_float64(n: int, angle: float, kind: str) -> None:
    before = case(spectra(n)[kind], angle)
    (after,) = step([before], max_steps=30)
    assert not after.refused.any()
    assert orthonormality(after.basis).max() < 1e-12
    torch.testing.assert_close(after.basis, positive_qr(shifted(before.factor, before.basis)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("shift", [1e-2, 1.0])
def test_the_shift_is_in_units_of_the_mean_diagonal(shift: float) -> None:
    before = case(7e5 * graded(20, 3), 0.3)
    (after,) = step([before], max_steps=30, shift=shift)
    torch.testing.assert_close(after.basis, positive_qr(shifted(before.factor, before.basis, shift)), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", spectra(2))
@pytest.mark.parametrize("n", [16, 100])
def test_it_is_nearly_the_library_s_qr_in_float32(n: int, kind: str, arithmetic: str) -> None:
    """The residual is the measured one, too."""
    before = case(spectra(n)[kind], 0.1)
    (after,) = step([Bases(before.factor.float(), before.basis.float())])
    assert not after.refused.any()
    assert orthonormality(after.basis).max() < MOST
    torch.testing.assert_close(after.residual.double(), orthonormality(after.basis), rtol=0, atol=5e-6)
    expected = positive_qr(shifted(before.factor, before.basis))
    torch.testing.assert_close(after.basis.double(), expected, rtol=0, atol=2e-3 if kind == "steep" else 3e-4)


def aligned(basis: Tensor, vectors: Tensor, leading: int) -> float:
    """The worst |cosine| of a leading column with its eigenvector."""
    return float((basis.double() * vectors).sum(-2).abs()[..., :leading].min())


def alignments(n: int, decades: float, leading: int, show: Callable[..., None]) -> None:
    before = case(graded(n, decades), 0.5, 1)
    vectors = torch.linalg.eigh(before.factor)[1].flip(-1)
    found: dict[int, float] = {}
    current, oracle = [Bases(before.factor.float(), before.basis.float())], before.basis
    for number in range(1, 101):
        current, oracle = step(current), positive_qr(shifted(before.factor, oracle))
        if number in (1, 10, 100):
            found[number] = aligned(current[0].basis, vectors, leading)
            assert abs(found[number] - aligned(oracle, vectors, leading)) < 1e-3
    show(f"{decades:g} decades over {n}: |cosine| of {leading} columns " + ", ".join(f"{k}: {x:.4f}" for k, x in found.items()))
    assert found[1] + 1e-3 < found[10] < found[100] + 1e-5
    assert found[100] > 0.999


@pytest.mark.parametrize("decades", [0.5, 2.0, 6.0])
def test_it_turns_to_the_eigenvectors_as_fast_as_qr(decades: float, arithmetic: str, show: Callable[..., None]) -> None:
    alignments(24, decades, 8, show)


def moving_average(n: int, rows: int, steps: int, show: Callable[..., None]) -> None:
    """A moving average of few rows, a fifth of the inputs always zero: bases from `eigh` at the start, then refreshed."""
    scale, mix = 10 ** torch.empty(n).uniform_(-2, 0), torch.randn(n, n) / n**0.5

    def batch() -> Tensor:
        x = torch.randn(rows, n) @ mix * scale
        x[:, : n // 5], x[:, -1] = 0, 1
        return x.T @ x / rows

    factor = batch()
    current = Bases(factor[None], torch.linalg.eigh(factor.double())[1].flip(-1).float()[None])
    for number in range(steps):
        factor = 0.95 * factor + 0.05 * batch()
        (current,) = step([Bases(factor[None], current.basis)])
        assert not current.refused.any(), number
        assert current.residual < MOST, number
    values = torch.linalg.svdvals(current.basis.double())
    show(f"{n} inputs, {rows} rows, {steps} steps: singular values {float(values.min()):.6f} to {float(values.max()):.6f}")
    assert (values - 1).abs().max() < MOST
    largest = torch.linalg.eigvalsh(factor.double())[-rows:].sum()
    explained = (current.basis[0] * (factor @ current.basis[0])).sum(0)[:rows].sum()
    assert 0.95 * largest < explained < 1.0001 * largest


def test_no_direction_is_lost(arithmetic: str, show: Callable[..., None]) -> None:
    moving_average(96, 8, 30, show)


@pytest.mark.slow
def test_no_direction_of_many_is_lost(arithmetic: str, show: Callable[..., None]) -> None:
    moving_average(785, 64, 100, show)


def test_padding_stays_exact(arithmetic: str) -> None:
    """Zeros of the factor and the identity of the basis, in and beside blocks of any size."""
    for n, side in ((9, 16), (40, 48), (33, 48)):
        inner = case(graded(n, 3), 0.2, 2)
        factor, basis = torch.zeros(2, side, side), torch.eye(side).repeat(2, 1, 1)
        factor[:, :n, :n], basis[:, :n, :n] = inner.factor, inner.basis
        current = [Bases(factor, basis)]
        for _ in range(5):
            current = step(current)
            after = current[0].basis
            assert not current[0].refused.any()
            assert torch.equal(after[:, n:, n:], torch.eye(side - n).expand(2, -1, -1))
            assert not after[:, :n, n:].any()
            assert not after[:, n:, :n].any()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_factors_that_say_nothing_keep_their_bases(dtype: torch.dtype) -> None:
    """Zero, NaN, Inf, and too small for their type; the others do not notice."""
    n = 20
    before = case(graded(n, 3), 0.2, 6)
    before = Bases(before.factor.to(dtype), before.basis.to(dtype))
    (clean,) = step([before])
    factor = before.factor.clone()
    factor[0], factor[1, 3, 5], factor[2, 7, 7], factor[3, 2, 1] = 0, torch.nan, torch.inf, -torch.inf
    factor[4] *= torch.finfo(dtype).tiny
    (after,) = step([Bases(factor, before.basis)])
    assert not after.refused.any()
    assert torch.equal(after.basis[:5], before.basis[:5])
    torch.testing.assert_close(after.residual.double(), orthonormality(after.basis), rtol=0, atol=3e-6)
    assert torch.equal(after.basis[5], clean.basis[5])


def test_what_no_shift_helps_is_refused_and_keeps_its_basis() -> None:
    """A basis that lacks a direction, and one that is not finite."""
    before = case(graded(20, 3), 0.2, 3)
    factor, basis = before.factor.float(), before.basis.float()
    basis[0, :, 3] = basis[0, :, 4]
    basis[1, 0, 0] = torch.nan
    (after,) = step([Bases(factor, basis)])
    assert after.refused.tolist() == [True, True, False]
    torch.testing.assert_close(after.basis[:2], basis[:2], rtol=0, atol=0, equal_nan=True)
    assert after.residual[1] == torch.inf
    assert abs(float(after.residual[0]) - 2**0.5) < 1e-4


def test_an_indefinite_matrix_has_a_basis_too() -> None:
    """The second root starts from Z^T Z, which is positive whatever the first one is: rounding of A below zero does no harm."""
    basis = random_basis(2, 20)
    factor = symmetric(torch.linspace(-0.1, 6, 20, dtype=F64).flip(0).expand(2, -1), turned(basis, 0.1))
    (after,) = step([Bases(factor, basis)], max_steps=30)
    assert not after.refused.any()
    torch.testing.assert_close(after.basis, positive_qr(shifted(factor, basis)), rtol=0, atol=1e-8)


def test_the_second_attempt_has_the_other_shift() -> None:
    """One Newton step is not enough for a small shift, and it is for a large one."""
    before = case(graded(20, 6), 1.0, 2)
    (once,) = step([before], max_steps=2, rescue_shift=1e-3)
    assert once.refused.all()
    assert torch.equal(once.basis, before.basis)
    (again,) = step([before], max_steps=2, rescue_shift=100.0)
    assert not again.refused.any()
    torch.testing.assert_close(again.basis, positive_qr(shifted(before.factor, before.basis, 100.0)), rtol=0, atol=1e-8)


def usable(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "factors": [torch.eye(6)[None]], "bases": [torch.eye(6)[None]], "residuals": [torch.zeros(1)],
        "refused": [torch.zeros(1, dtype=torch.bool)],
    }  # fmt: skip
    return arguments | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bases": []}, "the same number of stacks, but have 1, 0, 1 and 1"),
        ({"bases": [torch.eye(5)[None]]}, r"bases\[0\] must have shape \(1, 6, 6\)"),
        ({"factors": [torch.eye(6)]}, r"factors\[0\] must be a stack"),
        ({"residuals": [torch.zeros(2)]}, r"residuals\[0\] must have shape \(1,\)"),
        ({"refused": [torch.zeros(1)]}, r"refused\[0\] must be torch.bool"),
        ({"shift": 0.0}, "shift and rescue_shift must be positive"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"accept": 0.5}, "accept must be positive and at most 0.1"),
        ({key: [x.double() for x in usable()[key]] for key in ("factors", "bases", "residuals")}, "needs float32"),
        ({"bases": [torch.eye(6).as_strided((1, 6, 6), (36, 1, 6))]}, r"bases\[0\] has columns 6 elements apart"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    ops.orthogonal_iteration(**usable(), backend="triton")
    with pytest.raises(ValueError, match=message):
        ops.orthogonal_iteration(**usable(**changes), backend="triton")
