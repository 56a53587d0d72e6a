"""Bad arguments: the message names the argument and the value, and no hook is left behind."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from helpers import mlp

from kfac_triton import KFAC, KFACPreconditioner

NAN, INF = float("nan"), float("inf")

NUMBERS = {
    "damping": (0, 0.0, -1.0, NAN, INF),
    "kl_clip": (0, -1e-3, NAN, INF),
    "ema_decay": (-0.1, 1.0, 2, NAN),
    "inverse_tolerance": (0.0, -1.0, 0.3, NAN),
    "statistics_every": (0, -1),
    "inverse_every": (0, -3),
    "loss_scale": (0.0, -2.0, NAN, INF),
    "lr": (-0.1, NAN, INF),
    "momentum": (-0.1, 1.0, NAN),
    "weight_decay": (-0.1, NAN, INF),
    "eps": (-1e-8, NAN),
}
CHOICES = {
    "weight_sharing": "both",
    "inverse": "lu",
    "loss_reduction": "none",
    "loss_terms": "words",
    "tail": "adam",
}
ONLY_KFAC = ("lr", "momentum", "weight_decay", "eps", "tail")


def _refused(kind: type[Exception], name: str, value: Any) -> None:
    pattern = rf"{name}.*{re.escape(repr(value))}"
    model = mlp()
    with pytest.raises(kind, match=pattern):
        KFAC(model, **{name: value})
    if name not in ONLY_KFAC:
        with pytest.raises(kind, match=pattern):
            KFACPreconditioner(model, **{name: value})
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range(name: str, value: float) -> None:
    _refused(ValueError, name, value)


@pytest.mark.parametrize("value", ["0.1", [0.1], True, 1j])
@pytest.mark.parametrize("name", NUMBERS)
def test_values_that_are_no_numbers(name: str, value: Any) -> None:
    _refused(TypeError, name, value)


@pytest.mark.parametrize("name", ["statistics_every", "inverse_every"])
def test_intervals_are_whole(name: str) -> None:
    _refused(TypeError, name, 2.0)


@pytest.mark.parametrize(("name", "value"), CHOICES.items())
def test_choices(name: str, value: str) -> None:
    _refused(ValueError, name, value)
    _refused(TypeError, name, 3)


def test_none_turns_the_kl_clip_off_and_nothing_else() -> None:
    KFAC(mlp(), kl_clip=None).close()
    for name in ("damping", "ema_decay", "lr", "inverse"):
        _refused(TypeError, name, None)


@pytest.mark.parametrize("betas", [(0.9,), 0.9, "ab", (0.9, 1.0), (-0.1, 0.9), (0.9, "x")])
def test_betas(betas: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="betas"):
        KFAC(mlp(), betas=betas)


def test_nesterov() -> None:
    with pytest.raises(TypeError, match="nesterov must be True or False, but is 1"):
        KFAC(mlp(), nesterov=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nesterov needs a momentum"):
        KFAC(mlp(), nesterov=True, momentum=0.0)


def test_tensor_learning_rates() -> None:
    KFAC(mlp(), lr=torch.tensor(0.1)).close()
    with pytest.raises(ValueError, match=r"lr must be .* one element"):
        KFAC(mlp(), lr=torch.tensor([0.1, 0.2]))
    with pytest.raises(ValueError, match="lr must be finite"):
        KFAC(mlp(), lr=torch.tensor(-0.1))


def test_a_loss_scale_callable_that_answers_nonsense() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model, loss_scale=lambda: 0.0)
    model(torch.randn(4, 5, dtype=torch.float64)).sum().backward()
    with pytest.raises(ValueError, match=r"loss_scale must be .* but is 0.0"):
        preconditioner.precondition_()
    assert all((stack.factors == 0).all() for stack in preconditioner.engine.bank.stacks)


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, but is generator"):
        KFAC(mlp().parameters())  # type: ignore[arg-type]
