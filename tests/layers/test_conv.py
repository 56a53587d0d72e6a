"""Convolutions: A and G from explicit patches, every padding mode, groups; and the gradient they add up to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.layers import find_layers
from kfac_triton.layers.conv import padding_amounts

CONV2D: list[dict[str, Any]] = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1)},
    {"kernel_size": 1, "stride": 3},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 3, "padding": "same"},
    {"kernel_size": (4, 2), "padding": "same", "dilation": (1, 3)},
    {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate", "stride": 2},
    {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    {"kernel_size": (4, 3), "padding": "same", "padding_mode": "circular"},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
    {"kernel_size": (2, 4), "padding": "same", "groups": 4},
]


def _patches(conv: Any, x: Tensor) -> Tensor:
    """(N, C, kernel elements, positions) by slicing the padded input at every offset; independent of the reader under test."""
    total = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
    if conv.padding == "same":
        pads = [(t // 2, t - t // 2) for t in total]
    elif conv.padding == "valid":
        pads = [(0, 0) for _ in total]
    else:
        pads = [(p, p) for p in conv.padding]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, [amount for pair in reversed(pads) for amount in pair], mode=mode)
    counts = [(size - t - 1) // s + 1 for size, t, s in zip(x.shape[2:], total, conv.stride, strict=True)]
    columns = []
    for offset in itertools.product(*(range(k) for k in conv.kernel_size)):
        index = tuple(
            torch.arange(count) * s + o * d for count, s, o, d in zip(counts, conv.stride, offset, conv.dilation, strict=True)
        )
        part = x
        for dimension, indices in enumerate(index, start=2):
            part = part.index_select(dimension, indices)
        columns.append(part.flatten(2))
    return torch.stack(columns, 2)


def _brute_force(conv: Any, x: Tensor, gradient: Tensor, reduce: bool) -> list[tuple[Tensor, Tensor]]:
    """Per channel group the mean of a a^T and N times the sum of g g^T, of a mean loss."""
    patches = _patches(conv, x)  # (N, C, K, T)
    result = []
    for rows, g in zip(patches.chunk(conv.groups, 1), gradient.flatten(2).chunk(conv.groups, 1), strict=True):
        rows, g = rows.flatten(1, 2).movedim(1, 2), g.movedim(1, 2)  # (N, T, ...)
        if reduce:
            rows, g = rows.mean(1, keepdim=True), g.sum(1, keepdim=True)
        rows, g = rows.flatten(0, 1), g.flatten(0, 1)
        if conv.bias is not None:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
        result.append((rows.T @ rows / len(rows), len(x) * g.T @ g))
    return result


def _check(conv: Any, x: Tensor, reduce: bool) -> None:
    with KFACPreconditioner(conv, weight_sharing="reduce" if reduce else "expand") as preconditioner:
        out = conv(x)
        weights = torch.randn_like(out)
        (gradient,) = torch.autograd.grad((out.sin() * weights).sum() / len(x), out, retain_graph=True)
        (out.sin() * weights).sum().div(len(x)).backward()
        preconditioner.precondition_()
        a, g = preconditioner.factors()[""]
    if conv.groups == 1:
        a, g = a[None], g[None]
    for i, (true_a, true_g) in enumerate(_brute_force(conv, x, gradient, reduce)):
        assert relative_error(a[i], true_a) <= 1e-12
        assert relative_error(g[i], true_g) <= 1e-12


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
@pytest.mark.parametrize("options", CONV2D, ids=str)
def test_conv2d(options: dict[str, Any], reduce: bool) -> None:
    conv = nn.Conv2d(4, 8, **options).double()
    _check(conv, torch.randn(3, 4, 9, 8, dtype=torch.float64), reduce)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
@pytest.mark.parametrize("options", [o for o in CONV2D if not isinstance(o["kernel_size"], tuple)], ids=str)
@pytest.mark.parametrize("spatial", [1, 3])
def test_conv1d_and_conv3d(spatial: int, options: dict[str, Any], reduce: bool) -> None:
    options = dict(options)
    if isinstance(options.get("padding"), tuple):
        options["padding"] = 1
    make = {1: nn.Conv1d, 3: nn.Conv3d}[spatial]
    _check(make(4, 8, **options).double(), torch.randn(2, 4, *(7, 6, 5)[:spatial], dtype=torch.float64), reduce)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
def test_strided_and_channels_last_inputs(reduce: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    _check(conv, x.to(memory_format=torch.channels_last), reduce)
    _check(conv, torch.randn(3, 8, 9, 16, dtype=torch.float64)[:, ::2, :, ::2], reduce)
    _check(conv.to(memory_format=torch.channels_last), x, reduce)


@pytest.mark.parametrize("reduce", [False, True], ids=["expand", "reduce"])
def test_an_input_without_a_batch_dimension_is_a_batch_of_one(reduce: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    x = torch.randn(4, 7, 6, dtype=torch.float64)
    results = []
    for each in (x, x[None]):
        with KFACPreconditioner(conv, weight_sharing="reduce" if reduce else "expand") as preconditioner:
            conv(each).sin().sum().backward()
            preconditioner.precondition_()
            results.append(preconditioner.factors()[""])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("options", CONV2D, ids=str)
def test_padding_amounts_give_the_modules_own_output_shape(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, **options)
    x = torch.randn(1, 4, 9, 8)
    padded = [size + before + after for size, (before, after) in zip(x.shape[2:], padding_amounts(conv), strict=True)]
    expected = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded, conv.kernel_size, conv.stride, conv.dilation, strict=True)
    ]
    assert list(conv(x).shape[2:]) == expected


@pytest.mark.parametrize("options", CONV2D, ids=str)
def test_rows_of_a_and_g_belong_together(options: dict[str, Any]) -> None:
    """The weight's gradient is the sum of g_r a_r^T: rows in the order of positions, columns in that of the weight."""
    from kfac_triton.kernels.covariance import WINDOW, patch_matrix

    conv = nn.Conv2d(4, 8, **options).double()
    (layer,), _ = find_layers(conv)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64)
    out = conv(x)
    (gradient,) = torch.autograd.grad(out.sin().sum(), out, retain_graph=True)
    out.sin().sum().backward()
    rows = layer.rows(x, gradient)
    assert len(rows.input_window) == len(rows.gradient_window) == WINDOW
    for group in range(conv.groups):
        a = patch_matrix(rows.inputs[group], rows.input_window)
        g = patch_matrix(rows.gradients[group], rows.gradient_window)
        buffer = torch.zeros(layer.output_size, layer.input_size, dtype=torch.float64)
        layer.write_gradient(group, buffer)
        torch.testing.assert_close(g @ a.T, buffer[:, : a.shape[0]])
        if conv.bias is not None:
            torch.testing.assert_close(g.sum(1), buffer[:, -1])


@pytest.mark.parametrize("options", CONV2D, ids=str)
def test_write_gradient_and_read_update_are_inverse(options: dict[str, Any]) -> None:
    conv = nn.Conv2d(4, 8, **options)
    (layer,), _ = find_layers(conv)
    conv(torch.randn(3, 4, 9, 8)).sin().sum().backward()
    blocks = []
    for group in range(layer.groups):
        blocks.append(torch.full((layer.output_size + 3, layer.input_size + 5), torch.nan))
        layer.write_gradient(group, blocks[-1])
    for parameter, value in layer.read_update(blocks):
        assert parameter.grad is not None
        assert torch.equal(value, parameter.grad)
