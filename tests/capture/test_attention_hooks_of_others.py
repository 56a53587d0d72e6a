"""Hooks of others on attentions: layers are captured inside of its forward, with the query that it takes.

Truths are explicit gradients in float64 on a forward pass by hand, which has no hooks.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from kfac_triton import KFACPreconditioner
from kfac_triton.capture.hook_order import LastHook

TOLERANCE = 1e-12
EXAMPLES = 6


def loss_of(output: Tensor) -> Tensor:
    return output.sin().square().sum(1).mean()


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """No warning but those that a test waits for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


class Through(torch.autograd.Function):
    """Twice its input. Autograd Functions take what a tensor subclass holds, and not the graph behind it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


QUERIES: dict[str, Callable[[Tensor], Tensor]] = {"shift": lambda x: x.sin() + 0.5, "function": Through.apply}


class Block(nn.Module):
    """A linear layer and an attention with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4, dtype=torch.float64)
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(x, x, x)[0]

    def by_hand(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """The attention's layers -> A and G, where the query alone is changed."""
        x = F.linear(x, self.first.weight, self.first.bias)
        weights, biases = self.attention.in_proj_weight.chunk(3), self.attention.in_proj_bias.chunk(3)
        inputs = {"q": change(x), "k": x, "v": x}
        own = {part: F.linear(inputs[part], w, b) for part, w, b in zip("qkv", weights, biases, strict=True)}
        inputs["out_proj"] = (own["q"] @ own["k"].mT / 2).softmax(-1) @ own["v"]
        own["out_proj"] = F.linear(inputs["out_proj"], self.attention.out_proj.weight, self.attention.out_proj.bias)
        loss = loss_of(own["out_proj"].flatten(1))
        result = {}
        for part, g in zip(own, torch.autograd.grad(loss, list(own.values()), retain_graph=True), strict=True):
            a = torch.cat([inputs[part], torch.ones_like(inputs[part][..., :1])], -1).detach().flatten(0, 1)
            g = g.flatten(0, 1)
            result[f"attention.{part}"] = (a.T @ a / len(a), g.T @ g * EXAMPLES)
        loss.backward()
        return result


@pytest.mark.parametrize("when", ["before", "after", "between passes"])
@pytest.mark.parametrize("change", QUERIES)
def test_a_changed_query_of_an_attention(change: str, when: str) -> None:
    model, x = Block(), torch.randn(EXAMPLES, 3, 4, dtype=torch.float64)
    truth = model.by_hand(x, QUERIES[change])
    gradient = model.first.weight.grad
    model.first.weight.grad = None
    kinds: list[type] = []

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kinds.append(type(args[0]))
        return (QUERIES[change](args[0]), *args[1:])

    if when == "before":
        model.attention.register_forward_pre_hook(hook)
    with KFACPreconditioner(model) as ours:
        if when == "between passes":
            loss_of(model(x).flatten(1)).backward()
            ours.forget_statistics()
            model.first.weight.grad = None
        if when != "before":
            model.attention.register_forward_pre_hook(hook)
        loss_of(model(x).flatten(1)).backward()
        assert relative_error(model.first.weight.grad, gradient) <= TOLERANCE
        ours.precondition_()
        found = ours.factors()
        assert set(kinds) == {Tensor}  # what others see is no tensor of ours
        for name, pair in truth.items():
            for side, expected in zip(found[name], pair, strict=True):
                assert relative_error(side, expected) <= TOLERANCE


def test_an_attention_that_is_called_alone_names_the_pass_that_it_misses() -> None:
    model, x = nn.MultiheadAttention(4, 1, batch_first=True), torch.randn(3, 2, 4)
    with KFACPreconditioner(model) as ours:
        model.register_forward_pre_hook(lambda m, args: tuple(x + 1 for x in args))
        with pytest.warns(UserWarning, match="no statistics of layers '.*q'.*on their attention") as seen:
            model(x, x, x)[0].sum().backward()
        assert len(seen) == 1
        assert all(s.on_host.rows == 0 for s in ours.engine.statistics)
        model(x, x, x)[0].sum().backward()
        assert all(s.counts[0] == 6 for s in ours.engine.statistics)


def test_two_on_one_model_leave_an_attention_to_the_hooks_of_others() -> None:
    """Each hook moves itself alone, because the order of the call that runs is fixed."""
    model, x = nn.MultiheadAttention(4, 1, batch_first=True), torch.randn(3, 2, 4)
    kinds: list[type] = []
    with KFACPreconditioner(model), KFACPreconditioner(model):
        model.register_forward_pre_hook(lambda m, args: kinds.append(type(args[0])))
        with pytest.warns(UserWarning, match="no statistics of layers"):
            model(x, x, x)
        model(x, x, x)
    assert kinds == [Tensor, Tensor]


def test_the_order_of_the_hooks_of_others_stays() -> None:
    model, x = Block(), torch.randn(EXAMPLES, 3, 4, dtype=torch.float64)
    called: list[int] = []
    with KFACPreconditioner(model):
        for number in range(4):
            model.attention.register_forward_pre_hook(lambda m, args, number=number: called.append(number), prepend=number == 2)
        model(x)
        assert called == [2, 0, 1, 3]
        assert isinstance(list(model.attention._forward_pre_hooks.values())[-1], LastHook)


def test_attention_is_captured_before_any_forward_hook() -> None:
    model = nn.MultiheadAttention(4, 2)
    x = torch.randn(3, 2, 4)
    handle = register_module_forward_hook(lambda module, args, output: None)
    try:
        with KFACPreconditioner(model) as ours:
            model.register_forward_hook(lambda module, args, output: (output[0] * 3, output[1]), prepend=True)
            model(x, x, x)[0].sum().backward()
            ours.precondition_()
    finally:
        handle.remove()
