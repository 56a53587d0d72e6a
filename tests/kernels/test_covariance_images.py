"""`covariance_ema` of images that are read as they lie in memory, both backends, against float64 rows made by a loop."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launches import counted_launches
from torch import Tensor, nn

from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance import launch as covariance_launch
from kfac_triton.kernels.covariance.window import flatten

TYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels last", "part of the channels", "every other image", "crop", "channels last, every other"]
both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def rows_of(images: Tensor) -> Tensor:
    """X in float64: a row for each image and position, one at a time."""
    places = itertools.product(range(len(images)), *map(range, images.shape[2:]))
    rows = [images[(n, slice(None), *at)].double() for n, *at in places]
    return torch.stack(rows) if rows else torch.zeros(0, images.shape[1], dtype=torch.float64)


def lay_out(images: Tensor, layout: str) -> Tensor:
    """The same values behind other strides; what lies between them is NaN."""
    last = layout.startswith("channels last")
    spatial = images.dim() - 2
    if layout.endswith(("every other image", "every other")):
        images = torch.stack([torch.full_like(images, torch.nan), images], 1).flatten(0, 1)
    if layout == "part of the channels":
        images = F.pad(images, [0, 0] * spatial + [8, 8], value=torch.nan)
    if layout == "crop":
        images = F.pad(images, [1, 2] * spatial, value=torch.nan)
    if last:
        images = images.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "part of the channels":
        return images[:, 8:-8]
    if layout == "crop":
        return images[(slice(None), slice(None), *[slice(1, -2)] * spatial)]
    return images[1::2] if layout.endswith(("every other image", "every other")) else images


def with_ones(rows: Tensor, ones: bool) -> Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if ones else rows


@both_backends
@settings(max_examples=25, deadline=None)
@given(data=st.data(), layers=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_whole_numbers_come_out_exactly(backend: str, data: st.DataObject, layers: int, seed: int) -> None:
    """Sums of whole numbers have one value in whatever order: not a bit may differ. The pad keeps what it holds."""
    torch.manual_seed(seed)
    sources, factors, expected, ones, windows = [], [], [], [], []
    alphas = data.draw(st.lists(st.sampled_from([0.25, 1.0]), min_size=layers, max_size=layers))
    betas = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=layers, max_size=layers))
    for alpha, beta in zip(alphas, betas, strict=True):
        spatial = data.draw(st.integers(1, 3))
        sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 5, 7, 8]), min_size=spatial, max_size=spatial))
        channels = data.draw(st.sampled_from([1, 3, 8, 16, 17, 24, 40, 64]))
        images = torch.randint(-3, 4, (data.draw(st.integers(0, 4)), channels, *sizes)).to(data.draw(st.sampled_from(TYPES)))
        sources.append(lay_out(images, data.draw(st.sampled_from(LAYOUTS))))
        ones.append(data.draw(st.booleans()))
        windows.append(ops.window((1,) * spatial, dilation=(data.draw(st.integers(1, 3)),) * spatial))
        n = channels + ones[-1]
        old = torch.randint(-3, 4, (n, n))
        factor = torch.full((channels + 24 - channels % 8,) * 2, 7.0)
        factor[:n, :n] = (old + old.T) if beta else torch.nan
        rows = with_ones(rows_of(images), ones[-1])
        result = factor.double()
        result[:n, :n] = alpha * rows.T @ rows + (beta * factor[:n, :n].double() if beta else 0.0)
        factors.append(factor)
        expected.append(result)
    ops.covariance_ema(factors, sources, torch.tensor(alphas), torch.tensor(betas), ones, windows, backend=backend)
    for factor, result in zip(factors, expected, strict=True):
        assert torch.equal(factor.double(), result)


@both_backends
@pytest.mark.parametrize(
    ("layout", "dtype", "side"),
    [(layout, TYPES[i % 3], (8, 6, 7)[(i + i // 3) % 3]) for i, layout in enumerate(LAYOUTS[:3] * 3 + LAYOUTS[3:])],
)
def test_many_rows_are_shared_out_and_rounded_as_any_sum(backend: str, dtype: torch.dtype, layout: str, side: int) -> None:
    """Copies of 16 bytes, of 8 and of one element; several tiles of a factor, and shares of its rows."""
    images = torch.randn(6, 24, side, side).to(dtype)
    source, rows = lay_out(images, layout), with_ones(rows_of(images), True)
    results = []
    for _ in range(2):
        factor = torch.full((32, 32), torch.nan)
        arguments = ([factor], [source], torch.tensor([0.5]), torch.zeros(1), [True], [ops.window((1, 1))])
        with counted_launches(run=True) as counts:
            ops.covariance_ema(*arguments, backend=backend)
        results.append(factor[:25, :25])
    if backend == "triton":
        assert counts["covariance_kernel"] == 1
        assert counts["covariance_reduce_kernel"] == 1 or layout in LAYOUTS[4:]  # patches come in larger pieces
    bound = (len(rows) + 4) * torch.finfo(torch.float32).eps * 0.5 * rows.abs().T @ rows.abs()
    assert (results[0].double() - 0.5 * rows.T @ rows).abs().le(bound).all()
    assert torch.equal(results[0], results[0].T)
    assert torch.equal(*results)


@both_backends
def test_a_transposed_matrix_is_one_image(backend: str) -> None:
    for dtype, rows in itertools.product(TYPES, (0, 1, 40, 44, 45)):
        x = torch.randint(-3, 4, (24, rows)).to(dtype)
        factor = torch.full((32, 32), torch.nan)
        ops.covariance_ema([factor], [x.T], torch.ones(1), torch.zeros(1), [True], [ops.ROWS], backend=backend)
        full = with_ones(x.T.double(), True)
        assert torch.equal(factor[:25, :25].double(), full.T @ full)


@both_backends
def test_a_nan_stays_in_its_row_and_column(backend: str) -> None:
    """Of the layers, and of the channels of one: products with NaN alone are NaN."""
    images = torch.randn(3, 16, 4, 4)
    images[1, 5, 2, 3] = torch.nan
    factors = [torch.zeros(16, 16) for _ in range(2)]
    windows, two = [ops.window((1, 1))] * 2, torch.ones(2)
    ops.covariance_ema(factors, [images, images.nan_to_num()], two, two, [False] * 2, windows, backend=backend)
    wrong = torch.zeros(16, 16, dtype=torch.bool)
    wrong[5], wrong[:, 5] = True, True
    assert torch.equal(factors[0].isnan(), wrong)
    assert factors[1].isfinite().all()


@both_backends
def test_what_is_not_accepted_is_not_read(backend: str) -> None:
    images = torch.full((2, 8, 4, 4), torch.nan)
    factors = [torch.eye(8), torch.eye(8)]
    windows, two = [ops.window((1, 1))] * 2, torch.ones(2)
    sources, accept = [images, torch.ones_like(images)], torch.tensor([False, True])
    ops.covariance_ema(factors, sources, two, two, [False] * 2, windows, accept, backend=backend)
    assert torch.equal(factors[0], torch.eye(8))
    assert torch.equal(factors[1], torch.eye(8) + 32)


def test_one_launch_serves_all_layers_of_a_kind() -> None:
    """Images of any size whose copies are as wide; channels-last images and matrices together."""
    sizes = [(8, 4, 4), (16, 2, 8), (40, 8, 8)]
    contiguous = [torch.ones(2, *size) for size in sizes]
    last = [x.contiguous(memory_format=torch.channels_last) for x in contiguous]
    sources = [*contiguous, *last, torch.ones(5, 16), torch.ones(16, 12).T]
    windows = [ops.window((1, 1))] * 6 + [ops.ROWS] * 2
    factors = [torch.zeros(48, 48) for _ in sources]
    ones = torch.ones(len(sources))
    with counted_launches() as counts:
        ops.covariance_ema(factors, sources, ones, ones, [False] * len(sources), windows, backend="triton")
    groups = covariance_launch.look_at(factors, sources, ones, ones, [False] * len(sources), flatten(windows)).plan.groups
    assert [list(group.indices) for group in groups] == [[0, 1, 2, 7], [3, 4, 5, 6]]
    assert counts["covariance_kernel"] == 2


@both_backends
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_factors_of_a_convolution(backend: str, kernel: int, last: bool) -> None:
    """A and G of one layer, from `F.unfold` and from the gradient's definition."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 16, kernel, padding=kernel // 2, bias=False)
    x = torch.randn(3, 8, 6, 6, requires_grad=True)
    if last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = conv(x)
    (g,) = torch.autograd.grad(y.square().sum(), y)
    a, b = torch.full((80, 80), torch.nan), torch.full((16, 16), torch.nan)
    windows = [ops.window((kernel,) * 2, padding=(kernel // 2,) * 2), ops.window((1, 1))]
    ops.covariance_ema([a, b], [x.detach(), g], torch.ones(2), torch.zeros(2), [False] * 2, windows, backend=backend)
    patches = F.unfold(x.detach().double(), kernel, padding=kernel // 2).transpose(1, 2).flatten(0, 1)
    rows = (2 * y.detach().double()).permute(0, 2, 3, 1).reshape(-1, 16)
    n = 8 * math.prod(conv.kernel_size)
    torch.testing.assert_close(a[:n, :n].double(), patches.T @ patches, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(b.double(), rows.T @ rows, rtol=1e-5, atol=1e-4)
