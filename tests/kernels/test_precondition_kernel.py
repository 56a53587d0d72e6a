"""Preconditioning as kernels: exact on integers, within rounding of the reference, and what only kernels can do wrong."""

from __future__ import annotations

import dataclasses
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launches import counted_launches
from torch import Tensor

from kfac_triton.kernels import operators, ops
from kfac_triton.kernels.certificate import mirror
from kfac_triton.kernels.precondition import launch as precondition_launch

pytestmark = pytest.mark.usefixtures("scratch_is_nan")

# Either side of the tile sizes, and far from any.
SIZES = [(1, 1), (1, 70), (17, 16), (33, 48), (49, 5), (64, 65), (20, 200), (199, 130)]


def run(gradient: Tensor, left: Tensor, right: Tensor, factored: bool, backend: str = "triton") -> tuple[Tensor, Tensor]:
    """V and <V, W>; they start as NaN, and inputs are not written."""
    inputs = [x.clone() for x in (gradient, left, right)]
    out, product = torch.full_like(gradient, torch.nan), gradient.new_full(gradient.shape[:1], torch.nan)
    ops.precondition(gradient, left, right, out, product, factored, backend)
    for after, before in zip((gradient, left, right), inputs, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return out, product


def shaped(matrix: Tensor, factored: bool) -> Tensor:
    """A lower triangular root, or a symmetric inverse."""
    return matrix.tril() if factored else mirror(matrix)


def expected(gradient: Tensor, left: Tensor, right: Tensor, factored: bool) -> tuple[Tensor, Tensor]:
    """In the dtype of the inputs: V and <V, W>."""
    if factored:
        left, right = left.mT @ left, right.mT @ right
    out = left @ gradient @ right
    return out, (out * gradient).sum((-2, -1))


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_integers_come_out_exactly(m: int, n: int, factored: bool) -> None:
    """Sparse, so that every sum stays a float32 number."""
    gradient = torch.randint(-2, 3, (2, m, n))
    left = shaped(torch.randint(-1, 2, (2, m, m)) * (torch.rand(2, m, m) < 3 / m), factored)
    right = shaped(torch.randint(-1, 2, (2, n, n)) * (torch.rand(2, n, n) < 3 / n), factored)
    out, product = run(gradient.float(), left.float(), right.float(), factored)
    truth, truth_product = expected(gradient, left, right, factored)
    assert truth.any() or min(m, n) == 1
    assert torch.equal(out.long(), truth)
    assert torch.equal(product.long(), truth_product)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 2),
    m=st.integers(1, 200),
    n=st.integers(1, 200),
    factored=st.booleans(),
    units=st.tuples(st.floats(-4, 4), st.floats(-4, 4), st.floats(-4, 4)),  # of <V, W>, six: all are normal numbers
    seed=st.integers(0, 2**32),
)
def test_against_float64(batch: int, m: int, n: int, factored: bool, units: tuple[float, ...], seed: int) -> None:
    """Within the rounding of a chain of inner products, componentwise: k u |a| |b| each, in whatever order they are summed."""
    torch.manual_seed(seed)
    gradient, left, right = (
        10**unit * torch.randn(batch, *shape) for unit, shape in zip(units, ((m, n), (m, m), (n, n)), strict=True)
    )
    left, right = shaped(left, factored), shaped(right, factored)
    out, product = run(gradient, left, right, factored)
    exact = [x.double() for x in (gradient, left, right)]
    truth, truth_product = expected(*exact, factored)
    size, _ = expected(*(x.abs() for x in exact), factored)
    unit_roundoff = torch.finfo(torch.float32).eps / 2
    bound = 2 * (m + n) * 1.01 * unit_roundoff * size  # 1.01: products of errors
    assert ((out.double() - truth).abs() <= bound).all()
    allowed = ((bound + m * n * unit_roundoff * size) * exact[0].abs()).sum((-2, -1))
    assert ((product.double() - truth_product).abs() <= allowed).all()


def test_roots_and_inverses_agree() -> None:
    """Integers, so exactly: V through T_G and T_A is V through T_G^T T_G and T_A^T T_A."""
    gradient = torch.randint(-3, 4, (2, 70, 40)).float()
    left, right = torch.randint(-1, 2, (2, 70, 70)).tril().float(), torch.randint(-1, 2, (2, 40, 40)).tril().float()
    assert all(
        torch.equal(a, b)
        for a, b in zip(run(gradient, left, right, True), run(gradient, left.mT @ left, right.mT @ right, False), strict=True)
    )


@pytest.mark.parametrize("blocks", [(32, 16, 16), (16, 64, 32)])
def test_tiles_need_not_be_square(blocks: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """In all three kinds of products, and as for a tensor core, where a root passes through registers; integers, so exactly."""
    gradient, left, right = (torch.randint(-2, 3, (2, *shape)) for shape in ((70, 90), (70, 70), (90, 90)))
    config = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), blocks, strict=True))
    monkeypatch.setattr(precondition_launch.tuning, "lookup", lambda *args: config)
    monkeypatch.setattr(precondition_launch.precision, "resolve", lambda *args: "tf32")
    for factored in (False, True):
        sides = shaped(left, factored), shaped(right, factored)
        out, _ = run(gradient.float(), *(side.float() for side in sides), factored)
        truth, _ = expected(gradient, *sides, factored)
        assert truth.abs().max() < 2**24
        assert torch.equal(out.long(), truth)


def test_what_a_root_is_known_to_have_zero_is_not_multiplied() -> None:
    """NaN far above the diagonal is not seen: sums begin, or end, at the diagonal."""
    gradient, left, right = torch.randn(2, 150, 170), torch.randn(2, 150, 150).tril(), torch.randn(2, 170, 170).tril()
    clean = run(gradient, left, right, True)
    left[:, 0, -1] = right[:, 0, -1] = torch.nan
    assert all(torch.equal(a, b) for a, b in zip(run(gradient, left, right, True), clean, strict=True))


@pytest.mark.parametrize("factored", [False, True])
def test_parts_of_wider_stacks(factored: bool) -> None:
    """Leading blocks and runs of padded stacks, as the optimizer passes them; the pad is neither read nor written."""
    m, n = 21, 35
    gradient = torch.randn(3, m, n)
    left, right = shaped(torch.randn(3, m, m), factored), shaped(torch.randn(3, n, n), factored)
    wide = [torch.full(shape, torch.nan) for shape in ((3, m + 3, n + 1), (5, m + 11, m + 11), (6, n + 13, n + 13))]
    views = wide[0][:, :m, :n], wide[1][1:4, :m, :m], wide[2][::2, :n, :n]
    for view, values in zip(views, (gradient, left, right), strict=True):
        view.copy_(values)
    wide_out, products = torch.full((3, m + 4, n + 2), torch.nan), torch.full((3, 2), torch.nan)
    out, product = wide_out[:, :m, :n], products[:, 1]
    ops.precondition(*views, out, product, factored, "triton")
    plain, plain_product = run(gradient, left, right, factored)
    assert torch.equal(out, plain)
    assert torch.equal(product, plain_product)
    out.fill_(torch.nan)
    assert wide_out.isnan().all()
    assert products[:, 0].isnan().all()


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("broken", ["gradient", "left", "right"])
def test_what_is_not_finite_stays_in_its_own_layer(broken: str, factored: bool) -> None:
    values = {"gradient": torch.randn(3, 20, 50), "left": torch.randn(3, 20, 20), "right": torch.randn(3, 50, 50)}
    values = {k: v if k == "gradient" else shaped(v, factored) for k, v in values.items()}
    clean, clean_product = run(**values, factored=factored)
    values[broken][1, 2, 2] = torch.nan
    out, product = run(**values, factored=factored)
    assert torch.equal(out[[0, 2]], clean[[0, 2]])
    assert torch.equal(product[[0, 2]], clean_product[[0, 2]])
    assert product[1].isnan()


@pytest.mark.parametrize(("factored", "launches"), [(False, 2), (True, 4)])
@pytest.mark.parametrize(("batch", "m", "n"), [(1, 1, 1), (3, 20, 50), (9, 300, 200)])
def test_launches_do_not_depend_on_sizes(batch: int, m: int, n: int, factored: bool, launches: int) -> None:
    with counted_launches() as counts:
        run(torch.zeros(batch, m, n), torch.zeros(batch, m, m), torch.zeros(batch, n, n), factored)
    assert counts == {"product_kernel": launches}


def test_an_empty_stack_launches_nothing() -> None:
    with counted_launches() as counts:
        run(torch.zeros(0, 3, 4), torch.zeros(0, 3, 3), torch.zeros(0, 4, 4), False)
    assert not counts


def usable(batch: int = 2, m: int = 4, n: int = 6, **changes: Tensor) -> dict[str, Any]:
    return {
        "gradient": torch.ones(batch, m, n),
        "left": torch.ones(batch, m, m),
        "right": torch.ones(batch, n, n),
        "out": torch.ones(batch, m, n),
        "product": torch.ones(batch),
        "factored": False,
    } | changes


def test_the_call_that_the_refusals_vary_is_fine() -> None:
    ops.precondition(**usable(), backend="triton")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({k: v.double() if isinstance(v, Tensor) else v for k, v in usable().items()}, "gradient is torch.float64"),
        (usable(gradient=torch.ones(2, 6, 4).mT), "gradient has columns 4 elements apart"),
        (usable(left=torch.ones(2, 4, 8)[:, :, ::2]), "left has columns 2 elements apart"),
        (usable(right=torch.ones(2, 6, 6).mT), "right has columns 6 elements apart"),
        (usable(out=torch.ones(2, 6, 4).mT), "out has columns 4 elements apart"),
        (usable(m=0), "the gradients are empty"),
        (usable(batch=65536, m=1, n=1), "65536 matrices, and a launch takes 65535"),
        (
            usable(gradient=torch.empty_strided((2, 4, 6), (0, 2**29, 1), device="meta")),
            "gradient has matrices with more elements",
        ),
    ],
)
def test_what_the_kernel_cannot_serve_is_said(arguments: dict[str, Any], reason: str) -> None:
    assert reason in str(precondition_launch.can_use(**arguments))
    if not arguments["gradient"].is_meta:
        with pytest.raises(ValueError, match=reason):
            ops.precondition(**arguments, backend="triton")


@pytest.mark.parametrize("factored", [False, True])
def test_where_tf32_is_fastest_the_librarys_products_serve(monkeypatch: pytest.MonkeyPatch, factored: bool) -> None:
    """Unless the kernel, or the reference, is asked for; the user's precision is back afterwards."""
    arguments = usable(m=4, n=6) | {"factored": factored}
    expected = {key: arguments[key].clone() for key in ("out", "product")}
    ops.precondition(**arguments | expected, backend="torch")
    seen: list[str] = []
    bmm = torch.bmm

    def spy(*operands: Tensor, **options: Any) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return bmm(*operands, **options)

    monkeypatch.setattr(torch, "bmm", spy)
    before = torch.backends.cuda.matmul.fp32_precision
    operator = dataclasses.replace(operators.OPERATORS["precondition"], prefers_library=lambda device: True)
    for backend, precision in (("auto", "tf32"), ("torch", before)):
        operator.run("precondition", *arguments.values(), backend=backend)
        assert set(seen) == {precision}, backend
        assert torch.backends.cuda.matmul.fp32_precision == before
        seen.clear()
    assert torch.equal(arguments["out"], expected["out"])
    assert torch.equal(arguments["product"], expected["product"])
    assert not operators.OPERATORS["precondition"].prefers_library(torch.device("cpu"))
    with counted_launches() as counts:
        operator.run("precondition", *arguments.values(), backend="triton")
    assert counts
    assert not seen
