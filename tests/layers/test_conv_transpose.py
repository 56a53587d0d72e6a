"""Transposed convolutions: rows of A from the Jacobian, updates against dense systems, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import (
    DAMPING,
    assert_an_idle_expert_stays,
    assert_checkpoint_keeps_the_run,
    assert_close,
    kronecker_solve,
    preconditioned,
)
from torch import Tensor, nn

from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance.reference import patch_matrix
from kfac_triton.layers import Layer, find_layers

SIZES = (4, 3, 2)
MODULES: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FUNCTIONS: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)

# For 1, 2 and 3 dimensions: each entry of a pair is of the first dimensions and of the last one.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": (3, 2)},
    "stride": {"kernel_size": (3, 2), "stride": (2, 3)},
    "stride beyond the kernel": {"kernel_size": (2, 1), "stride": (3, 2)},
    "padding": {"kernel_size": (3, 2), "padding": (1, 1)},
    "padding that crops": {"kernel_size": (1, 2), "padding": (1, 2), "stride": (2, 3), "output_padding": (1, 2)},
    "output padding": {"kernel_size": (2, 3), "stride": (3, 2), "output_padding": (2, 1)},
    "dilation": {"kernel_size": (2, 3), "stride": (1, 2), "dilation": (3, 2), "padding": (2, 1), "output_padding": (2, 1)},
    "pointwise": {"kernel_size": (1, 1)},
    "pointwise, shifted": {"kernel_size": (1, 1), "padding": (1, 1), "dilation": (3, 3), "output_padding": (2, 2)},
    "pointwise, longer": {"kernel_size": (1, 1), "dilation": (2, 2), "output_padding": (1, 0)},
    "pointwise, stride": {"kernel_size": (1, 1), "stride": (2, 3), "output_padding": (1, 0)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two groups": {"groups": 2},
    "depthwise": {"groups": 4, "out_channels": 4},
    "no bias": {"bias": False},
}


def make(spatial: int, geometry: dict[str, Any], **options: Any) -> Any:
    full = {key: (value[0],) * (spatial - 1) + value[1:] for key, value in geometry.items()}
    return MODULES[spatial - 1](**{"in_channels": 4, "out_channels": 6, **full, **options}, dtype=torch.float64)


def run(module: Any, images: int | None = 3, **options: Any) -> tuple[Tensor, Tensor]:
    """Input and gradient of the output; the parameters have their gradients. Without images, unbatched."""
    shape = [] if images is None else [images]
    x = torch.randn(*shape, module.in_channels, *SIZES[: len(module.kernel_size)], dtype=torch.float64)
    output = module(x, **options)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    return x, gradient


def adapter(module: nn.Module, weight_sharing: str = "expand", loss_terms: str = "examples") -> Layer:
    (layer,), _ = find_layers(module, weight_sharing, loss_terms)
    return layer


def explicit_rows(module: Any, x: Tensor) -> list[Tensor]:
    """Rows of A, (N, positions, -1) a group: how an output of each position changes with each weight it is made of."""
    spatial, groups = len(module.kernel_size), module.groups
    inside, outside = module.in_channels // groups, module.out_channels // groups

    def output(weight: Tensor) -> Tensor:
        function = FUNCTIONS[spatial - 1]
        options = module.stride, module.padding, module.output_padding, groups, module.dilation
        return function(x, weight, None, *options).flatten(2)[:, ::outside]

    jacobian = torch.func.jacrev(output)(module.weight.detach())  # (N, groups, positions, in, out / groups, *kernel)
    result = []
    for group in range(groups):
        a = jacobian[:, group, :, group * inside : (group + 1) * inside, 0]
        a = a.flip(tuple(range(3, 3 + spatial))).flatten(2)
        result.append(a if module.bias is None else torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2))
    return result


def matrices(layer: Layer, x: Tensor, gradient: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Per group the rows of A, with ones for the bias, and of G."""
    rows = layer.rows(x, gradient)
    result = []
    for inputs, gradients in zip(rows.inputs, rows.gradients, strict=True):
        a = inputs if inputs.dim() == 2 else patch_matrix(inputs, rows.input_window).T
        g = gradients if gradients.dim() == 2 else patch_matrix(gradients, rows.gradient_window).T
        a = torch.cat([a, a.new_ones(len(a), 1)], 1) if layer.has_bias else a
        assert len(a) == len(g) == rows.input_count
        result.append((a, g))
    return result


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_rows_are_those_of_the_jacobian(spatial: int, name: str, options: str, weight_sharing: str) -> None:
    module = make(spatial, GEOMETRIES[name], **OPTIONS[options])
    x, gradient = run(module, 2)
    truth = explicit_rows(module, x)
    found = matrices(adapter(module, weight_sharing), x, gradient)
    for (a, g), expected, channels in zip(found, truth, gradient.flatten(2).chunk(module.groups, 1), strict=True):
        if weight_sharing == "reduce":
            assert_close(a, expected.mean(1))
            assert_close(g, channels.sum(2))
        else:
            assert_close(a, expected.flatten(0, 1))
            assert_close(g, channels.mT.flatten(0, 1))


def test_the_input_of_a_pointwise_layer_is_not_copied() -> None:
    module = make(2, GEOMETRIES["pointwise"])
    x, gradient = run(module, 2)
    assert adapter(module).rows(x, gradient).inputs[0].data_ptr() == x.data_ptr()


def assert_rows_add_up(module: Any, x: Tensor, gradient: Tensor) -> None:
    """It is sum g a^T over the rows of a group: no oracle but autograd."""
    layer = adapter(module)
    blocks = []
    for group, (a, g) in enumerate(matrices(layer, x, gradient)):
        block = g.T @ a
        weight, bias = layer.gradient(group)
        assert weight is not None
        written = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias[:, None]], 1)
        assert written.shape == (layer.output_size, layer.input_size)
        torch.testing.assert_close(block, written, rtol=1e-10, atol=1e-10)
        blocks.append(F.pad(block, (0, 2, 0, 3)))
    for parameter, update in layer.read_update(blocks):
        assert parameter.grad is not None
        torch.testing.assert_close(update, parameter.grad, rtol=1e-10, atol=1e-10)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(0, 2**32))
def test_rows_add_up_to_the_weight_gradient(data: st.DataObject, spatial: int, seed: int) -> None:
    torch.manual_seed(seed)

    def sides(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(low, high), min_size=spatial, max_size=spatial)))

    kernel, stride, dilation = sides(1, 3), sides(1, 3), sides(1, 2)
    output_padding = tuple(min(o, max(s, d) - 1) for o, s, d in zip(sides(0, 2), stride, dilation, strict=True))
    full = [
        (n - 1) * s + d * (k - 1) + 1 + o
        for n, s, d, k, o in zip(SIZES, stride, dilation, kernel, output_padding, strict=False)
    ]
    padding = tuple(min(p, (n - 1) // 2) for p, n in zip(sides(0, 4), full, strict=True))
    module = MODULES[spatial - 1](
        4,
        4 * data.draw(st.integers(1, 2)),
        kernel,
        stride,
        padding,
        output_padding,
        groups=data.draw(st.sampled_from([1, 2, 4])),
        dilation=dilation,
        bias=data.draw(st.booleans()),
        dtype=torch.float64,
    )
    assert_rows_add_up(module, *run(module, data.draw(st.sampled_from([None, 1, 3]))))


@pytest.mark.parametrize("size", [7, 8])
def test_a_call_that_chooses_its_output_size(size: int) -> None:
    module = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, groups=2, dtype=torch.float64)
    x, gradient = run(module, output_size=[size])
    assert gradient.shape[2] == size
    assert_rows_add_up(module, x, gradient)
    model = nn.ModuleList([module])
    truth = adapter(module).rows(x, gradient)
    # Named, and the input not first: a hook gets the names in the order of the call.
    preconditioner, _ = preconditioned(model, lambda model: (model[0](output_size=[size], input=x) * gradient).mean((1, 2)))
    a = truth.inputs[0]
    patches = patch_matrix(a, truth.input_window)
    assert_close(preconditioner.factors()["0"][0][0][:-1, :-1], patches @ patches.T / truth.input_count)


@pytest.mark.parametrize(("loss_terms", "terms"), [("examples", 3), ("tokens", 3 * 9 * 7)])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_counts(loss_terms: str, terms: int, weight_sharing: str) -> None:
    module = make(2, {"kernel_size": (3, 3), "stride": (2, 2)})
    x, gradient = run(module)
    rows = adapter(module, weight_sharing, loss_terms).rows(x, gradient)
    assert (rows.terms, rows.examples) == (terms, 3)
    assert rows.input_count == (3 if weight_sharing == "reduce" else 3 * 9 * 7)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_an_empty_batch_has_no_rows(spatial: int, weight_sharing: str) -> None:
    module = make(spatial, GEOMETRIES["dilation"], groups=2)
    x, gradient = run(module, 0)
    layer = adapter(module, weight_sharing)
    rows = layer.rows(x, gradient)
    assert (rows.input_count, rows.terms) == (0, 0)
    total = [torch.ones(n, n, dtype=torch.float64) for n in (layer.input_size, layer.output_size)]
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    windows = [rows.input_window, rows.gradient_window]
    ops.covariance_ema(total, [rows.inputs[0], rows.gradients[0]], one, zero, [True, False], windows)
    assert all((x == 0).all() for x in total)


def matrix(module: Any, weight: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """W of a group, element by element: channels swapped, kernel flipped."""
    inside, outside = module.in_channels // module.groups, module.out_channels // module.groups
    own = weight[group * inside : (group + 1) * inside]
    columns = [own[(c, slice(None), *index)] for c in range(inside) for index in _reversed_indices(module.kernel_size)]
    if bias is not None:
        columns.append(bias[group * outside : (group + 1) * outside])
    return torch.stack(columns, 1)


def _reversed_indices(kernel: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [
        tuple(int(i) for i in index) for index in torch.cartesian_prod(*(torch.arange(k) for k in kernel)).view(-1, len(kernel))
    ][::-1]


@pytest.mark.parametrize("sides", [{}, {"max_factor_size": 6}, {"max_factor_size": 6, "oversize": "block"}], ids=str)
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("spatial", [1, 2])
def test_the_engine(spatial: int, options: str, weight_sharing: str, sides: dict[str, Any]) -> None:
    if "oversize" in sides and spatial == 2:
        sides = {**sides, "max_factor_size": 13}
    module = make(spatial, GEOMETRIES["dilation"], **OPTIONS[options])
    model = nn.Sequential(module, nn.Tanh())
    x = torch.randn(5, 4, *SIZES[:spatial], dtype=torch.float64)
    out = module(x).detach().requires_grad_()
    g = torch.autograd.grad(out.tanh().square().flatten(1).mean(1).sum(), out)[0]
    truth = explicit_rows(module, x)
    preconditioner, before = preconditioned(
        model, lambda model: model(x).square().flatten(1).mean(1), weight_sharing=weight_sharing, **sides
    )
    a_all, g_all = preconditioner.factors()["0"]
    if module.groups == 1:
        a_all, g_all = a_all[None], g_all[None]
    old_bias = before[1] if len(before) > 1 else None
    for group, (rows, channels) in enumerate(zip(truth, g.flatten(2).chunk(module.groups, 1), strict=True)):
        a_rows = rows.mean(1) if weight_sharing == "reduce" else rows.flatten(0, 1)
        g_rows = channels.sum(2) if weight_sharing == "reduce" else channels.mT.flatten(0, 1)
        kept_a, kept_g = a_all[group], g_all[group]
        truth_a, truth_g = a_rows.T @ a_rows / len(a_rows), g_rows.T @ g_rows / 5
        for kept, full in ((kept_a, truth_a), (kept_g, truth_g)):
            if kept.dim() == 1:
                assert_close(kept, full.diagonal())
            else:
                mask = kept != 0 if "oversize" in sides else torch.ones_like(kept, dtype=torch.bool)
                assert_close(kept[mask], full[mask])
        expected = kronecker_solve(matrix(module, before[0], old_bias, group), kept_a, kept_g)
        new_bias = None if module.bias is None else module.bias.grad
        assert_close(matrix(module, module.weight.grad, new_bias, group), expected, 1e-10)


@pytest.mark.parametrize("curvature", [{"exact_damping": True}, {"curvature": "ekfac"}], ids=["exact", "ekfac"])
def test_exact_damping(curvature: dict[str, Any]) -> None:
    """EKFAC begins with the eigenvalues of the Kronecker product."""
    module = make(2, GEOMETRIES["stride"], groups=2)
    x = torch.randn(5, 4, *SIZES[:2], dtype=torch.float64)
    model = nn.Sequential(module, nn.Tanh())
    preconditioner, before = preconditioned(model, lambda model: model(x).square().flatten(1).mean(1), **curvature)
    for group, (a, g) in enumerate(zip(*preconditioner.factors()["0"], strict=True)):
        old, new = (matrix(module, *pair, group) for pair in (before, (module.weight.grad, module.bias.grad)))
        fisher = torch.kron(g, a)
        expected = torch.linalg.solve(fisher + DAMPING * torch.eye(len(fisher), dtype=torch.float64), old.flatten())
        assert_close(new, expected.view_as(old), 1e-9)


def test_training_in_bfloat16() -> None:
    module = make(2, GEOMETRIES["dilation"], groups=2).to(torch.bfloat16)
    x = torch.randn(5, 4, *SIZES[:2]).to(torch.bfloat16)
    model = nn.Sequential(module, nn.Tanh())
    preconditioner, before = preconditioned(model, lambda model: model(x).square().flatten(1).mean(1))
    a, g = preconditioner.factors()["0"]
    assert a.dtype == g.dtype == torch.float32
    for group in range(2):
        old, new = (matrix(module, *pair, group).double() for pair in (before, (module.weight.grad, module.bias.grad)))
        assert_close(new, kronecker_solve(old, a[group].double(), g[group].double()), 2e-2)


def test_a_frozen_bias_and_a_frozen_weight() -> None:
    module = make(1, GEOMETRIES["stride"], groups=2)
    module.bias.requires_grad_(False)
    run(module)
    layer = adapter(module)
    assert layer.input_size == 2 * 2
    assert [p is module.weight for p, _ in layer.read_update([torch.zeros(3, 4)] * 2)] == [True]
    module.weight.requires_grad_(False)
    assert find_layers(module) == ([], {"": "its weight is frozen"})
    with pytest.raises(ValueError, match="lazy"):
        find_layers(nn.LazyConvTranspose2d(3, 2))


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_an_expert_without_tokens(spatial: int) -> None:
    pair = [make(spatial, GEOMETRIES["dilation"], groups=2) for _ in range(2)]
    assert_an_idle_expert_stays(*pair, torch.randn(3, 4, *SIZES[:spatial], dtype=torch.float64))


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_checkpoints(weight_sharing: str) -> None:
    x = torch.randn(3, 4, *SIZES[:2], dtype=torch.float64)
    assert_checkpoint_keeps_the_run(
        lambda: nn.Sequential(make(2, GEOMETRIES["dilation"], groups=2), nn.Tanh()),
        lambda model: model(x).square().flatten(1).mean(1),
        weight_sharing=weight_sharing,
    )


def test_compiled_training_is_eager_training() -> None:
    x = torch.randn(3, 4, *SIZES[:2], dtype=torch.float64)
    results = []
    for compiled in (False, True):
        torch.manual_seed(2)
        torch.compiler.reset()
        model = nn.Sequential(make(2, GEOMETRIES["dilation"], groups=2), nn.Tanh())

        def losses(model: nn.Module, compiled: bool = compiled) -> Tensor:
            call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
            return call(x).square().flatten(1).mean(1)

        results.append(preconditioned(model, losses)[0].factors()["0"])
    torch.compiler.reset()
    for eager, other in zip(*results, strict=True):
        assert_close(other, eager)
