"""Rows of nn.Linear: factors by brute force, any number of dimensions between examples and features."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kfac_triton.curvature.preconditioning import fill
from kfac_triton.kernels import ops
from kfac_triton.layers.linear import LinearLayer

SHAPES = [(), (1,), (5,), (3, 4), (1, 4), (3, 1), (3, 2, 4), (2, 1, 3, 2)]


def run(shape: tuple[int, ...], bias: bool = True) -> tuple[nn.Linear, Tensor, Tensor]:
    """Module with gradients, its input and the gradient of its output."""
    module = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    x = torch.randn(*shape, 4, dtype=torch.float64)
    output = module(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    return module, x, gradient


def factors(layer: LinearLayer, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    rows = layer.rows(x, gradient)
    sums = [torch.full((n, n), torch.nan, dtype=torch.float64) for n in (layer.input_size, layer.output_size)]
    ops.covariance_ema(
        sums,
        rows.inputs + rows.gradients,
        torch.ones(2, dtype=torch.float64),
        torch.zeros(2, dtype=torch.float64),
        [layer.has_bias, False],
        [rows.input_window, rows.gradient_window],
    )
    return sums[0], sums[1]


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors(shape: tuple[int, ...], bias: bool, weight_sharing: str) -> None:
    """One loop over examples and positions, outer products one by one."""
    module, x, gradient = run(shape, bias)
    a_sum, g_sum = factors(LinearLayer("layer", module, weight_sharing, "examples"), x, gradient)
    examples = x.reshape(shape[0] if shape else 1, -1, 4)
    gradients = gradient.reshape(len(examples), -1, 3)
    a_truth, g_truth = torch.zeros_like(a_sum), torch.zeros_like(g_sum)
    for a, g in zip(examples, gradients, strict=True):
        if bias:
            a = torch.cat([a, torch.ones(len(a), 1, dtype=torch.float64)], 1)
        pairs = zip(a, g, strict=True) if weight_sharing == "expand" else [(a.mean(0), g.sum(0))]
        for input_row, gradient_row in pairs:
            a_truth += torch.outer(input_row, input_row)
            g_truth += torch.outer(gradient_row, gradient_row)
    torch.testing.assert_close(a_sum, a_truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(g_sum, g_truth, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=4), order=st.permutations(range(5)), seed=st.integers(0, 2**32))
def test_rows_add_up_to_the_weight_gradient(shape: list[int], order: list[int], seed: int) -> None:
    """It is sum g a^T over rows, whatever the strides of input and gradient."""
    torch.manual_seed(seed)
    module, x, gradient = run(tuple(shape))
    by_stride = [i for i in order if i < x.dim()]
    back = [by_stride.index(i) for i in range(x.dim())]
    x = x.permute(by_stride).contiguous().permute(back)
    layer = LinearLayer("layer", module, "expand", "examples")
    rows = layer.rows(x, gradient)
    (a,), (g,) = rows.inputs, rows.gradients
    assert len(a) == len(g) == rows.input_count
    torch.testing.assert_close(g.T @ a, module.weight.grad)
    torch.testing.assert_close(g.sum(0), module.bias.grad)


@pytest.mark.parametrize(
    ("shape", "weight_sharing", "loss_terms", "input_count", "terms"),
    [
        ((), "expand", "examples", 1, 1),
        ((5,), "expand", "examples", 5, 5),
        ((5,), "reduce", "tokens", 5, 5),
        ((3, 4), "expand", "examples", 12, 3),
        ((3, 4), "expand", "tokens", 12, 12),
        ((3, 4), "reduce", "examples", 3, 3),
        ((3, 4), "reduce", "tokens", 3, 12),
        ((3, 2, 4), "expand", "tokens", 24, 24),
        ((3, 2, 4), "reduce", "examples", 3, 3),
    ],
)
def test_counts(shape: tuple[int, ...], weight_sharing: str, loss_terms: str, input_count: int, terms: int) -> None:
    module, x, gradient = run(shape)
    rows = LinearLayer("layer", module, weight_sharing, loss_terms).rows(x, gradient)
    assert (rows.input_count, rows.terms) == (input_count, terms)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (0, 2, 4)], ids=str)
def test_an_empty_batch_has_no_rows(shape: tuple[int, ...], weight_sharing: str) -> None:
    """torch.nn takes it, and so must a hook in its backward pass."""
    module, x, gradient = run(shape)
    layer = LinearLayer("layer", module, weight_sharing, "examples")
    rows = layer.rows(x, gradient)
    assert (rows.input_count, rows.terms) == (0, 0)
    assert all((total == 0).all() for total in factors(layer, x, gradient))


def write_gradient(layer: LinearLayer, out: Tensor) -> None:
    weight, bias = layer.gradient(0)
    assert weight is not None
    fill(out, weight, bias)


@pytest.mark.parametrize("bias", ["trained", "frozen", "none"])
def test_reading_what_was_written_gives_the_gradients(bias: str) -> None:
    """Gradient and read_update are inverse to one another; the pad stays zero."""
    module, _, _ = run((5,), bias != "none")
    if bias == "frozen":
        module.bias.requires_grad_(False)
    layer = LinearLayer("layer", module, "expand", "examples")
    out = torch.zeros(8, 9, dtype=torch.float64)
    write_gradient(layer, out)
    assert (out[3:] == 0).all()
    assert (out[:, layer.input_size :] == 0).all()
    updates = dict(layer.read_update([out]))
    trained = [p for p in module.parameters() if p.requires_grad]
    assert list(updates) == trained
    assert all(torch.equal(updates[p], p.grad) for p in trained)


@pytest.mark.parametrize("bias", [True, False])
def test_writing_what_was_read_gives_the_block(bias: bool) -> None:
    module, _, _ = run((5,), bias)
    layer = LinearLayer("layer", module, "expand", "examples")
    block = torch.randn(3, 4 + bias, dtype=torch.float64)
    for parameter, update in layer.read_update([block]):
        assert update.shape == parameter.shape
        parameter.grad = update.clone()
    out = torch.full_like(block, torch.nan)
    write_gradient(layer, out)
    assert torch.equal(out, block)


def test_a_bias_without_gradient_leaves_no_old_one_behind() -> None:
    """The buffer is that of the last step; a bias that was frozen since then must not go on moving the weight."""
    module, _, _ = run((5,))
    layer = LinearLayer("layer", module, "expand", "examples")
    out = torch.zeros(3, 5, dtype=torch.float64)
    write_gradient(layer, out)
    module.bias.grad = None
    write_gradient(layer, out)
    assert torch.equal(out[:, :4], module.weight.grad)
    assert (out[:, 4] == 0).all()
