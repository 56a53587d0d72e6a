"""V = G^-1 W A^-1 and <V, W>, from inverses and from roots, against einsum in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.kernels import ops
from kfac_triton.kernels.precondition import reference as precondition

FLOATS = [torch.float32, torch.float64]


def run(gradient: Tensor, left: Tensor, right: Tensor, factored: bool) -> tuple[Tensor, Tensor]:
    """Outputs start as NaN: they are not read. Inputs are not written."""
    inputs = [x.clone() for x in (gradient, left, right)]
    out, product = torch.full_like(gradient, torch.nan), gradient.new_full(gradient.shape[:1], torch.nan)
    ops.precondition(gradient, left, right, out, product, factored)
    assert all(torch.equal(a, b) for a, b in zip(inputs, (gradient, left, right), strict=True))
    return out, product


def expected(gradient: Tensor, left: Tensor, right: Tensor, factored: bool) -> tuple[Tensor, Tensor]:
    """In the dtype of the inputs: V and <V, W>."""
    if factored:
        left, right = (torch.einsum("bki,bkj->bij", x, x) for x in (left, right))
    out = torch.einsum("bij,bjk,bkl->bil", left, gradient, right)
    return out, torch.einsum("bij,bij->b", out, gradient)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 4),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    factored=st.booleans(),
    loop=st.booleans(),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 2**32),
)
def test_against_einsum(batch: int, m: int, n: int, factored: bool, loop: bool, dtype: torch.dtype, seed: int) -> None:
    """Within the rounding of its chain of products, whether matrices go one by one or batched."""
    torch.manual_seed(seed)
    gradient, left, right = (torch.randn(batch, *shape, dtype=dtype) for shape in ((m, n), (m, m), (n, n)))
    if factored:
        left, right = left.tril(), right.tril()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precondition, "_LOOP_FROM", 1 if loop else 256)
        out, product = run(gradient, left, right, factored)
    exact = [x.double() for x in (gradient, left, right)]
    truth, truth_product = expected(*exact, factored)
    size, _ = expected(*(x.abs() for x in exact), factored)
    bound = 2 * (m + n + 2) * torch.finfo(dtype).eps * size
    assert ((out.double() - truth).abs() <= bound).all()
    allowed = ((bound + m * n * torch.finfo(dtype).eps * size) * exact[0].abs()).sum((-2, -1))
    assert ((product.double() - truth_product).abs() <= allowed).all()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("m", "n"), [(3, 5), (255, 256), (256, 255), (300, 20)])
def test_integers_come_out_exactly(m: int, n: int, factored: bool) -> None:
    """On both sides of the size from which a CPU multiplies matrices one by one. Sparse, so that sums stay float32 numbers."""
    gradient = torch.randint(-2, 3, (2, m, n))
    left = torch.randint(-1, 2, (2, m, m)) * (torch.rand(2, m, m) < 4 / m)
    right = torch.randint(-1, 2, (2, n, n)) * (torch.rand(2, n, n) < 4 / n)
    out, product = run(gradient.float(), left.float(), right.float(), factored)
    truth, truth_product = expected(gradient.double(), left.double(), right.double(), factored)
    assert torch.equal(out.double(), truth)
    assert torch.equal(product.double(), truth_product)


@pytest.mark.parametrize("m", [6, 260])
def test_roots_and_inverses_agree(m: int) -> None:
    gradient = torch.randn(2, m, 4, dtype=torch.float64)
    left, right = torch.randn(2, m, m, dtype=torch.float64).tril(), torch.randn(2, 4, 4, dtype=torch.float64).tril()
    out, product = run(gradient, left, right, True)
    inverses = run(gradient, left.mT @ left, right.mT @ right, False)
    torch.testing.assert_close((out, product), inverses, rtol=1e-10, atol=1e-9)
    assert (product > 0).all()  # T^T T is positive


@pytest.mark.parametrize("factored", [False, True])
def test_parts_of_larger_stacks(factored: bool) -> None:
    """Runs of a stack, as the optimizer passes them, and transposed gradients."""
    left, right = torch.randn(5, 6, 6, dtype=torch.float64), torch.randn(7, 4, 4, dtype=torch.float64)
    gradient = torch.randn(3, 4, 6, dtype=torch.float64).mT
    result = run(gradient, left[1:4], right[::2][:3], factored)
    torch.testing.assert_close(result, expected(gradient, left[1:4], right[::2][:3], factored))


def test_a_bad_gradient_stays_in_its_own_layer() -> None:
    gradient, left, right = torch.randn(3, 4, 5), torch.randn(3, 4, 4), torch.randn(3, 5, 5)
    clean, product = run(gradient, left, right, False)
    gradient[1, 2, 2] = torch.nan
    out, bad = run_allowing_nan(gradient, left, right)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert torch.equal(bad[[0, 2]], product[[0, 2]])
    assert bad[1].isnan()


def run_allowing_nan(gradient: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    out, product = torch.empty_like(gradient), gradient.new_empty(len(gradient))
    ops.precondition(gradient, left, right, out, product)
    return out, product
