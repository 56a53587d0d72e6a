"""Preconditioning through roots in panels, as the library multiplies them on NVIDIA GPUs: against einsum in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.kernels.precondition import launch, library
from kfac_triton.kernels.precondition.reference import precondition_reference


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 3),
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    multiple=st.integers(1, 16),
    most=st.integers(1, 6),
    seed=st.integers(0, 2**32),
)
def test_any_number_of_panels_against_einsum(batch: int, m: int, n: int, multiple: int, most: int, seed: int) -> None:
    """Integers: the result is exact. Outputs start as NaN, and inputs, gradients with strides of their own, are not written."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-2, 3, shape, generator=generator).double()

    gradient, left, right = numbers(batch, n, m).mT, numbers(batch, m, m).tril(), numbers(batch, n, n).tril()
    kept = [x.clone() for x in (gradient, left, right)]
    out, product = torch.full((batch, m, n), torch.nan).double(), torch.full((batch,), torch.nan).double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "_WORTH", 0.0)
        patch.setattr(library, "_MULTIPLE", multiple)
        patch.setattr(library, "_MOST_PANELS", most)
        launch.multiply_by_library(gradient, left, right, out, product, True)
    truth = torch.einsum("bji,bjk,bkl,bml,bmp->bip", left, left, gradient, right, right)
    assert torch.equal(out, truth)
    assert torch.equal(product, torch.einsum("bij,bij->b", truth, gradient))
    assert all(torch.equal(a, b) for a, b in zip(kept, (gradient, left, right), strict=True))


@pytest.mark.parametrize("count", [1, 2])
def test_autocast_changes_no_type(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step may be taken inside of it. There torch.bmm computes in 16 bits, unless it is told where to put the result."""
    monkeypatch.setattr(library, "panels", lambda *sizes: count)
    monkeypatch.setattr(library, "_MULTIPLE", 4)
    gradient, left, right = torch.randn(2, 8, 12), torch.randn(2, 8, 8).tril(), torch.randn(2, 12, 12).tril()
    results = [torch.empty(2, 8, 12) for _ in range(2)]
    for out, enabled in zip(results, (False, True), strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            library.precondition_by_roots(gradient, left, right, out, None)
    assert torch.equal(*results)


@pytest.mark.parametrize(("batch", "side", "across", "expected"), [
    (12, 3072, 784, 4), (12, 784, 3072, 2), (12, 768, 784, 1), (3, 4608, 512, 3), (1, 1008, 800, 1), (1, 0, 0, 1),
])  # fmt: skip
def test_a_panel_must_save_more_than_its_launch_takes(batch: int, side: int, across: int, expected: int) -> None:
    """GPT-2's large layers, its smallest, a 3 x 3 convolution of ResNet-50, and the largest layer of the autoencoder."""
    count = library.panels(batch, side, across)
    assert count == expected
    saved = [batch * side * side * across * (1 / (p - 1) - 1 / p) for p in range(2, count + 1)]
    assert all(x >= library._WORTH for x in saved)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("side", [512, 513, 768, 784, 2304, 3088, 4608])
def test_panels_cover_a_root_once_and_are_about_equally_large(side: int, count: int) -> None:
    found = library.bounds(side, count)
    assert [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])]
    assert found[-1][1] == side and len(found) == count
    assert all(start % 128 == 0 for start, _ in found)
    assert all(abs(stop - start - side / count) <= 128 for start, stop in found)


def test_panels_skip_the_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operations that are asked of the library: (1 + 1/p) / 2 of those of whole roots, with equal panels."""
    operations: list[int] = []
    bmm = torch.bmm

    def counted(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        operations.append(2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2])
        return bmm(a, b, out=out)

    monkeypatch.setattr(library, "_WORTH", 0.0)
    monkeypatch.setattr(library, "_MULTIPLE", 8)
    monkeypatch.setattr(torch, "bmm", counted)
    gradient, left, right = torch.randn(2, 32, 24), torch.randn(2, 32, 32).tril(), torch.randn(2, 24, 24).tril()
    library.precondition_by_roots(gradient, left, right, torch.empty_like(gradient), None)
    assert len(operations) == 2 * 4 + 2 * 3
    assert sum(operations) == 2 * 2 * 2 * (32 * 32 * 24 * 5 // 8 + 24 * 24 * 32 * 4 // 6)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (17, 9), (31, 23)])
def test_a_bad_gradient_is_bad_in_all_of_its_layer(row: int, column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with whole roots, and in no other layer: skipped zeros would have made NaN of it as well."""
    monkeypatch.setattr(library, "_WORTH", 0.0)
    monkeypatch.setattr(library, "_MULTIPLE", 8)
    gradient, left, right = torch.randn(2, 32, 24), torch.randn(2, 32, 32).tril(), torch.randn(2, 24, 24).tril()
    gradient[1, row, column] = torch.nan
    out, product, whole = torch.empty_like(gradient), torch.empty(2), torch.empty_like(gradient)
    library.precondition_by_roots(gradient, left, right, out, product)
    precondition_reference(gradient, left, right, whole, None, True)
    assert out[1].isnan().all() and whole[1].isnan().all() and product[1].isnan()
    assert torch.isfinite(out[0]).all() and torch.isfinite(product[0])
    torch.testing.assert_close(out[0], whole[0])
