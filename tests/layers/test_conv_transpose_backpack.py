"""Factors of transposed convolutions against BackPACK's KFLR; for its conventions see test_conv_backpack."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton.kernels.covariance.reference import patch_matrix
from kfac_triton.layers import find_layers


def rows_of(module: nn.Module, weight_sharing: str, x: Tensor, gradient: Tensor) -> list[Tensor]:
    """Rows of A and of G."""
    (layer,), _ = find_layers(module, weight_sharing)
    rows = layer.rows(x, gradient)
    pairs = (rows.inputs[0], rows.input_window), (rows.gradients[0], rows.gradient_window)
    return [x if x.dim() == 2 else patch_matrix(x, window).T for x, window in pairs]


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_factors_are_backpacks(spatial: int) -> None:
    """For its conventions see test_conv_backpack; columns of its A follow weight.transpose(0, 1), not flipped.

    It knows no output padding and no groups, and its G for a bias is the same as for the weight.
    """
    examples, outputs = 4, 3
    conv: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[spatial - 1]
    model = nn.Sequential(
        conv(2, 3, (3, 2, 2)[:spatial], stride=(2, 1, 2)[:spatial], padding=(1, 0, 1)[:spatial]),
        nn.Tanh(),
        conv(3, 2, (2, 3, 1)[:spatial], stride=(1, 2, 2)[:spatial], dilation=(2, 1, 1)[:spatial], bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.LazyLinear(outputs),
    ).double()
    x = torch.randn(examples, 2, *(4, 3, 2)[:spatial], dtype=torch.float64)
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    model(x)
    handles = [m.register_forward_hook(lambda m, args, out: seen.update({m: (args[0].detach(), out)})) for m in model[:3:2]]
    output = model(x)
    for handle in handles:
        handle.remove()
    scale = math.sqrt(2 / (examples * outputs))
    columns = [scale * torch.eye(outputs, dtype=torch.float64)[c].expand(examples, outputs) for c in range(outputs)]
    activations = [seen[m][1] for m in model[:3:2]]
    gradients = [torch.autograd.grad(output, activations, column, retain_graph=True) for column in columns]
    extend(model)
    loss = extend(nn.MSELoss())(model(x), torch.randn(examples, outputs, dtype=torch.float64))
    with pytest.warns(UserWarning, match="transposed"), backpack(KFLR()):
        loss.backward()
    for number, module in enumerate(model[:3:2]):
        oracle_g, oracle_a = module.weight.kflr
        channels, kernel = module.in_channels, module.kernel_size
        inputs, activation = seen[module]
        a = rows_of(module, "expand", inputs, torch.zeros_like(activation))[0]
        a = a[:, : channels * math.prod(kernel)].unflatten(1, (channels, *kernel))
        a = a.flip(tuple(range(2, 2 + spatial))).flatten(1)
        assert relative_error(a.T @ a / examples, oracle_a) <= 1e-10
        rows = [rows_of(module, "reduce", inputs, gradient[number])[1] for gradient in gradients]
        g = sum((row.T @ row for row in rows), torch.zeros_like(oracle_g))
        assert relative_error(g, oracle_g) <= 1e-10
        if module.bias is not None:
            assert relative_error(g, module.bias.kflr[0]) <= 1e-10
