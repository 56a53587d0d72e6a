"""Factors of Conv1d, Conv2d and Conv3d against BackPACK's KFLR (the exact Gauss-Newton) in float64.

BackPACK backpropagates a square root of the loss's Hessian, one column a class: for a mean squared error of N examples and C
outputs the column of class c is sqrt(2 / (N C)) times the c-th output. Backward passes of those scalars through our hooks give
the same sums. Its A is that of "expand", summed over the T positions where ours averages; its G is that of "reduce" (a sum over
positions before the outer product), a sum where ours is a mean over loss terms. A of "reduce" and G of "expand" have explicit
patches as their oracle, in test_conv.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import KFLR
from helpers import relative_error
from torch import nn

from kfac_triton import KFACPreconditioner

EXAMPLES, CLASSES = 5, 3

CASES = {
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), (2, 9)),
    "conv1d-stride-padding-dilation": (lambda: nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2), (2, 11)),
    "conv2d-stride-padding": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 7, 6)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), (2, 4, 5, 3)),
    "conv3d-stride-padding-dilation": (
        lambda: nn.Conv3d(2, 3, (2, 3, 2), stride=(1, 2, 1), padding=(0, 1, 1), dilation=(1, 1, 2)),
        (2, 4, 5, 3),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_factors(case: str) -> None:
    make_conv, shape = CASES[case]
    x = torch.randn(EXAMPLES, *shape, dtype=torch.float64)
    conv = make_conv().double()
    positions = conv(x).shape[2:].numel()
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(conv.out_channels * positions, CLASSES)).double()

    oracle, loss_function = extend(model), extend(nn.MSELoss())
    loss = loss_function(oracle(x), torch.randn(EXAMPLES, CLASSES, dtype=torch.float64))
    with backpack(KFLR()):
        loss.backward()
    true_g, true_a = conv.weight.kflr

    factors = {}
    for weight_sharing in ("expand", "reduce"):
        with KFACPreconditioner(model, loss_reduction="sum", weight_sharing=weight_sharing) as preconditioner:
            for c in range(CLASSES):
                (math.sqrt(2 / (EXAMPLES * CLASSES)) * model(x)[:, c].sum()).backward()
            preconditioner.precondition_()
            factors[weight_sharing] = preconditioner.factors()["0"]
    side = true_a.shape[0]
    assert relative_error(factors["expand"][0][:side, :side] * positions, true_a) <= 1e-10
    assert relative_error(factors["reduce"][1] * EXAMPLES * CLASSES, true_g) <= 1e-10
