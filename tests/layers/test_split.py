"""Layers whose output is divided into parts: a fused product against several."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.layers import find_layers

TOLERANCE = 1e-10


class Fused(nn.Module):
    """A product that is cut in three and mixed, from one Linear or from three."""

    def __init__(self, fused: bool, bias: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 6, bias) if fused else nn.ModuleList(nn.Linear(4, 2, bias) for _ in range(3))
        self.fused = fused
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1) if self.fused else (linear(x) for linear in self.qkv)
        return (q.sin() * k + v).square().sum(-1)


@pytest.mark.parametrize("settings", [{}, {"exact_damping": True}, {"curvature": "ekfac"}, {"max_factor_size": 3}], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_split_output_is_several_linears_with_one_input(bias: bool, settings: dict[str, Any]) -> None:
    fused, three = Fused(True, bias), Fused(False, bias)
    for linear, weight in zip(three.qkv, fused.qkv.weight.chunk(3), strict=True):
        linear.weight.data.copy_(weight.data)
    if bias:
        for linear, b in zip(three.qkv, fused.qkv.bias.chunk(3), strict=True):
            linear.bias.data.copy_(b.data)
    x = torch.randn(9, 4, dtype=torch.float64)
    options = {"damping": 1e-2, "kl_clip": None, **settings}
    with KFACPreconditioner(fused, split={"*qkv": 3}, **options) as ours, KFACPreconditioner(three, **options) as theirs:
        for model in (fused, three):
            model(x).mean().backward()
        assert len(ours.engine.partition.parts) == 1 + 3
        gradient = fused.qkv.weight.grad.clone()
        if bias:
            gradient = torch.cat([gradient, fused.qkv.bias.grad[:, None]], 1)
        ours.precondition_()
        theirs.precondition_()
        a, g = ours.factors()["qkv"]
        truth = [theirs.factors()[f"qkv.{i}"] for i in range(3)]
        assert all(relative_error(a, true) <= TOLERANCE for true, _ in truth)
        assert relative_error(g, torch.block_diag(*(true for _, true in truth))) <= TOLERANCE
        update = fused.qkv.weight.grad if not bias else torch.cat([fused.qkv.weight.grad, fused.qkv.bias.grad[:, None]], 1)
        if "exact_damping" in settings or "curvature" in settings:
            expected = [linear.weight.grad for linear in three.qkv]
            assert relative_error(fused.qkv.weight.grad, torch.cat(expected)) <= 1e-8
        elif not settings:
            split = ours.engine.curvature.split
            assert split is not None
            inverse = torch.linalg.inv(a + split.a[0] * torch.eye(len(a)).double())
            blocks = [torch.linalg.inv(true + split.g[0] * torch.eye(2).double()) for _, true in truth]
            solved = torch.cat([block @ w @ inverse for block, w in zip(blocks, gradient.chunk(3), strict=True)])
            assert relative_error(update, solved) <= 1e-8


def test_split_together_with_a_largest_factor_size() -> None:
    model = nn.Linear(3, 12).double()
    with KFACPreconditioner(model, split={"Linear": 2}, max_factor_size=4, oversize="block", damping=1e-2) as ours:
        model(torch.randn(9, 3, dtype=torch.float64)).sin().sum(1).mean().backward()
        ours.precondition_()
        parts = [(p.start, p.stop) for p in ours.engine.partition.parts if not p.is_input]
        assert parts == [(0, 3), (3, 6), (6, 9), (9, 12)]


def test_split_that_does_not_fit() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    with pytest.raises(ValueError, match=r"layer '0' into 4 equal parts.*size 6.*pass one of 2, 3, 6"):
        KFAC(model, split={"0": 4})
    with pytest.raises(ValueError, match=r"'\*.qkv' matches none"):
        KFAC(model, split={"*.qkv": 3})
    with pytest.raises(ValueError, match="split"):
        KFAC(model, split={"0": 0})
    with pytest.raises(TypeError, match="split"):
        KFAC(model, split=["0"])  # type: ignore[arg-type]
    KFAC(model, split={"0": 3, "Linear": 2})
    assert find_layers(model, split={"0": 3, "Linear": 2})[0][0].output_parts == 3
