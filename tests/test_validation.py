"""What is refused, and that the message says which argument had which value."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kfac_triton import KFAC, KFACPreconditioner, validation
from kfac_triton.settings import METHODS, Settings


def model() -> nn.Linear:
    return nn.Linear(3, 2)


@pytest.mark.parametrize("optimizer", [KFAC, KFACPreconditioner])
def test_parameters_in_place_of_the_model_are_named(optimizer: Callable[..., Any]) -> None:
    """What every other optimizer takes."""
    message = (
        "model must be a torch.nn.Module, but is generator; pass the model itself, as in KFAC(model, ...), not its parameters"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        optimizer(model().parameters(), lr=0.1)


NOT_NUMBERS = ["0.1", None, True, False, [0.1], (1,), 1j, torch.tensor([0.1, 0.2])]
NUMBERS = (
    "lr",
    "momentum",
    "weight_decay",
    "eps",
    "damping",
    "kl_clip",
    "ema_decay",
    "inverse_tolerance",
    "loss_scale",
)
NOT_FINITE = [math.nan, math.inf, -math.inf]
NOT_INTEGERS = [1.0, "1", None, True, False, math.nan, math.inf, [1], torch.tensor(1)]
NOT_STRINGS = [None, True, 1, 0.5, ["expand"]]

TYPE_ERRORS: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in NUMBERS
        for value in NOT_NUMBERS
        if not (name == "kl_clip" and value is None) and not (name == "lr" and isinstance(value, torch.Tensor))
    ),
    *((name, value) for name in ("statistics_every", "inverse_every") for value in NOT_INTEGERS),
    *((name, value) for name in ("tail", "weight_sharing", "inverse", "loss_reduction", "calls") for value in NOT_STRINGS),
    *(("loss_terms", value) for value in (None, True, ["tokens"], 1j)),
    *(("nesterov", value) for value in (0, 1, None, "yes", 0.5)),
    *(("betas", value) for value in (0.9, None, (0.9,), (0.9, 0.9, 0.9), "ab", (0.9, None), (True, 0.9), ("a", 0.9))),
]

VALUE_ERRORS: list[tuple[str, Any]] = [
    *((name, value) for name in NUMBERS for value in (*NOT_FINITE, -1.0, -1e-300, -1)),
    *((name, 0) for name in ("damping", "kl_clip", "inverse_tolerance", "loss_scale")),
    *((name, 0.0) for name in ("damping", "kl_clip", "inverse_tolerance", "loss_scale")),
    *((name, value) for name in ("momentum", "ema_decay") for value in (1, 1.0, 1.5)),
    *(("inverse_tolerance", value) for value in (0.3, 0.5, 1)),
    *((name, value) for name in ("statistics_every", "inverse_every") for value in (0, -1)),
    *(
        (name, value)
        for name in ("tail", "weight_sharing", "inverse", "loss_reduction", "loss_terms", "calls")
        for value in ("", "nonsense", "SGD", "Expand")
    ),
    *(("loss_terms", value) for value in (0, -1, 0.0, math.nan, math.inf)),
    *(("betas", value) for value in ((1.0, 0.9), (0.9, 1.0), (-0.1, 0.9), (0.9, math.nan), [0.9, math.inf])),
    ("lr", torch.tensor([0.1, 0.2])),
    ("lr", torch.tensor(-0.1)),
    ("lr", torch.tensor(math.nan)),
    ("damping", 10**400),  # an integer beyond any float
]


def label(case: tuple[str, Any]) -> str:
    return f"{case[0]}={case[1]!r:.30}"


def shown(name: str, value: Any) -> str:
    """How the value looks in the message: the offending part of a pair, the number in a tensor, the shape of a vector."""
    if name == "betas" and isinstance(value, (tuple, list)) and len(value) == 2:
        bad = [i for i, v in enumerate(value) if isinstance(v, (bool, str)) or v is None or not 0 <= v < 1]
        return rf"betas\[{bad[0]}\] .*{re.escape(repr(value[bad[0]]))}"
    if isinstance(value, torch.Tensor) and value.numel() > 1 and name == "lr":
        return rf"lr .*{re.escape(str(tuple(value.shape)))}"
    if isinstance(value, torch.Tensor) and name == "lr":
        return rf"lr .*{re.escape(repr(value.item()))}"
    return rf"\b{name} .*{re.escape(repr(value))}"


@pytest.mark.parametrize("case", TYPE_ERRORS, ids=label)
def test_wrong_types(case: tuple[str, Any]) -> None:
    name, value = case
    with pytest.raises(TypeError, match=shown(name, value)):
        KFAC(model(), **{name: value})


@pytest.mark.parametrize("case", VALUE_ERRORS, ids=label)
def test_wrong_values(case: tuple[str, Any]) -> None:
    name, value = case
    with pytest.raises(ValueError, match=shown(name, value)):
        KFAC(model(), **{name: value})


@pytest.mark.parametrize("bad", [None, "model", 3, [nn.Linear(2, 2)], nn.Linear])
@pytest.mark.parametrize("face", [KFAC, KFACPreconditioner])
def test_model_must_be_a_module(face: Any, bad: Any) -> None:
    with pytest.raises(TypeError, match=rf"model .*Module.* {type(bad).__name__}"):
        face(bad)


def test_nesterov_without_momentum() -> None:
    with pytest.raises(ValueError, match=r"nesterov .*momentum greater than 0"):
        KFAC(model(), nesterov=True, momentum=0.0)


def test_unknown_names() -> None:
    with pytest.raises(TypeError, match="dampening"):
        KFAC(model(), dampening=0.1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="dampening"):
        KFACPreconditioner(model(), dampening=0.1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0),
        ("lr", 0.0),
        ("lr", torch.tensor(0.1)),
        ("lr", torch.tensor([0.1])),
        ("momentum", 0),
        ("momentum", 0.999),
        ("weight_decay", 5),
        ("eps", 0.0),
        ("betas", [0.0, 0.0]),
        ("damping", 1e-30),
        ("damping", Fraction(1, 3)),
        ("damping", np.float32(0.5)),
        ("kl_clip", None),
        ("ema_decay", 0),
        ("inverse_tolerance", 0.2999),
        ("loss_scale", 65536),
        ("loss_scale", lambda: 2.0),
        *(("inverse", method) for method in METHODS),
        ("tail", "adamw"),
        ("weight_sharing", "reduce"),
        ("loss_reduction", "sum"),
        ("loss_terms", "tokens"),
        ("statistics_every", 10**9),
    ],
    ids=lambda value: "function" if callable(value) else str(value),
)
def test_edges_that_are_fine(name: str, value: Any) -> None:
    """And a step works with them."""
    net = model()
    optimizer = KFAC(net, **{name: value})
    net(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("answer", [0.0, -1.0, math.nan, math.inf])
def test_what_the_loss_scale_answers_is_checked(answer: float) -> None:
    with pytest.raises(ValueError, match=rf"loss_scale .*{answer!r}"):
        Settings(loss_scale=lambda: answer).current_loss_scale()
    with pytest.raises(TypeError, match=r"loss_scale .*'1'"):
        Settings(loss_scale=lambda: "1").current_loss_scale()


def test_the_preconditioner_checks_the_same() -> None:
    with pytest.raises(ValueError, match=r"damping .*-1"):
        KFACPreconditioner(model(), damping=-1)
    with pytest.raises(ValueError, match=r"\blr .*nan"):
        KFACPreconditioner(model(), lr=math.nan)
    with pytest.raises(TypeError, match=r"\blr .*True"):
        KFACPreconditioner(model(), lr=True)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (-0.5, {}, "x must be finite and at least 0, but is -0.5"),
        (0.0, {"open_low": True}, "x must be finite and greater than 0, but is 0.0"),
        (2, {"high": 2.0}, "x must be finite and at least 0 and less than 2, but is 2"),
        (1.0, {"low": 1.0, "high": 2.0, "open_low": True}, "x must be finite and greater than 1 and less than 2, but is 1.0"),
        (math.inf, {}, "x must be finite and at least 0, but is inf"),
    ],
)
def test_real_names_its_interval(value: float, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validation.real("x", value, **bounds)


def test_what_passes_comes_back() -> None:
    assert validation.real("x", 3) == 3.0
    assert isinstance(validation.real("x", 3), float)
    assert validation.whole("x", 3) == 3
    assert validation.whole("x", 0, low=0) == 0
    assert validation.choice("x", "a", ("a", "b")) == "a"


def test_messages_of_whole_and_choice() -> None:
    with pytest.raises(ValueError, match=r"^x must be at least 1, but is 0$"):
        validation.whole("x", 0)
    with pytest.raises(TypeError, match=r"^x must be an integer, but is 1\.5 \(float\)$"):
        validation.whole("x", 1.5)
    with pytest.raises(ValueError, match=r"^x must be one of a, b, but is 'c'$"):
        validation.choice("x", "c", ("a", "b"))
    with pytest.raises(TypeError, match=r"^x must be a string, one of a, b, but is 3$"):
        validation.choice("x", 3, ("a", "b"))
