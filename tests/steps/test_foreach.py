"""The tail one by one, many at once, and without a word to the host: the same numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import backward_of_mlp, mlp, relative_error
from support.launches import nobody_waits
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.steps import first_order, param_groups

GROUP: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.0,
    "tail": "sgd",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "foreach": None,
    "maximize": False,
    "capturable": False,
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.0},
    {"nesterov": True, "weight_decay": 0.3},
    {"maximize": True, "nesterov": True},
    {"tail": "adamw"},
    {"tail": "adamw", "weight_decay": 0.3, "maximize": True},
    {"tail": "adamw", "betas": (0.0, 0.0), "eps": 1e-3},
    {"tail": "adamw", "nesterov": True, "momentum": 0.0, "weight_decay": 0.3, "maximize": True},
]


def _move(group: dict[str, Any], kinds: list[torch.dtype], together: bool = True, steps: int = 4) -> list[Tensor]:
    """Parameters of these types after some steps of a group, in one call or each in its own."""
    torch.manual_seed(0)
    params = [torch.randn(3, 2, dtype=torch.float64).to(kind) for kind in kinds for _ in range(2)]
    states = [param_groups.initial_state(nn.Parameter(p), group) for p in params]
    with torch.no_grad():
        for _ in range(steps):
            gradients = [torch.randn(3, 2, dtype=torch.float64).to(p.dtype) for p in params]
            if together:
                first_order.apply(group, params, gradients, states)
            else:
                for p, gradient, state in zip(params, gradients, states, strict=True):
                    first_order.apply(group, [p], [gradient], [state])
    assert all(state["step"] == steps for state in states)
    return params


MIXED = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_types_in_one_group_do_not_mix(options: dict[str, Any], foreach: bool | None, capturable: bool) -> None:
    """Together as each alone, bit for bit."""
    group = {**GROUP, **options, "foreach": foreach, "capturable": capturable}
    pairs = zip(_move(group, MIXED), _move(group, MIXED, together=False), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1), torch.full((1,), 0.1, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_way_gives_the_same_numbers(options: dict[str, Any], lr: float | Tensor) -> None:
    """The reference is one by one, by PyTorch's own SGD and AdamW with a rate on the host."""
    kinds = [torch.float64, torch.complex128]
    number = lr.item() if isinstance(lr, Tensor) else lr
    expected = _move({**GROUP, **options, "lr": number, "foreach": False}, kinds)
    for foreach in (None, False, True):
        for capturable in (False, True):
            if not capturable and isinstance(lr, Tensor) and (foreach or lr.dtype == torch.float32):
                continue  # refused for adamw; and PyTorch's rules then reckon in float32
            moved = _move({**GROUP, **options, "lr": lr, "foreach": foreach, "capturable": capturable}, kinds)
            assert max(relative_error(x, y) for x, y in zip(moved, expected, strict=True)) <= 1e-14


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_few_digits_are_used_as_well_without_the_host(kind: torch.dtype, options: dict[str, Any]) -> None:
    """Against float64: not much further off than PyTorch's own rules, in which the host helps with exact numbers."""
    options = {"eps": 1e-6, **options}  # representable in 16 bits
    truth = _move({**GROUP, **options}, [kind])
    exact = [x.double() for x in _exact({**GROUP, **options}, kind)]
    ours = _move({**GROUP, **options, "lr": torch.tensor(0.1), "capturable": True}, [kind])
    for mine, theirs, right in zip(ours, truth, exact, strict=True):
        assert relative_error(mine.double(), right) <= 2 * relative_error(theirs.double(), right) + torch.finfo(kind).eps


def _exact(group: dict[str, Any], kind: torch.dtype) -> list[Tensor]:
    """In float64 on the numbers that were rounded to `kind`."""
    torch.manual_seed(0)
    params = [torch.randn(3, 2, dtype=torch.float64).to(kind).double() for _ in range(2)]
    states = [param_groups.initial_state(nn.Parameter(p), group) for p in params]
    with torch.no_grad():
        for _ in range(4):
            first_order.apply(group, params, [torch.randn(3, 2, dtype=torch.float64).to(kind).double() for _ in params], states)
    return params


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_read_from_the_device(options: dict[str, Any], foreach: bool | None) -> None:
    group = {**GROUP, **options, "lr": torch.tensor(0.1), "foreach": foreach, "capturable": True}
    params, gradients = ([torch.randn(3, 2, dtype=kind) for kind in (torch.float32, torch.float64)] for _ in range(2))
    states = [param_groups.initial_state(nn.Parameter(p), group) for p in params]
    before = [p.clone() for p in params]
    with torch.no_grad(), nobody_waits():
        first_order.apply(group, params, gradients, states)
    assert not any(torch.equal(*pair) for pair in zip(before, params, strict=True))


@pytest.mark.parametrize("options", [{}, {"tail": "adamw"}], ids=str)
def test_whole_steps_agree(options: dict[str, Any]) -> None:
    trained = []
    for foreach in (None, False, True):
        torch.manual_seed(0)
        model = mlp()
        optimizer = KFAC(model, lr=0.1, damping=0.1, foreach=foreach, **options)
        for seed in range(4):
            backward_of_mlp(model, seed)
            optimizer.step()
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert max(relative_error(x, trained[1]) for x in trained) <= 1e-14


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("kind", param_groups.TAILS)
def test_groups_without_parameters_or_gradients(kind: str, foreach: bool | None) -> None:
    model = mlp()
    first, *_, last = list(model.parameters())
    groups = [{"params": list(model.parameters())[:-1]}, {"params": []}, {"params": [last], "tail": "sgd"}]
    optimizer = KFAC(model, groups, foreach=foreach, tail=kind)
    optimizer.step()  # before any backward pass
    backward_of_mlp(model)
    last.grad = None
    before = [p.detach().clone() for p in (first, last)]
    optimizer.step()
    assert not torch.equal(first, before[0])
    assert torch.equal(last, before[1])
