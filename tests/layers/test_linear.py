"""Linear layers: A and G of inputs with any number of shared dimensions, expand and reduce, examples and tokens."""

from __future__ import annotations

import pytest
import torch
from helpers import relative_error
from torch import nn

from kfac_triton import KFACPreconditioner
from kfac_triton.layers import find_layers


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (7, 3, 5), (4, 3, 2, 5)])
def test_factors(shape: tuple[int, ...], weight_sharing: str, loss_terms: str, bias: bool) -> None:
    layer = nn.Linear(5, 4, bias=bias).double()
    x = torch.randn(shape, dtype=torch.float64)
    with KFACPreconditioner(layer, weight_sharing=weight_sharing, loss_terms=loss_terms) as preconditioner:
        out = layer(x)
        (gradient,) = torch.autograd.grad(out.sin().mean(), out, retain_graph=True)
        out.sin().mean().backward()
        preconditioner.precondition_()
        a, g = preconditioner.factors()[""]

    rows, gradients = x.reshape(shape[0] if len(shape) > 1 else 1, -1, 5), gradient.reshape(len(x) if x.dim() > 1 else 1, -1, 4)
    examples, positions = rows.shape[:2]
    if weight_sharing == "reduce":
        rows, gradients = rows.mean(1), gradients.sum(1)
    rows, gradients = rows.reshape(-1, 5), gradients.reshape(-1, 4)
    if bias:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    terms = examples * positions if loss_terms == "tokens" else examples
    assert relative_error(a, rows.T @ rows / len(rows)) <= 1e-12
    assert relative_error(g, terms * gradients.T @ gradients) <= 1e-12


def test_noncontiguous_inputs() -> None:
    layer = nn.Linear(5, 4).double()
    x = torch.randn(5, 6, 3, dtype=torch.float64).movedim(0, 2)
    results = []
    for each in (x, x.contiguous()):
        with KFACPreconditioner(layer) as preconditioner:
            layer(each).sin().sum().backward()
            preconditioner.precondition_()
            results.append(preconditioner.factors()[""])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("frozen_bias", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_write_gradient_and_read_update_are_inverse(bias: bool, frozen_bias: bool) -> None:
    module = nn.Linear(5, 4, bias=bias)
    if bias and frozen_bias:
        module.bias.requires_grad_(False)
    (layer,), _ = find_layers(module)
    assert layer.input_size == 5 + (bias and not frozen_bias)
    module(torch.randn(6, 5)).sin().sum().backward()
    block = torch.full((8, 9), torch.nan)
    layer.write_gradient(0, block)
    result = layer.read_update([block])
    assert len(result) == 1 + (bias and not frozen_bias)
    for parameter, value in result:
        assert parameter.grad is not None
        assert torch.equal(value, parameter.grad)
