"""The capture table: every way of running a model x every kind of layer x in-place operation after it or not.

In each cell the hook fires exactly as often as the layer's backward runs, and A and G are those of explicit gradients.
"""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.capture.hooks import CaptureHook
from kfac_triton.layers import Layer, find_layers

TOLERANCE = 1e-12


class Net(nn.Module):
    """x -> first -> activation -> second -> activation -> sum of squares; `shared` calls second twice."""

    def __init__(self, kind: str, inplace: bool, shared: bool = False) -> None:
        super().__init__()
        if kind == "conv":
            self.first: nn.Module = nn.Conv2d(2, 3, 3, padding=1)
            self.second: nn.Module = nn.Conv2d(3, 3, 3, padding=1)
        else:
            self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 5)
        self.inplace, self.shared = inplace, shared

    def activate(self, x: Tensor) -> Tensor:
        return x.relu_() if self.inplace else x.relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.activate(self.second(self.activate(self.first(x))))
        if self.shared:
            x = self.activate(self.second(x))
        return x.square().flatten(1).sum(1)


INPUTS = {"linear-2d": (6, 4), "linear-3d": (6, 3, 4), "conv": (6, 2, 5, 5)}
MODES = [
    "eager",
    "checkpoint",
    "checkpoint-reentrant",
    "compile",
    "accumulation",
    "shared",
    "double-backward",
    "input-derivatives",  # of the loss and of the output, and both are in the loss
    "two-calls",  # whose means are added
    "two-calls-accumulated",  # in two backward passes of two calls
]


def _explicit(net: Net, name: str, passes: list[list[tuple[Tensor, Tensor]]], examples: int) -> tuple[Tensor, Tensor]:
    """A and G of one layer in float64 from (input, output gradient) pairs, per backward pass."""
    layer = {x.name: x for x in _layers(net)}[name]
    a, g, rows = torch.zeros(()), torch.zeros(()), 0
    for calls in passes:
        for x, gradient in calls:
            if isinstance(layer.module, nn.Conv2d):
                x = nn.functional.unfold(x, 3, padding=1).movedim(1, 2)
                gradient = gradient.flatten(2).movedim(1, 2)
            x, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
            x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
            a, g, rows = a + x.T @ x, g + gradient.T @ gradient, rows + len(x)
    return a / rows, g * examples


def _layers(net: nn.Module) -> list[Layer]:
    return find_layers(net)[0]


def _recorded(net: Net, x: Tensor) -> tuple[Tensor, dict[str, list[tuple[Tensor, Tensor]]]]:
    """Loss and, per layer, its (input, output) of every call, from a plain forward pass without any hook of ours."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {"first": [], "second": []}
    plain = copy.deepcopy(net)
    plain.inplace = False
    for name, calls in seen.items():
        module = getattr(plain, name)
        module.register_forward_hook(lambda m, args, out, calls=calls: calls.append((args[0], out)))
    return plain(x).mean(), seen


def _explicit_passes(net: Net, parts: list[Tensor], mode: str) -> dict[str, list[list[tuple[Tensor, Tensor]]]]:
    passes: dict[str, list[list[tuple[Tensor, Tensor]]]] = {"first": [], "second": []}
    for part in parts:
        part = part.detach().requires_grad_()
        loss, seen = _recorded(net, part)
        losses = [loss / (1 if mode == "two-calls" else len(parts))]
        if mode == "double-backward":
            (slope,) = torch.autograd.grad(loss, part, create_graph=True)
            losses = [slope.square().sum()]  # the pass that makes the slope makes no gradient of a weight
        if mode == "input-derivatives":
            (slope,) = torch.autograd.grad(loss, part, create_graph=True)
            losses = [loss + slope.square().sum()]
        for each in losses:
            for name, calls in seen.items():
                gradients = torch.autograd.grad(each, [out for _, out in calls], retain_graph=True)
                passes[name].append([(x.detach(), g) for (x, _), g in zip(calls, gradients, strict=True)])
    return passes


def _run(net: Net, parts: list[Tensor], mode: str) -> None:
    if mode.startswith("two-calls"):
        pairs = [parts] if mode == "two-calls" else [parts[:2], parts[2:]]
        for pair in pairs:
            (sum(net(part).mean() for part in pair) / len(pairs)).backward()
        return
    for part in parts:
        part = part.detach().requires_grad_()
        if mode.startswith("checkpoint"):
            out = checkpoint(net, part, use_reentrant=mode.endswith("reentrant"))
        elif mode == "compile":
            out = torch.compile(net, fullgraph=True, backend="aot_eager")(part)
        else:
            out = net(part)
        loss = out.mean() / len(parts)
        if mode == "double-backward":
            (slope,) = torch.autograd.grad(loss, part, create_graph=True)
            slope.square().sum().backward()
        elif mode == "input-derivatives":
            torch.autograd.grad(loss, part, retain_graph=True)
            (slope,) = torch.autograd.grad(out.mean(), part, create_graph=True)
            (loss + slope.square().sum()).backward()
        else:
            loss.backward()


@pytest.mark.parametrize("inplace", [False, True], ids=["out-of-place", "in-place"])
@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("mode", MODES)
def test_table(mode: str, kind: str, inplace: bool) -> None:
    torch.compiler.reset()
    net = Net(kind, inplace, shared=mode == "shared").double()
    x = torch.randn(INPUTS[kind], dtype=torch.float64)
    counts = {"accumulation": [3, 3], "two-calls": [4, 2], "two-calls-accumulated": [2, 1, 2, 1]}
    parts = list(x.split(counts.get(mode, [len(x)])))
    expected = _explicit_passes(net, parts, mode)

    preconditioner = KFACPreconditioner(net)
    engine = preconditioner.engine
    _run(net, parts, mode)
    examples = len(x)
    positions = len(x) * (x.shape[1] if kind == "linear-3d" else x.shape[2:].numel() if kind == "conv" else 1)
    for statistics in engine.statistics:
        calls = 2 if mode == "shared" and statistics.layer.name == "second" else 1
        assert statistics.counts.tolist() == [positions * calls, examples]
    engine.precondition(lambda p: 0.1)
    for name, (a, g) in preconditioner.factors().items():
        true_a, true_g = _explicit(net, name, expected[name], examples)
        if mode.startswith("two-calls"):
            # The sum of those of each call; of the losses above a quarter, which in a micro-batch are a half: 2 * 2^2 times.
            each = [_explicit(net, name, [one], len(part))[1] for one, part in zip(expected[name], parts, strict=True)]
            true_g = sum(each) * (1 if mode == "two-calls" else 8)
        assert relative_error(a, true_a) <= TOLERANCE
        assert relative_error(g, true_g) <= TOLERANCE


@pytest.mark.parametrize("kind", INPUTS)
def test_double_backward_leaves_gradients_as_without_hooks(kind: str) -> None:
    net = Net(kind, inplace=False).double()
    parts = [torch.randn(INPUTS[kind], dtype=torch.float64)]
    _run(net, parts, "double-backward")
    expected = [p.grad for p in net.parameters()]
    net.zero_grad(set_to_none=True)
    with KFACPreconditioner(net):
        _run(net, parts, "double-backward")
    for parameter, truth in zip(net.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, truth)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_training_is_eager_training_and_does_not_recompile(backend: str) -> None:
    weights = []
    for compiled in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        net = Net("linear-3d", inplace=True).double()
        optimizer = KFAC(net, lr=0.01, statistics_every=2)  # two graphs: with the gate open and shut
        run = torch.compile(net, fullgraph=True, backend=backend) if compiled else net
        for step in range(8):
            if step == 4:
                torch._dynamo.config.error_on_recompile = True
            optimizer.zero_grad()
            run(torch.randn(6, 3, 4, dtype=torch.float64)).mean().backward()
            optimizer.step()
        torch._dynamo.config.error_on_recompile = False
        weights.append(nn.utils.parameters_to_vector(net.parameters()).detach())
        assert all(layer["updates"] == 4 for layer in optimizer.diagnostics()["layers"].values())
    assert relative_error(weights[1], weights[0]) <= 1e-10


def test_nothing_is_captured_without_gradients_or_when_paused() -> None:
    net = Net("linear-2d", inplace=False)
    preconditioner = KFACPreconditioner(net)
    x = torch.randn(6, 4)
    with torch.no_grad():
        net(x)
    with torch.inference_mode():
        net(x)
    net.eval()(x)
    with preconditioner.paused():
        net(x).sum().backward()
    torch.func.grad(lambda x: net(x).sum())(x)
    torch.func.vmap(net)(x.unsqueeze(1))
    assert all(s.counts.tolist() == [0, 0] for s in preconditioner.engine.statistics)
    net(x).sum().backward()
    assert all(s.counts.tolist() == [6, 6] for s in preconditioner.engine.statistics)


def test_frozen_weight_is_not_captured() -> None:
    net = Net("linear-2d", inplace=False)
    preconditioner = KFACPreconditioner(net)
    net.second.weight.requires_grad_(False)  # type: ignore[union-attr]
    net(torch.randn(6, 4)).sum().backward()
    assert [s.counts.tolist() for s in preconditioner.engine.statistics] == [[6, 6], [0, 0]]


def test_input_by_keyword() -> None:
    layer = nn.Linear(4, 2)
    preconditioner = KFACPreconditioner(layer)
    layer(input=torch.randn(6, 4)).sum().backward()
    assert preconditioner.engine.statistics[0].counts.tolist() == [6, 6]


def test_copies_and_pickles_of_a_hooked_model_are_inert() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    preconditioner = KFACPreconditioner(net)
    x = torch.randn(6, 4)
    for clone in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        clone(x).sum().backward()
        hooks = [h for m in clone.modules() for h in m._forward_hooks.values()]
        assert all(h.statistics is None if isinstance(h, CaptureHook) else h.gate is None for h in hooks)
    torch.save(net, io.BytesIO())
    assert all(s.counts.tolist() == [0, 0] for s in preconditioner.engine.statistics)


def test_close_removes_hooks_and_shuts_graphs_that_exist() -> None:
    net = Net("linear-2d", inplace=False)
    preconditioner = KFACPreconditioner(net)
    preconditioner.close()
    preconditioner.close()
    net(torch.randn(6, 4)).sum().backward()
    assert not any(m._forward_hooks for m in net.modules())
    assert all(s.counts.tolist() == [0, 0] for s in preconditioner.engine.statistics)


def test_a_dropped_optimizer_is_freed_and_its_hooks_with_it() -> None:
    net = Net("linear-2d", inplace=False)
    optimizer = KFAC(net)
    net(torch.randn(6, 4)).sum().backward()
    optimizer.step()
    engine = weakref.ref(optimizer.engine)
    del optimizer
    gc.collect()
    assert engine() is None
    assert not any(m._forward_hooks for m in net.modules())
