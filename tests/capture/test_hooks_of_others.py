"""Hooks of others on covered modules: what is captured is what the module itself takes and returns, or the user is told.

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

TOLERANCE = 1e-12
EXAMPLES = 6
RUNS = ["eager", "compiled"]


class Adapter:
    """A low-rank addition to a layer, with parameters of its own."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.down = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
        self.up = torch.randn(2, 5, generator=generator, dtype=torch.float64, requires_grad=True)

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output + args[0] @ self.down @ self.up


def triple(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output * 3


def triple_in_place(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
    output.mul_(3)


def scale_rows(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    return output * (torch.arange(len(output)) % 3)[:, None]


def widen(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
    """A tap on this output would be of another shape than the layer."""
    return torch.cat([output, output.square()], 1)


def shift(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0].sin() + 0.5,)


CHANGES: dict[str, Any] = {
    "triple": triple,
    "in place": triple_in_place,
    "adapter": Adapter(),
    "rows": scale_rows,
    "wider": widen,
}


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 5, dtype=torch.float64), nn.Tanh(), nn.Linear(5, 5, dtype=torch.float64))


def batch() -> Tensor:
    return torch.randn(EXAMPLES, 5, dtype=torch.float64)


def loss_of(output: Tensor) -> Tensor:
    return output.sin().square().sum(1).mean()


def explicit(model: nn.Sequential, x: Tensor, change: Any = None, before: Any = None) -> list[tuple[Tensor, Tensor]]:
    """A and G of both linear layers: gradients of their own outputs, in a forward pass by hand."""
    seen = []
    for layer in (model[0], model[2]):
        if before is not None:
            (x,) = before(layer, (x,))
        output = F.linear(x, layer.weight, layer.bias)
        seen.append((x.detach(), output))
        result = None if change is None else change(layer, (x,), output.clone())
        if change is triple_in_place:
            result = 3 * output
        x = output if result is None else result
        x = x.tanh() if layer is model[0] else x
    gradients = torch.autograd.grad(loss_of(x), [output for _, output in seen])
    inputs = [torch.cat([x, torch.ones_like(x[:, :1])], 1) for x, _ in seen]
    return [(x.T @ x / EXAMPLES, g.T @ g * EXAMPLES) for x, g in zip(inputs, gradients, strict=True)]


def factors(model: nn.Module, ours: KFACPreconditioner, x: Tensor, run: str = "eager") -> list[tuple[Tensor, Tensor]]:
    """After one step."""
    torch.compiler.reset()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if run == "compiled" else model
    loss_of(forward(x)).backward()
    ours.precondition_()
    return list(ours.factors().values())


def require_same(found: list[tuple[Tensor, Tensor]], truth: list[tuple[Tensor, Tensor]]) -> None:
    assert len(found) == len(truth)
    for pair, true in zip(found, truth, strict=True):
        for side, expected in zip(pair, true, strict=True):
            assert relative_error(side, expected) <= TOLERANCE


@pytest.fixture(autouse=True)
def _strict() -> Iterator[None]:
    """No warning but those that a test waits for."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_output_is_not_the_layers_own(change: str, when: str, run: str) -> None:
    model, x, hook = linear(), batch(), CHANGES[change]
    layers = [model[2]] if change == "wider" else [model[0], model[2]]
    if when == "before":
        for layer in layers:
            layer.register_forward_hook(hook)
    with KFACPreconditioner(model) as ours:
        if when == "after":
            for layer in layers:
                layer.register_forward_hook(hook)
        only = (lambda m, args, out: hook(m, args, out) if m in layers else None) if change == "wider" else hook
        require_same(factors(model, ours, x, run), explicit(model, x, only))


def test_one_that_changes_the_gradient_of_its_output_changes_both() -> None:
    """The gradient of the weight, and that of the output that is captured."""
    model, x = linear(), batch()

    def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * 2)

    def by_hand(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        output = output.clone()
        output.register_hook(lambda gradient: gradient * 2)
        return output

    model[2].register_forward_hook(hook)
    with KFACPreconditioner(model) as ours:
        found = factors(model, ours, x)
        require_same(found, explicit(model, x, lambda m, args, out: by_hand(m, args, out) if m is model[2] else None))


def test_a_convolution_whose_channels_are_scaled() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 1, bias=False, dtype=torch.float64), nn.Flatten(), nn.Linear(12, 2, dtype=torch.float64)
    )
    scale = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)[:, None, None]
    model[0].register_forward_hook(lambda m, args, out: out * scale)
    x = torch.randn(EXAMPLES, 2, 2, 2, dtype=torch.float64)
    own = F.conv2d(x, model[0].weight)
    (gradient,) = torch.autograd.grad(loss_of(model[2]((own * scale).flatten(1))), own)
    rows = gradient.movedim(1, -1).reshape(-1, 3)
    with KFACPreconditioner(model) as ours:
        assert relative_error(factors(model, ours, x)[0][1], rows.T @ rows * EXAMPLES) <= TOLERANCE


@pytest.mark.parametrize("run", RUNS)
def test_one_that_is_prepended_later_is_named_once(run: str) -> None:
    model, x = linear(), batch()
    with KFACPreconditioner(model) as ours:
        model[0].register_forward_hook(triple, prepend=True)
        with pytest.warns(UserWarning, match="triple.*layers '0' run before .*prepend=True") as seen:
            found = factors(model, ours, x, run)
        assert len(seen) == 1
        (a, g), second = found
        own = explicit(model, x, lambda m, args, out: 3 * out if m is model[0] else None)
        require_same([(a, 9 * g), second], own)  # as the warning says: G of the changed output
        loss_of(model(x)).backward()
        ours.precondition_()
        model[2].register_forward_hook(triple, prepend=True)
        loss_of(model(x)).backward()
        with pytest.warns(UserWarning, match="layers '2' run before") as seen:
            ours.precondition_()
        assert len(seen) == 1
    with KFACPreconditioner(model) as ours:  # the remedy
        require_same(factors(model, ours, x), explicit(model, x, triple))


@pytest.mark.parametrize("hook", [triple, lambda module, args, output: None], ids=["changes", "looks"])
def test_a_global_one_is_named_once(hook: Callable[..., Any]) -> None:
    model, x = linear(), batch()
    handle = register_module_forward_hook(hook)
    try:
        with KFACPreconditioner(model) as ours:
            with pytest.warns(UserWarning, match="global forward hooks .* may be that of the changed output") as seen:
                factors(model, ours, x)
            assert len(seen) == 1
            loss_of(model(x)).backward()
            ours.precondition_()
    finally:
        handle.remove()


def test_hooks_of_another_optimizer_are_no_others() -> None:
    model, x = linear(), batch()
    with KFACPreconditioner(model) as first, KFACPreconditioner(model) as second:
        truth = explicit(model, x)
        loss_of(model(x)).backward()
        for ours in (first, second):
            ours.precondition_()
            require_same(list(ours.factors().values()), truth)


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("prepend", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_changed_input_is_the_one_that_the_layer_takes(when: str, prepend: bool, run: str) -> None:
    model, x = linear(), batch()
    if when == "after":
        ours = KFACPreconditioner(model)
    for layer in (model[0], model[2]):
        layer.register_forward_pre_hook(shift, prepend=prepend)
    if when == "before":
        ours = KFACPreconditioner(model)
    with ours:
        require_same(factors(model, ours, x, run), explicit(model, x, before=shift))


@pytest.mark.parametrize("run", RUNS)
def test_under_autocast_pre_hooks_see_the_input_as_it_came(run: str) -> None:
    """Gradients are bit for bit those without K-FAC, and from the second eager pass on the layer takes the cast input."""
    gradients = []
    for has_optimizer in (False, True):
        torch.manual_seed(0)
        torch.compiler.reset()
        model, x = linear().float(), batch().float()
        seen: list[torch.dtype] = []
        taken: list[torch.dtype] = []

        def hook(module: nn.Module, args: tuple[Tensor], seen: Any = seen) -> tuple[Tensor]:
            seen.append(args[0].dtype)
            return (args[0] * 1.2345,)

        ours = KFACPreconditioner(model) if has_optimizer else None
        model[0].register_forward_pre_hook(hook)
        if run == "eager":
            model[0].register_forward_hook(lambda m, args, out, taken=taken: taken.append(args[0].dtype))
        forward = torch.compile(model, fullgraph=True, backend="aot_eager") if run == "compiled" else model
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                output = forward(x)
            output.float().square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert set(seen) == {torch.float32}
        if ours is not None:
            if run == "eager":
                assert taken == [torch.float32, torch.bfloat16]
            assert all(s.counts[0] == 2 * EXAMPLES for s in ours.engine.statistics)
            ours.close()
    assert all(torch.equal(g, h) for g, h in zip(*gradients, strict=True))
