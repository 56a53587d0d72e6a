"""The ones in A, of a bias or of a constant input, where only a part of the rows is taken: their mean is 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kfac_triton import KFACPreconditioner


# Compiled passes of dynamic shapes have one graph for both numbers of rows: 37, which leaves a remainder, stays in `make test`.
@pytest.mark.parametrize(
    ("compiled", "rows"), [(False, 40), (False, 37), pytest.param(True, 40, marks=pytest.mark.slow), (True, 37)]
)
@pytest.mark.parametrize("settings", [{}, {"max_factor_size": 4}, {"max_factor_size": 4, "oversize": "block"}], ids=str)
def test_the_mean_of_ones_is_one(settings: dict[str, Any], compiled: bool, rows: int) -> None:
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else model
    with KFACPreconditioner(model, damping=0.1, stats_fraction=0.5, **settings) as ours:
        run(torch.randn(rows, 5, dtype=torch.float64)).square().mean().backward()
        ours.precondition_()
        for a, _ in ours.factors().values():
            last = a[-1] if a.dim() == 1 else a[-1, -1]
            assert abs(float(last) - 1) <= 1e-12
