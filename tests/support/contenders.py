"""KFAC, KFACPreconditioner in front of AdamW, and AdamW alone under the same tests; and what became of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support.helpers import mlp
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from kfac_triton import KFAC, KFACAdam, KFACPreconditioner

CONVENTIONS = {
    1: "is an Optimizer; schedulers accept it",
    2: "wrappers share groups and state",
    3: "tensors, dicts, named pairs; bad lists refused",
    4: "lr may be a tensor",
    5: "arguments are checked, also in add_param_group",
    6: "closure",
    7: "no gradient: skipped; gradients not written",
    8: "add_param_group",
    9: "state_dict, deepcopy, pickle",
    10: "torch.load(weights_only=True)",
    11: "distributed checkpoints",
    12: "types of state survive loading",
    13: "GradScaler",
    14: "steps skipped for an inf",
    15: "clip_grad_norm_ on raw gradients",
    16: "order of scheduler and optimizer",
    17: "foreach, fused, maximize",
    18: "capturable; nothing read from the device",
    19: "torch.compile of the step",
    20: "DistributedDataParallel",
    21: "FSDP2; swapped parameters",
    22: "activation checkpointing",
    23: "eval, no_grad, inference_mode",
    24: "torch.func",
    25: "deepcopy of the model",
    26: "hooks go away",
    27: "one warning, at the user's line; no prints",
    28: "no train() and eval() of its own",
    29: "weight and bias in different groups",
    30: "Lightning: keyword closure, dynamic subclass",
    31: "every parameter trains",
    32: "layers whose forward never runs",
}
ALL = ("KFAC", "KFACAdam", "KFACPreconditioner", "AdamW")
OURS = ("KFAC", "KFACAdam")
# (convention, test) -> contender -> outcomes, one a run of the test.
OUTCOMES: dict[tuple[int, str], dict[str, list[str]]] = {}
FAILURE = "FAILS"


def _kfac(model: nn.Module, params: Iterable[Any] | None, settings: dict[str, Any], options: dict[str, Any]) -> Optimizer:
    return KFAC(model, params, **{"lr": 0.1, "damping": 0.1, **settings, **options})


def _kfac_adam(model: nn.Module, params: Iterable[Any] | None, settings: dict[str, Any], options: dict[str, Any]) -> Optimizer:
    intervals = {"refresh_every": 1 if "capturable" in options else 2, "refresh_warmup": 1}
    return KFACAdam(model, params, **{"lr": 0.01, **intervals, **settings, **options})


def _adamw(model: nn.Module, params: Iterable[Any] | None, settings: dict[str, Any], options: dict[str, Any]) -> Optimizer:
    return AdamW(model.parameters() if params is None else params, **{"lr": 0.01, **options})


def _preconditioned(
    model: nn.Module, params: Iterable[Any] | None, settings: dict[str, Any], options: dict[str, Any]
) -> Optimizer:
    optimizer: Any = _adamw(model, params, {}, options)
    optimizer.in_front = KFACPreconditioner(model, **{"damping": 0.1, **settings})
    optimizer.in_front.attach(optimizer)
    return optimizer


@dataclass(frozen=True)
class Contender:
    """Makes optimizers of one kind; settings of the curvature are for those that have any."""

    name: str
    make: Callable[[nn.Module, Iterable[Any] | None, dict[str, Any], dict[str, Any]], Optimizer]

    def __call__(
        self, model: nn.Module, params: Iterable[Any] | None = None, settings: dict[str, Any] | None = None, **options: Any
    ) -> Optimizer:
        return self.make(model, params, settings or {}, options)

    @property
    def is_kfac(self) -> bool:
        return self.name in OURS

    @property
    def is_adam(self) -> bool:
        """Whether its directions have a length of their own: without a KL clip, damping or another rule behind."""
        return self.name == "KFACAdam"

    @property
    def tails(self) -> tuple[dict[str, Any], ...]:
        """Options that change the rule behind the preconditioned gradients."""
        return ({}, {"tail": "adamw"}) if self.name == "KFAC" else ({},)

    @property
    def has_hooks(self) -> bool:
        return self.name != "AdamW"

    def variants(self) -> dict[str, dict[str, Any]]:
        """Options that change what the state holds."""
        if self.name != "KFAC":
            return {"": {}}
        auto = {"lr": "auto", "loss": nn.CrossEntropyLoss()}
        return {"sgd": {}, "adamw": {"tail": "adamw"}, "ekfac": {"curvature": "ekfac"}, "auto": auto}


_CONTENDERS = {
    "KFAC": Contender("KFAC", _kfac),
    "KFACAdam": Contender("KFACAdam", _kfac_adam),
    "KFACPreconditioner": Contender("KFACPreconditioner", _preconditioned),
    "AdamW": Contender("AdamW", _adamw),
}


@dataclass(frozen=True)
class Fails:
    """How a contender breaks a convention, and a pattern of the error that shows it."""

    how: str
    match: str


def convention(number: int, contenders: tuple[str, ...] = (*OURS, "AdamW"), **fails: Fails) -> Callable[[Any], Any]:
    """Runs a test for each contender and records the outcome: what it returns, or "pass".

    A contender with `Fails` must fail in that way; KFAC and KFACAdam never have one.
    """
    assert number in CONVENTIONS
    assert set(fails) <= set(contenders) - set(OURS)

    def decorate(test: Callable[..., str | None]) -> Any:
        name = test.__name__.removeprefix("test_")

        @functools.wraps(test)
        def run(contender: str, **fixtures: Any) -> None:
            outcomes = OUTCOMES.setdefault((number, name), {}).setdefault(contender, [])
            outcomes.append(FAILURE)
            if contender in fails:
                with pytest.raises((Exception, pytest.fail.Exception), match=fails[contender].match):
                    test(_CONTENDERS[contender], **fixtures)
                outcomes[-1] = "fails: " + fails[contender].how
            else:
                outcomes[-1] = test(_CONTENDERS[contender], **fixtures) or "pass"

        run.convention = number  # type: ignore[attr-defined]
        return pytest.mark.parametrize("contender", contenders)(run)

    return decorate


def preconditioner_of(optimizer: Optimizer) -> Any:
    """What has the factors: KFAC itself, or the preconditioner in front; None for AdamW."""
    return optimizer if isinstance(optimizer, KFAC) else getattr(optimizer, "in_front", None)


def factors(optimizer: Optimizer) -> list[Tensor]:
    """All factors, copied; none for AdamW."""
    owner = preconditioner_of(optimizer)
    return [] if owner is None else [side for pair in owner.factors().values() for side in pair]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two lists of tensors are the same, bit for bit."""
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def vector(model: nn.Module) -> Tensor:
    """A copy of all parameters, end to end."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """The same parameters each time."""
    torch.manual_seed(0)
    return mlp(dtype)


def batch(model: nn.Module, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return x.to(next(model.parameters()).dtype), torch.randint(4, (12,), generator=generator)


def loss_of(model: nn.Module, seed: int) -> Tensor:
    x, y = batch(model, seed)
    return nn.functional.cross_entropy(model(x), y)


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> Tensor:
    """Parameters after some steps, each on a batch of its own."""
    for step in range(first, first + steps):
        optimizer.zero_grad()
        if isinstance(optimizer, KFAC) and optimizer.is_auto:
            x, y = batch(model, step)
            optimizer.step(lambda x=x, y=y: (model(x), y))
        else:
            loss_of(model, step).backward()
            optimizer.step()
    return vector(model)
