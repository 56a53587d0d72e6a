"""Diagonal factors: their sums against X^T X written down, their store against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_triton.capture.diagonal_sums import squared_rows
from kfac_triton.curvature.diagonal import DiagonalFactors, DiagonalInverse
from kfac_triton.curvature.groups import SideGroup
from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance.reference import patch_matrix

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squares_of_a_matrix_of_rows(dtype: torch.dtype) -> None:
    rows = torch.randn(7, 5).to(dtype)
    expected = (rows.double().T @ rows.double()).diagonal()
    torch.testing.assert_close(squared_rows(rows.T.contiguous().T, ops.ROWS, 5, torch.float64), expected)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 2)])
def test_squares_of_patches(kernel: tuple[int, int]) -> None:
    images = torch.randn(3, 2, 6, 7, dtype=torch.float64)
    window = ops.window(kernel, (2, 1), (1, 0), (1, 2))
    if kernel == (1, 1):
        window = ops.window(kernel)
    rows = patch_matrix(images, window).T
    got = squared_rows(images, window, rows.shape[1], torch.float64)
    torch.testing.assert_close(got, (rows.T @ rows).diagonal())


def test_squares_of_one_hot_rows_are_counts() -> None:
    indices = torch.tensor([3, 0, 3, 3, 1])
    one_hot = torch.nn.functional.one_hot(indices, 6).double()
    assert torch.equal(squared_rows(indices, ops.ROWS, 6, torch.float64), (one_hot.T @ one_hot).diagonal())
    assert torch.equal(squared_rows(indices[:0], ops.ROWS, 6, torch.float64), torch.zeros(6).double())


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_a_store_is_many_diagonals(sizes: list[int], seed: int) -> None:
    """Blend, traces and inverses by factor; what is not accepted stays, whatever the sums hold."""
    torch.manual_seed(seed)
    store = DiagonalFactors(sizes, torch.float64, CPU)
    inverse = DiagonalInverse(store)
    store.factors.copy_(torch.rand(sum(sizes)))
    before = [store.piece(store.factors, i).clone() for i in range(len(sizes))]
    store.sums.copy_(torch.rand(sum(sizes)))
    sums = [store.piece(store.sums, i).clone() for i in range(len(sizes))]
    accept = torch.rand(len(sizes)) < 0.5
    for i, accepted in enumerate(accept.tolist()):
        if not accepted:
            store.piece(store.sums, i).fill_(torch.nan)
    keep, gain, damping = (torch.rand(len(sizes), dtype=torch.float64) for _ in range(3))
    store.blend(keep, gain, accept)
    inverse.refresh(store.factors, damping + 0.1)
    traces = store.traces(store.factors)
    for i, accepted in enumerate(accept.tolist()):
        expected = keep[i] * before[i] + gain[i] * sums[i] if accepted else before[i]
        torch.testing.assert_close(store.piece(store.factors, i), expected)
        torch.testing.assert_close(traces[i], expected.sum())
        torch.testing.assert_close(inverse.kept(i), 1 / (expected + damping[i] + 0.1))
    assert store.nbytes == 8 * sum(sizes)
    store.roll_back()
    assert torch.equal(store.factors, torch.cat(before))


@pytest.mark.parametrize("places", [(0, 1, 2), (1, 2), (2, 0), (1, 1), (2,)])
def test_rows_of_a_group_are_its_diagonals(places: tuple[int, ...]) -> None:
    """Neighbours are a view, and the numbers those of any vector over the store."""
    store = DiagonalFactors([4, 4, 4, 7], torch.float64, CPU)
    side = SideGroup(0, places)
    for vector in (store.factors.copy_(torch.rand(19)), torch.rand(19)):
        assert torch.equal(store.rows(vector, side), torch.stack([store.piece(vector, place) for place in places]))


def test_a_constant_without_statistics_has_no_inverse() -> None:
    """Damping zero stands for a factor that is 1; before its first statistics it is 0."""
    store = DiagonalFactors([1], torch.float64, CPU)
    inverse = DiagonalInverse(store)
    inverse.refresh(store.factors, torch.zeros(1))
    assert inverse.values.tolist() == [0.0]
    store.factors.fill_(1.0)
    inverse.refresh(store.factors, torch.zeros(1))
    assert inverse.values.tolist() == [1.0]
