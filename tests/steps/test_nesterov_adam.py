"""AdamW with Nesterov's look ahead, for which PyTorch has no rule: against the formula, a number at a time in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton.steps import first_order, param_groups

GROUP: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.0,
    "nesterov": True,
    "weight_decay": 0.01,
    "tail": "adamw",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "foreach": None,
    "maximize": False,
    "capturable": False,
}
LOOKING_AHEAD: list[dict[str, Any]] = [
    {},
    {"lr": torch.tensor(0.03, dtype=torch.float64), "maximize": True},
    {"capturable": True, "lr": torch.tensor([0.03], dtype=torch.float64)},
    {"betas": (0.0, 0.0), "weight_decay": 0.0, "eps": 1e-3},
]


@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("options", LOOKING_AHEAD, ids=str)
def test_adamw_with_nesterov_is_the_formula(options: dict[str, Any], dtype: torch.dtype, foreach: bool | None) -> None:
    """A number at a time; of complex ones the parts. Momentum, an option of SGD, does not matter."""
    torch.manual_seed(0)
    group = {**GROUP, "foreach": foreach, **options}
    param_groups.validate_group(group)
    params = [torch.randn(shape, dtype=dtype) for shape in ((2, 3), (), (4,))]
    gradients = [[torch.randn_like(p) for p in params] for _ in range(4)]
    expected = [
        torch.tensor(
            [
                _by_hand(float(x), [float(g) for g in own], group)
                for x, *own in zip(_numbers(p), *(_numbers(gs[i]) for gs in gradients), strict=True)
            ],
            dtype=torch.float64,
        )
        for i, p in enumerate(params)
    ]
    states = [param_groups.initial_state(nn.Parameter(p), group) for p in params]
    with torch.no_grad():
        for some in gradients:
            first_order.apply(group, params, some, states)
    for p, right in zip(params, expected, strict=True):
        torch.testing.assert_close(_numbers(p), right, rtol=1e-13, atol=1e-13)
    assert all(state["step"] == 4 for state in states)


def _numbers(x: Tensor) -> Tensor:
    return (torch.view_as_real(x) if x.is_complex() else x).flatten()


def _by_hand(x: float, gradients: list[float], group: dict[str, Any]) -> float:
    """Adam's step along b1 M / (1 - b1^t) + (1 - b1) g."""
    (beta1, beta2), lr, mean, square = group["betas"], float(group["lr"]), 0.0, 0.0
    for t, g in enumerate(gradients, 1):
        g = -g if group["maximize"] else g
        mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g * g
        ahead = beta1 * mean / (1 - beta1**t) + (1 - beta1) * g
        x = (1 - lr * group["weight_decay"]) * x - lr * ahead / ((square / (1 - beta2**t)) ** 0.5 + group["eps"])
    return x


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 8), (torch.bfloat16, 2), (torch.float16, 2)], ids=str)
def test_adamw_with_nesterov_in_few_digits(dtype: torch.dtype, roundings: int) -> None:
    """One step from zero, against the formula on the moments as stored: in 16 bits the root and the step are rounded."""
    torch.manual_seed(0)
    group = {**GROUP, "weight_decay": 0.0, "eps": 0.0, "lr": 1.0}
    p, gradient = torch.zeros(2000, dtype=dtype), (torch.randn(2000).sign() * (1 + torch.rand(2000))).to(dtype)
    state = param_groups.initial_state(nn.Parameter(p), group)
    with torch.no_grad():
        first_order.apply(group, [p], [gradient], [state])
    mean, square = state["exp_avg"].double(), state["exp_avg_sq"].double()
    right = -(0.9 * mean / 0.1 + 0.1 * gradient.double()) / (square / 0.001).sqrt()
    torch.testing.assert_close(p.double(), right, rtol=1.01 * roundings * torch.finfo(dtype).eps / 2, atol=0)
