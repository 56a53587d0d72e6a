"""`covariance_ema`, both backends, against float64 brute force: shapes, layouts, types, convolutions, chunks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance import reference as covariance
from kfac_triton.kernels.covariance.window import flatten, unflatten

FLOATS = [torch.float32, torch.float64]
INPUT_TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BACKENDS = ["torch", "triton"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
LAYOUTS = ["contiguous", "transposed", "strided", "expanded"]
UNTOUCHED = 7.0  # what the pad holds before and must hold after

examples = settings(max_examples=40, deadline=None)


def factor_types(backend: str) -> st.SearchStrategy[torch.dtype]:
    """The kernel keeps float32, and leaves float64 to its reference."""
    return st.sampled_from(FLOATS if backend == "torch" else FLOATS[:1])


def input_types(backend: str) -> st.SearchStrategy[torch.dtype]:
    return st.sampled_from(INPUT_TYPES if backend == "torch" else INPUT_TYPES[:-1])


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return values.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "strided":
        spread = values.new_full([3 * size + 1 for size in values.shape], torch.nan)
        view = spread[tuple(slice(1, None, 3) for _ in values.shape)]
        return view.copy_(values)
    if layout == "expanded":  # stride 0: every row is the first one
        return values[:1].expand(values.shape)
    return values


def symmetric(size: int, dtype: torch.dtype) -> Tensor:
    square = torch.randn(size, size, dtype=torch.float64)
    return (square + square.T).to(dtype)


def with_ones(rows: Tensor, ones: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if ones else rows


def assert_update(result: Tensor, old: Tensor, rows: Tensor, alpha: float, beta: float) -> None:
    """Within the rounding of any order of summation, and bitwise symmetric; the old factor is not read where beta is 0."""
    truth, size = alpha * rows.T @ rows, alpha * rows.abs().T @ rows.abs()
    if beta:
        truth, size = truth + beta * old.double(), size + beta * old.double().abs()
    bound = (len(rows) + 4) * torch.finfo(result.dtype).eps * size
    assert (result.double() - truth).abs().le(bound).all()
    assert torch.equal(result, result.T)


@dataclass
class Case:
    """One layer of a call: what goes in, and the rows in float64 that it stands for, ones included."""

    factor: Tensor
    source: Tensor
    window: ops.Window
    rows: Tensor
    ones: bool

    @property
    def size(self) -> int:
        return self.rows.shape[1]


def make_factor(size: int, pad: int, dtype: torch.dtype, beta: float) -> Tensor:
    factor = torch.full((size + pad, size + pad), UNTOUCHED, dtype=dtype)
    factor[:size, :size] = symmetric(size, dtype) if beta else torch.nan
    return factor


def check(cases: list[Case], alphas: list[float], betas: list[float], dtype: torch.dtype, backend: str) -> None:
    factors = [case.factor.clone() for case in cases]
    windows = [case.window for case in cases]
    ones = [case.ones for case in cases]
    alpha, beta = torch.tensor(alphas, dtype=dtype), torch.tensor(betas, dtype=dtype)
    sources = [case.source.clone() for case in cases]
    ops.covariance_ema(factors, [case.source for case in cases], alpha, beta, ones, windows, backend=backend)
    for case, factor, source, a, b in zip(cases, factors, sources, alpha.tolist(), beta.tolist(), strict=True):
        n = case.size
        assert_update(factor[:n, :n], case.factor[:n, :n], case.rows, a, b)
        assert (factor[n:] == UNTOUCHED).all()
        assert (factor[:, n:] == UNTOUCHED).all()
        assert torch.equal(case.source, source)


betas = st.sampled_from([0.0, 0.5, 0.95])
alphas = st.sampled_from([1.0, 0.05, 1 / 3])


@st.composite
def matrix_cases(draw: st.DrawFn, dtype: torch.dtype, beta: float, backend: str) -> Case:
    most = 300 if backend == "torch" else 100  # interpreted tiles have 16 or 32 rows, and take 64 summands at a time
    rows = draw(st.integers(0, most))
    edges = [n for n in (1, 2, 16, 17, 32, 33, 40, 41, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300) if n <= most]
    n = draw(st.sampled_from(edges) | st.integers(1, most))
    values = torch.randn(rows, n, dtype=torch.float64).to(draw(input_types(backend)))
    source = lay_out(values, draw(st.sampled_from(LAYOUTS)))
    ones, pad = draw(st.booleans()), draw(st.integers(0, 20))
    # fp64 rows of an fp32 factor count as rounded to fp32
    exact = source.to(dtype).double()
    return Case(make_factor(n + ones, pad, dtype, beta), source, ops.ROWS, with_ones(exact, ones), ones)


@both_backends
@examples
@given(st.data(), st.integers(1, 3), st.integers(0, 2**32))
def test_rows(backend: str, data: st.DataObject, layers: int, seed: int) -> None:
    torch.manual_seed(seed)
    dtype = data.draw(factor_types(backend))
    beta = [data.draw(betas) for _ in range(layers)]
    cases = [data.draw(matrix_cases(dtype, b, backend)) for b in beta]
    check(cases, [data.draw(alphas) for _ in range(layers)], beta, dtype, backend)


@both_backends
@examples
@given(
    rows=st.integers(0, 200),
    n=st.sampled_from([1, 16, 40, 41, 63, 64, 97]) | st.integers(1, 100),
    ones=st.booleans(),
    alpha=st.sampled_from([0.25, 1.0, 2.0]),
    beta=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_integers_come_out_exactly(backend: str, rows: int, n: int, ones: bool, alpha: float, beta: float, seed: int) -> None:
    """Every product and sum is a float32 number: not one bit may differ, whatever the order of summation."""
    torch.manual_seed(seed)
    x = torch.randint(-3, 4, (rows, n))
    old = torch.randint(-3, 4, (n + ones, n + ones))
    old = old + old.T
    factor = old.float()
    alphas, betas = torch.tensor([alpha]), torch.tensor([beta])
    ops.covariance_ema([factor], [x.float()], alphas, betas, [ones], [ops.ROWS], backend=backend)
    full = with_ones(x, ones)
    assert torch.equal(factor.double(), beta * old.double() + alpha * (full.T @ full).double())


def brute_force_patches(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """(N * positions, C * kernel elements) by one slice a position; examples outermost, as torch.nn.functional.unfold."""
    images = F.pad(images, [p for size in reversed(padding) for p in (size, size)])
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    starts = [range(0, size - span + 1, s) for size, span, s in zip(images.shape[2:], spans, stride, strict=True)]
    patches = [
        images[(slice(None), slice(None), *(slice(p, p + n, d) for p, n, d in zip(at, spans, dilation, strict=True)))].flatten(
            1
        )
        for at in itertools.product(*starts)
    ]
    return torch.stack(patches, 1).flatten(0, 1)


def unfolded(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    columns = F.unfold(images, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
    return columns.transpose(1, 2).flatten(0, 1)


@st.composite
def conv_cases(draw: st.DrawFn, dtype: torch.dtype, beta: float, spatial: int, backend: str) -> Case:
    def each(low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial))

    kernel, stride, padding, dilation = each(1, 3), each(1, 3), each(0, 2), each(1, 2)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    size = [max(1, span - 2 * p) + extra for span, p, extra in zip(spans, padding, each(0, 4), strict=True)]
    values = torch.randn(draw(st.integers(1, 5)), draw(st.integers(1, 4)), *size, dtype=torch.float64)
    values = values.to(draw(input_types(backend)))
    if draw(st.booleans()):  # channels last
        values = values.movedim(1, -1).contiguous().movedim(-1, 1)
    source = lay_out(values, draw(st.sampled_from(LAYOUTS)))
    ones, pad = draw(st.booleans()), draw(st.integers(0, 20))
    oracle = unfolded if spatial == 2 else brute_force_patches
    rows = oracle(source.to(dtype).double(), kernel, stride, padding, dilation)
    return Case(
        make_factor(rows.shape[1] + ones, pad, dtype, beta),
        source,
        ops.window(kernel, stride, padding, dilation),
        with_ones(rows, ones),
        ones,
    )


@both_backends
@settings(max_examples=20, deadline=None)
@given(st.data(), st.integers(1, 2), st.sampled_from([1, 40, 1 << 20]), st.integers(0, 2**32))
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_convolutions(spatial: int, backend: str, data: st.DataObject, layers: int, chunk: int, seed: int) -> None:
    """A small chunk size of the reference cuts the batch into pieces, of one image at least."""
    torch.manual_seed(seed)
    dtype = data.draw(factor_types(backend))
    beta = [data.draw(betas) for _ in range(layers)]
    cases = [data.draw(conv_cases(dtype, b, spatial, backend)) for b in beta]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(covariance, "_PATCH_CHUNK", chunk)
        check(cases, [data.draw(alphas) for _ in range(layers)], beta, dtype, backend)


def test_brute_force_patches_are_those_of_unfold() -> None:
    images = torch.randn(3, 2, 9, 8)
    geometry = [(2, 3), (2, 1), (1, 2), (2, 1)]
    assert torch.equal(brute_force_patches(images, *geometry), unfolded(images, *geometry))


@both_backends
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "crop", "every other image"])
def test_image_layouts_give_the_same_integers(backend: str, layout: str) -> None:
    images = torch.randint(-3, 4, (6, 5, 8, 9))
    source = {
        "contiguous": images.float(),
        "channels_last": images.float().contiguous(memory_format=torch.channels_last),
        "crop": F.pad(images.float(), (2, 3, 1, 2), value=torch.nan)[:, :, 1:-2, 2:-3],
        "every other image": images.float().repeat_interleave(2, 0)[1::2],
    }[layout]
    geometry = [(3, 2), (2, 1), (1, 1), (1, 3)]
    rows = with_ones(unfolded(images.double(), *geometry), True)
    factor = torch.full((len(rows.T), len(rows.T)), torch.nan)
    ops.covariance_ema([factor], [source], torch.ones(1), torch.zeros(1), [True], [ops.window(*geometry)], backend=backend)
    assert torch.equal(factor.double(), rows.T @ rows)


def test_chunks_are_as_large_as_the_cache_and_no_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    """The patch matrix of a chunk holds at most `_PATCH_CHUNK` elements, and every image is in exactly one chunk."""
    images, geometry = torch.randn(10, 3, 8, 8), ops.window((3, 3))
    elements = covariance.patch_matrix(images, geometry).numel()
    for chunk in (elements, 2 * elements, elements // 3):
        monkeypatch.setattr(covariance, "_PATCH_CHUNK", chunk)
        parts = covariance._row_chunks(images, geometry)
        assert torch.equal(torch.cat(parts), images)
        assert all(covariance.patch_matrix(part, geometry).numel() <= chunk for part in parts)
    assert len(parts) > 2


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_window_fills_missing_dimensions_in_front(spatial: int) -> None:
    window = ops.window((3,) * spatial, (2,) * spatial, (1,) * spatial, (4,) * spatial)
    front = 3 - spatial
    assert (
        tuple(flatten([window]))
        == (1,) * front
        + (3,) * spatial
        + (1,) * front
        + (2,) * spatial
        + (0,) * front
        + (1,) * spatial
        + (1,) * front
        + (4,) * spatial
    )
    assert ops.window((3,) * spatial) == ops.window((3,) * spatial, (1,) * spatial, (0,) * spatial, (1,) * spatial)
    shapes = [(2, 3), (2, 3, *(9,) * spatial), (4, 4)]
    assert unflatten(flatten([ops.ROWS, window, ops.ROWS]), shapes) == [ops.ROWS, window, ops.ROWS]


EMPTY = {
    "rows": (torch.zeros(0, 4), ops.ROWS, 4),
    "conv1d": (torch.zeros(0, 2, 5), ops.window((2,)), 4),
    "conv2d": (torch.zeros(0, 1, 5, 5), ops.window((2, 2)), 4),
    "conv3d": (torch.zeros(0, 1, 5, 5, 5), ops.window((2, 2, 1), padding=(1, 0, 0)), 4),
}


@both_backends
@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("ones", [False, True], ids=["", "ones"])
@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_batch_only_decays_the_factor(backend: str, kind: str, ones: bool, beta: float) -> None:
    source, window, n = EMPTY[kind]
    size = n + ones
    factor = make_factor(size, 3, torch.float32, beta)
    expected = factor.clone()
    expected[:size, :size] = beta * factor[:size, :size] if beta else 0.0
    ops.covariance_ema([factor], [source], torch.ones(1), torch.tensor([beta]), [ones], [window], backend=backend)
    assert torch.equal(factor, expected)


@both_backends
@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=3)))
def test_only_accepted_factors_change(backend: str, flags: tuple[bool, ...]) -> None:
    """Whatever is in the rows of the others, NaN included."""
    sources = [torch.randn(5, 3), torch.randn(6, 4), torch.randn(2, 1, 4, 4)]
    for source, flag in zip(sources, flags, strict=True):
        if not flag:
            source.flatten()[0] = torch.nan
    windows = [ops.ROWS, ops.ROWS, ops.window((2, 2))]
    ones = [True, False, True]
    factors = [symmetric(6, torch.float32) for _ in sources]
    old, plain = [f.clone() for f in factors], [f.clone() for f in factors]
    alpha, beta = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.5, 0.0, 1.0])
    ops.covariance_ema(factors, sources, alpha, beta, ones, windows, torch.tensor(flags), backend=backend)
    ops.covariance_ema(plain, sources, alpha, beta, ones, windows, backend=backend)
    for factor, before, updated, flag in zip(factors, old, plain, flags, strict=True):
        assert torch.equal(factor, updated if flag else before)


@both_backends
def test_no_layers_at_all(backend: str) -> None:
    ops.covariance_ema([], [], torch.zeros(0), torch.zeros(0), [], [], backend=backend)


@both_backends
def test_factors_in_one_stack_are_updated_in_place(backend: str) -> None:
    """Rows of a stack, as the optimizer stores them: neighbours stay."""
    stack = torch.full((3, 4, 4), UNTOUCHED)
    x = torch.randn(9, 4)
    ops.covariance_ema([stack[1]], [x], torch.ones(1), torch.zeros(1), [False], [ops.ROWS], backend=backend)
    assert_update(stack[1], stack[1], x.double(), 1.0, 0.0)
    assert (stack[[0, 2]] == UNTOUCHED).all()


def test_patch_elements_are_in_the_order_of_a_convolution_weight() -> None:
    images, weight = torch.randn(2, 3, 6, 5, dtype=torch.float64), torch.randn(4, 3, 2, 3, dtype=torch.float64)
    columns = covariance.patch_matrix(images, ops.window((2, 3), (2, 1), (1, 0), (1, 2)))
    output = weight.flatten(1) @ columns
    truth = F.conv2d(images, weight, stride=(2, 1), padding=(1, 0), dilation=(1, 2))
    assert columns.shape == (18, 2 * math.prod(truth.shape[2:]))
    torch.testing.assert_close(output.unflatten(1, (2, *truth.shape[2:])).movedim(0, 1), truth)
