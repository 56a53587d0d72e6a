"""Rows of convolutions: factors from explicit patches in float64, and the weight gradient they must add up to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_triton.curvature.preconditioning import fill
from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance.reference import patch_matrix
from kfac_triton.layers import Layer, Rows
from kfac_triton.layers.conv import ConvLayer, padding_amounts

SIZES = (9, 8, 7)  # of the spatial dimensions; odd and even
PADDING_MODES = ["zeros", "reflect", "replicate", "circular"]

# For 1, 2 and 3 dimensions: each entry of a pair is of the first dimensions and of the last one.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": (3, 2)},
    "stride": {"kernel_size": (3, 2), "stride": (2, 3)},
    "padding": {"kernel_size": (2, 3), "padding": (1, 2)},
    "stride, padding, dilation": {"kernel_size": (2, 3), "stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)},
    "valid": {"kernel_size": (2, 3), "padding": "valid", "stride": (2, 2)},
    "same, odd kernel": {"kernel_size": (3, 3), "padding": "same"},
    "same, even kernel": {"kernel_size": (2, 4), "padding": "same"},
    "same, even kernel, dilation": {"kernel_size": (2, 2), "padding": "same", "dilation": (3, 1)},
    "pointwise": {"kernel_size": (1, 1)},
    "whole image": {"kernel_size": (5, 7)},
}


def make(spatial: int, geometry: dict[str, Any], **options: Any) -> nn.Conv1d | nn.Conv2d | nn.Conv3d:
    module_type = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    full = {
        key: (value[0],) * (spatial - 1) + value[1:] if isinstance(value, tuple) else value for key, value in geometry.items()
    }
    return module_type(**{"in_channels": 4, "out_channels": 6, **full, **options}, dtype=torch.float64)


def adapter(module: nn.Module, weight_sharing: str = "expand", loss_terms: str = "examples") -> Layer:
    return ConvLayer("layer", module, weight_sharing, loss_terms)


def run(module: Any, images: int | None = 3) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output; the module's parameters have their gradients. Without images, unbatched."""
    spatial = len(module.kernel_size)
    x = torch.randn(*([] if images is None else [images]), module.in_channels, *SIZES[:spatial], dtype=torch.float64)
    output = module(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    return x, gradient


def explicit_rows(module: Any, x: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per group (a, g), (N, positions, -1) each, by unfold of the explicitly padded input; ones for the bias included.

    Where there is no unfold, by one slice a position. What is padded where comes from the module's own record.
    """
    spatial = len(module.kernel_size)
    if x.dim() == spatial + 1:
        x, gradient = x[None], gradient[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    result = []
    for images, g in zip(x.chunk(module.groups, 1), gradient.chunk(module.groups, 1), strict=True):
        if spatial == 2:
            a = F.unfold(images, module.kernel_size, module.dilation, 0, module.stride).transpose(1, 2)
        else:
            spans = [d * (k - 1) + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
            starts = [range(0, n - span + 1, s) for n, span, s in zip(images.shape[2:], spans, module.stride, strict=True)]
            slices = (
                tuple(slice(p, p + n, d) for p, n, d in zip(at, spans, module.dilation, strict=True))
                for at in itertools.product(*starts)
            )
            a = torch.stack([images[(slice(None), slice(None), *at)].flatten(1) for at in slices], 1)
        if module.bias is not None and module.bias.requires_grad:
            a = torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2)
        result.append((a, g.flatten(2).transpose(1, 2)))
    return result


def factors(layer: Layer, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of a a^T and g g^T, as the optimizer makes them."""
    groups = layer.groups
    sums = [
        torch.full((n, n), torch.nan, dtype=torch.float64) for n in [layer.input_size] * groups + [layer.output_size] * groups
    ]
    ops.covariance_ema(
        sums,
        rows.inputs + rows.gradients,
        torch.ones(2 * groups, dtype=torch.float64),
        torch.zeros(2 * groups, dtype=torch.float64),
        [layer.has_bias] * groups + [False] * groups,
        [rows.input_window] * groups + [rows.gradient_window] * groups,
    )
    return sums[:groups], sums[groups:]


def assert_factors(module: Any, x: Tensor, gradient: Tensor, weight_sharing: str) -> None:
    layer = adapter(module, weight_sharing)
    rows = layer.rows(x, gradient)
    expected = explicit_rows(module, x, gradient)
    examples, positions = expected[0][0].shape[:2]
    for a_sum, g_sum, (a, g) in zip(*factors(layer, rows), expected, strict=True):
        if weight_sharing == "expand":
            a, g = a.flatten(0, 1), g.flatten(0, 1)
        else:
            a, g = a.mean(1), g.sum(1)
        torch.testing.assert_close(a_sum, a.T @ a, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(g_sum, g.T @ g, rtol=1e-12, atol=1e-12)
    assert rows.terms == examples
    assert rows.input_count == (examples * positions if weight_sharing == "expand" else examples)


CASES = [
    pytest.param(spatial, name, mode, id=f"{spatial}d-{name}-{mode}")
    for spatial in (1, 2, 3)
    for name, geometry in GEOMETRIES.items()
    for mode in PADDING_MODES
    if mode == "zeros" or geometry.get("padding", "valid") != "valid"  # without padding all modes are one
]


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("spatial", "name", "mode"), CASES)
def test_factors_are_those_of_explicit_patches(spatial: int, name: str, mode: str, weight_sharing: str) -> None:
    module = make(spatial, GEOMETRIES[name], padding_mode=mode)
    assert_factors(module, *run(module), weight_sharing)


OPTIONS: dict[str, dict[str, Any]] = {
    "two groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "depthwise with a multiplier": {"groups": 4, "out_channels": 8},
    "no bias": {"bias": False},
    "groups without bias": {"groups": 2, "bias": False},
}


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("images", [None, 1, 3], ids=["unbatched", "one", "three"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["stride, padding, dilation", "same, even kernel"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_groups_and_bias(spatial: int, name: str, options: str, images: int | None, weight_sharing: str) -> None:
    module = make(spatial, GEOMETRIES[name], **OPTIONS[options])
    assert_factors(module, *run(module, images), weight_sharing)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("mode", PADDING_MODES)
def test_unbatched_input_of_every_padding_mode(spatial: int, mode: str) -> None:
    module = make(spatial, GEOMETRIES["same, even kernel"], padding_mode=mode, groups=2)
    for weight_sharing in ("expand", "reduce"):
        assert_factors(module, *run(module, None), weight_sharing)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_channels_last_and_strided_tensors(weight_sharing: str) -> None:
    module = make(2, GEOMETRIES["stride, padding, dilation"], groups=2)
    x, gradient = run(module)
    for a, g in (
        (x.contiguous(memory_format=torch.channels_last), gradient.contiguous(memory_format=torch.channels_last)),
        (x.mT.contiguous().mT, gradient.repeat_interleave(2, 1)[:, ::2]),
    ):
        assert_factors(module, a, g, weight_sharing)
    constant = gradient[:1, :, :1, :1].expand_as(gradient)  # what sum().backward() sends: strides of 0
    assert_factors(module, x, constant, weight_sharing)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 2**32))
def test_rows_add_up_to_the_weight_gradient(data: st.DataObject, spatial: int, seed: int) -> None:
    """It is sum g a^T over the rows of a group: no oracle but autograd. Rows of A and G are the right ones, in one order."""
    torch.manual_seed(seed)
    geometry = {
        "kernel_size": data.draw(st.lists(st.integers(1, 3), min_size=spatial, max_size=spatial).map(tuple)),
        "dilation": data.draw(st.integers(1, 2)),
    }
    padding = data.draw(st.sampled_from(["same", "valid", 0, 1, 2]))
    groups, mode = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from(PADDING_MODES))
    module_type = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    module: Any = module_type(
        4,
        4 * data.draw(st.integers(1, 2)),
        **geometry,
        stride=1 if padding == "same" else data.draw(st.integers(1, 3)),
        padding=padding,
        groups=groups,
        padding_mode=mode,
        dtype=torch.float64,
    )
    x, gradient = run(module, data.draw(st.sampled_from([None, 1, 3])))
    layer = adapter(module)
    rows = layer.rows(x, gradient)
    for group, (inputs, gradients) in enumerate(zip(rows.inputs, rows.gradients, strict=True)):
        a, g = patch_matrix(inputs, rows.input_window), patch_matrix(gradients, rows.gradient_window)
        assert a.shape[1] == g.shape[1] == rows.input_count
        own = slice(group * layer.output_size, (group + 1) * layer.output_size)
        torch.testing.assert_close((g @ a.T).view_as(module.weight[own]), module.weight.grad[own], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(g.sum(1), module.bias.grad[own], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_one_position_makes_reduce_and_expand_equal(spatial: int) -> None:
    module = make(spatial, {}, kernel_size=SIZES[:spatial])
    x, gradient = run(module)
    pairs = [factors(layer, layer.rows(x, gradient)) for layer in (adapter(module), adapter(module, "reduce"))]
    for expand, reduce in zip(*pairs, strict=True):
        torch.testing.assert_close(expand, reduce, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("loss_terms", "terms"), [("examples", 3), ("tokens", 3 * 4 * 8)])
def test_counts(loss_terms: str, terms: int, weight_sharing: str) -> None:
    module = make(2, {"kernel_size": (3, 3), "stride": (2, 1), "padding": (0, 1)})
    x, gradient = run(module)
    rows = adapter(module, weight_sharing, loss_terms).rows(x, gradient)
    assert rows.terms == terms
    assert rows.input_count == (3 * 4 * 8 if weight_sharing == "expand" else 3)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize(("name", "mode"), [("padding", "zeros"), ("same, even kernel", "zeros"), ("padding", "circular")])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_an_empty_batch_has_no_rows(spatial: int, name: str, mode: str, weight_sharing: str) -> None:
    """torch.nn takes it, and so must a hook in its backward pass."""
    module = make(spatial, GEOMETRIES[name], padding_mode=mode)
    x, gradient = run(module, 0)
    layer = adapter(module, weight_sharing)
    rows = layer.rows(x, gradient)
    assert (rows.input_count, rows.terms) == (0, 0)
    a, g = factors(layer, rows)
    assert all((total == 0).all() for total in a + g)


@pytest.mark.parametrize("spatial", [1, 2, 3])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_padding_amounts_are_those_of_torch(spatial: int, name: str) -> None:
    module = make(spatial, GEOMETRIES[name])
    flat = [amount for pair in reversed(padding_amounts(module)) for amount in pair]
    assert flat == list(module._reversed_padding_repeated_twice)


def gradient_block(layer: Layer, group: int, pad: int = 3) -> Tensor:
    out = torch.zeros(1, layer.output_size + pad, layer.input_size + pad, dtype=torch.float64)
    weight, bias = layer.gradient(group)
    assert weight is not None
    fill(out[0], weight, bias)
    return out[0]


@pytest.mark.parametrize("frozen", [False, True], ids=["", "bias frozen"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_reading_what_was_written_gives_the_gradients(spatial: int, options: str, frozen: bool) -> None:
    """Gradient and read_update are inverse to one another; the pad stays zero."""
    module = make(spatial, GEOMETRIES["padding"], **OPTIONS[options])
    if frozen and module.bias is not None:
        module.bias.requires_grad_(False)
    run(module)
    layer = adapter(module)
    blocks = [gradient_block(layer, group) for group in range(layer.groups)]
    for block in blocks:
        assert (block[layer.output_size :] == 0).all()
        assert (block[:, layer.input_size :] == 0).all()
    updates = dict(layer.read_update(blocks))
    trained = [p for p in module.parameters() if p.requires_grad]
    assert list(updates) == trained
    for parameter in trained:
        assert parameter.grad is not None
        assert torch.equal(updates[parameter], parameter.grad)


@pytest.mark.parametrize("options", OPTIONS)
def test_writing_what_was_read_gives_the_blocks(options: str) -> None:
    module = make(2, GEOMETRIES["padding"], **OPTIONS[options])
    layer = adapter(module)
    blocks = [torch.randn(layer.output_size, layer.input_size, dtype=torch.float64) for _ in range(layer.groups)]
    for parameter, update in layer.read_update(blocks):
        assert update.shape == parameter.shape
        parameter.grad = update.clone()
    for group, block in enumerate(blocks):
        assert torch.equal(gradient_block(layer, group, pad=0), block)


def test_a_bias_without_gradient_leaves_no_old_one_behind() -> None:
    """The buffer is that of the last step; a bias that was frozen since then must not go on moving the weight."""
    module = make(2, GEOMETRIES["plain"], groups=2)
    layer = adapter(module)
    run(module)
    module.bias.grad = None
    for group in range(2):
        block = gradient_block(layer, group, pad=0)
        assert (block[:, -1] == 0).all()


@pytest.mark.parametrize("options", OPTIONS)
def test_sizes(options: str) -> None:
    module = make(2, {"kernel_size": (3, 2)}, **OPTIONS[options])
    layer = adapter(module)
    assert layer.groups == module.groups
    assert layer.input_size == module.in_channels // module.groups * 6 + (module.bias is not None)
    assert layer.output_size * layer.groups == module.out_channels
