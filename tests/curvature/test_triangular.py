"""Inverses from a Cholesky factor by blocks, against float64 and, on integers, exactly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.curvature import triangular
from kfac_triton.curvature.triangular import symmetric_product, triangular_inverse

FLOATS = [torch.float32, torch.float64]
# Either side of the leaf size and of the first two levels of halving.
SIZES = [1, 2, 255, 256, 257, 513]


def well_conditioned(batch: int, n: int) -> Tensor:
    """Lower triangular, float64, diagonal in [1, 2]."""
    lower = torch.randn(batch, n, n, dtype=torch.float64).tril(-1) / n**0.5
    return lower + torch.diag_embed(1 + torch.rand(batch, n, dtype=torch.float64))


def assert_inverse(lower: Tensor) -> None:
    """Componentwise residual of a triangular solve, |L T - I| <= c n u |L| |T| |L| |T|, and zeros above the diagonal."""
    result = triangular_inverse(lower)
    assert result.dtype == lower.dtype
    assert torch.equal(result, result.tril())
    exact, n = lower.double(), lower.shape[-1]
    size = exact.abs() @ result.double().abs()
    residual = (exact @ result.double() - torch.eye(n, dtype=torch.float64)).abs()
    unit_roundoff = torch.finfo(lower.dtype).eps / 2
    assert (residual <= 4 * n * unit_roundoff * (size @ size)).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", SIZES)
def test_inverse_across_the_leaf_size(n: int, dtype: torch.dtype) -> None:
    lower = well_conditioned(2, n)
    assert_inverse(lower.to(dtype))
    if dtype == torch.float64:
        identity = torch.eye(n, dtype=torch.float64).expand(2, n, n)
        truth = torch.linalg.solve_triangular(lower, identity, upper=False)
        torch.testing.assert_close(triangular_inverse(lower), truth, rtol=1e-9, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 150),
    batch=st.integers(0, 3),
    power=st.floats(0, 4),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_inverse_by_many_halves(n: int, batch: int, power: float, dtype: torch.dtype, seed: int) -> None:
    """With leaves of 16 the recursion is four levels deep; Cholesky factors of badly scaled Gram matrices among them."""
    torch.manual_seed(seed)
    rows = torch.randn(batch, n + 5, n, dtype=torch.float64) * torch.logspace(0, -power, n, dtype=torch.float64)
    gram = rows.mT @ rows + 10**-power * torch.eye(n, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triangular, "_LEAF", 16)
        assert_inverse(torch.linalg.cholesky(gram).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_inverse_of_powers_of_two_is_exact(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """L with ones on the diagonal and -1 below it: L^-1 holds powers of two."""
    monkeypatch.setattr(triangular, "_LEAF", 16)
    n = 21
    lower = (2 * torch.eye(n) - torch.ones(n, n).tril()).to(dtype)[None]
    distance = torch.arange(n)[:, None] - torch.arange(n)
    expected = torch.where(distance > 0, 2.0 ** (distance - 1), (distance == 0).float()).to(dtype)
    assert torch.equal(triangular_inverse(lower)[0], expected)


@pytest.mark.parametrize("n", SIZES)
def test_product_of_integers_is_exact(n: int) -> None:
    root = torch.randint(-3, 4, (2, n, n)).tril()
    product = symmetric_product(root.float())
    assert torch.equal(product.double(), (root.mT.double() @ root.double()))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 80), batch=st.integers(0, 3), dtype=st.sampled_from(FLOATS), seed=st.integers(0, 2**32))
def test_product_by_many_blocks(n: int, batch: int, dtype: torch.dtype, seed: int) -> None:
    """Bitwise symmetric, each entry to the rounding error of an inner product."""
    torch.manual_seed(seed)
    root = torch.randn(batch, n, n, dtype=dtype).tril()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triangular, "_BLOCK", 16)
        product = symmetric_product(root)
    assert product.dtype == dtype
    assert torch.equal(product, product.mT)
    exact = root.double()
    bound = (n + 2) * torch.finfo(dtype).eps * (exact.abs().mT @ exact.abs())
    assert ((product.double() - exact.mT @ exact).abs() <= bound).all()


@pytest.mark.parametrize("n", [40, 300])
def test_inputs_are_not_written(n: int) -> None:
    lower = well_conditioned(1, n)
    before = lower.clone()
    triangular_inverse(lower)
    symmetric_product(lower)
    assert torch.equal(lower, before)


def test_together_they_invert_a_matrix() -> None:
    rows = torch.randn(900, 300, dtype=torch.float64)
    matrix = rows.T @ rows / 900
    inverse = symmetric_product(triangular_inverse(torch.linalg.cholesky(matrix)[None]))[0]
    torch.testing.assert_close(inverse, torch.linalg.inv(matrix), rtol=1e-10, atol=1e-11)
