"""Factors of convolutions against BackPACK's KFLR, an independent implementation, in one, two and three dimensions.

BackPACK's conventions (backpack/extensions/secondorder/hbp/convnd.py), for N examples and T positions:

- the input factor is (1 / N) sum over examples and positions of a a^T without the bias: T times our A of "expand";
- the other factor is the exact GGN of the bias: sum over classes c and examples n of h h^T, with h the sum over positions of
  the gradient that the c-th column of the loss Hessian's square root sends back, which is sqrt(2 / (N C)) e_c for a mean
  squared error with C outputs. Our G of "reduce" has these rows when these columns are sent backward one by one.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton.kernels import ops
from kfac_triton.layers import Layer, find_layers

EXAMPLES, OUTPUTS = 4, 3
TOLERANCE = 1e-10


def net(spatial: int) -> nn.Sequential:
    """Two convolutions with stride, padding and dilation."""
    conv: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    return nn.Sequential(
        conv(2, 3, (3, 2, 2)[:spatial], stride=(2, 1, 2)[:spatial], padding=(1, 0, 1)[:spatial]),
        nn.Tanh(),
        conv(3, 4, (2, 3, 1)[:spatial], padding=(2, 1, 0)[:spatial], dilation=(2, 1, 1)[:spatial], bias=False),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.LazyLinear(OUTPUTS),
    ).double()


def sums(layer: Layer, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor, int]:
    """Sums of a a^T and g g^T, and the number of rows of A."""
    rows = layer.rows(x, gradient)
    out = [torch.empty(n, n, dtype=torch.float64) for n in (layer.input_size, layer.output_size)]
    one, zero = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    ops.covariance_ema(
        out, rows.inputs + rows.gradients, one, zero, [layer.has_bias, False], [rows.input_window, rows.gradient_window]
    )
    return out[0], out[1], rows.input_count


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_factors(spatial: int) -> None:
    model = net(spatial)
    x = torch.randn(EXAMPLES, 2, *(8, 7, 6)[:spatial], dtype=torch.float64, requires_grad=True)
    model(x)  # the lazy layer gets its weights
    plain = [m for m in model if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]

    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    handles = [m.register_forward_hook(lambda m, args, out: seen.update({m: (args[0].detach(), out)})) for m in plain]
    output = model(x)
    for handle in handles:
        handle.remove()
    scale = math.sqrt(2 / (EXAMPLES * OUTPUTS))
    columns = [scale * torch.eye(OUTPUTS, dtype=torch.float64)[c].expand(EXAMPLES, OUTPUTS) for c in range(OUTPUTS)]
    activations = [seen[m][1] for m in plain]
    gradients = [torch.autograd.grad(output, activations, column, retain_graph=True) for column in columns]

    extend(model)
    loss = extend(nn.MSELoss())(model(x), torch.randn(EXAMPLES, OUTPUTS, dtype=torch.float64))
    with backpack(KFLR()):
        loss.backward()

    for number, module in enumerate(plain):
        oracle_g, oracle_a = module.weight.kflr
        inputs, activation = seen[module]
        positions = activation.shape[2:].numel()
        size = oracle_a.shape[0]
        expand, reduce = (
            next(x for x in find_layers(model, sharing)[0] if x.module is module) for sharing in ("expand", "reduce")
        )
        a, _, count = sums(expand, inputs, torch.zeros_like(activation))
        assert count == EXAMPLES * positions
        assert relative_error(positions * a[:size, :size] / count, oracle_a) <= TOLERANCE
        g = sum(sums(reduce, inputs, gradient[number])[1] for gradient in gradients)
        assert isinstance(g, Tensor)
        assert relative_error(g, oracle_g) <= TOLERANCE
        if module.bias is not None:
            assert relative_error(g, module.bias.kflr[0]) <= TOLERANCE
