"""Calls of the model in unusual loops: inside of each other, interrupted, checkpointed as a whole, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACPreconditioner

TOLERANCE = 1e-10


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def mean(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return run(x).square().sum(-1).mean()


def g_of(model: nn.Module, loss: Callable[[], Tensor], **settings: Any) -> dict[str, Tensor]:
    with KFACPreconditioner(model, **settings) as ours:
        loss().backward()
        ours.precondition_()
        return {name: g for name, (_, g) in ours.factors().items()}


def true_g(model: nn.Module, loss: Callable[[], Tensor], terms: float) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    handles = [
        m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: seen.get(name, out)}))
        for name, m in linears.items()
    ]
    value = loss()
    for handle in handles:
        handle.remove()
    gradients = [g.reshape(-1, g.shape[-1]) for g in torch.autograd.grad(value, list(seen.values()))]
    return {name: terms * g.T @ g for name, g in zip(seen, gradients, strict=True)}


def require(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert relative_error(found[name], expected[name]) <= TOLERANCE, name


class Teacher(nn.Module):
    """Runs itself without gradients, as self-distillation does, between its layers. Its layers see windows of two rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)
        self.guard: Any = None
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x.reshape(-1, 2, 4)))
        if self.guard is not None:
            guard, self.guard = self.guard, None
            with guard():
                target = self(x.detach()).sum().detach()
            self.guard, y = guard, y + 0 * target
        return self.last(y).reshape(len(x), -1)


@pytest.mark.parametrize("way", ["no_grad", "paused"])
@pytest.mark.parametrize("loss_terms", ["auto", lambda args, kwargs, output: len(args[0])])
def test_a_call_without_statistics_inside_of_another(way: str, loss_terms: Any) -> None:
    model, x = Teacher(), torch.randn(6, 6, 4, dtype=torch.float64)
    expected = true_g(model, lambda: mean(model, x), 6)
    with KFACPreconditioner(model, loss_terms=loss_terms) as ours:
        model.guard = torch.no_grad if way == "no_grad" else ours.paused
        mean(model, x).backward()
        ours.precondition_()
        require({name: g for name, (_, g) in ours.factors().items()}, expected)


@pytest.mark.parametrize("loss_terms", [8, lambda args, kwargs, output: 8])
def test_layers_without_a_call_have_the_terms_that_the_user_says(loss_terms: Any) -> None:
    layer, x = nn.Linear(4, 3).double(), torch.randn(32, 4, dtype=torch.float64)
    loss = lambda run=layer: mean(run, x)  # noqa: E731
    require(g_of(layer, loss, loss_terms=loss_terms), true_g(layer, loss, 8))
    parts = nn.ModuleDict({"one": nn.Linear(4, 3), "two": nn.Linear(3, 2)}).double()
    loss = lambda: mean(lambda x: parts["two"](torch.tanh(parts["one"](x))), x)  # noqa: E731
    require(g_of(parts, loss, loss_terms=loss_terms), true_g(parts, loss, 8))


class Critic(nn.Module):
    """One example without a batch dimension, whose features are put together before the first layer."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.batched, self.net = batched, nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([state, action])
        return self.net(x.unsqueeze(0) if self.batched else x)


@pytest.mark.parametrize("batched", [False, True])
def test_a_vector_is_one_example_if_the_layers_say_so(batched: bool) -> None:
    model = Critic(batched)
    inputs = torch.randn(4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    loss = lambda: model(*inputs).square().sum()  # noqa: E731
    require(g_of(model, loss), true_g(model, loss, 1))


def test_a_vector_of_examples() -> None:
    """As the points of a PINN in one dimension."""

    class Points(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)).double()

        def forward(self, t: Tensor) -> Tensor:
            return self.net(t[:, None])

    model, t = Points(), torch.randn(9, dtype=torch.float64)
    require(g_of(model, lambda: mean(model, t)), true_g(model, lambda: mean(model, t), 9))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_checkpoints_of_the_whole_model(reentrant: bool, order: int) -> None:
    net, parts = network(), [torch.randn(n, 4, dtype=torch.float64) for n in (128, 16)][::order]
    single = [true_g(net, lambda x=x: mean(net, x), len(x)) for x in parts]
    expected = {name: single[0][name] + single[1][name] for name in single[0]}
    run = lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)  # noqa: E731
    require(g_of(net, lambda: sum(mean(run, x) for x in parts)), expected)
    eight = {name: g / len(parts[0]) * 8 for name, g in single[0].items()}
    require(g_of(net, lambda: mean(run, parts[0]), loss_terms=8), eight)
    # Several backward passes of several such calls.
    with KFACPreconditioner(net) as ours:
        for _ in range(2):
            (sum(mean(run, x) for x in parts) / 2).backward()
        ours.precondition_()
        require({name: g for name, (_, g) in ours.factors().items()}, expected)


def test_terms_in_a_buffer_that_is_filled_again() -> None:
    net, buffer = network(), torch.zeros((), dtype=torch.float64)
    x = torch.randn(33, 4, dtype=torch.float64)

    def terms(args: Any, kwargs: Any, output: Any) -> Tensor:
        return buffer.fill_(len(args[0]))

    with KFACPreconditioner(net, loss_terms=terms) as ours:
        losses = [net(part).square().sum() / 33 for part in x.split([30, 3])]
        for loss in losses:
            loss.backward()
        ours.precondition_()
        found = {name: g for name, (_, g) in ours.factors().items()}
    require(found, true_g(net, lambda: mean(net, x), 33))


def test_an_interrupted_call_is_over_when_the_next_one_begins() -> None:
    class Interrupt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    net = network()
    x = torch.randn(32, 4, dtype=torch.float64)
    expected = true_g(net, lambda: mean(net, x), 32)
    with KFAC(net, lr=0.1) as optimizer:
        tanh, net[1] = net[1], Interrupt()
        with pytest.raises(KeyboardInterrupt):
            net(x[:6])
        net[1] = tanh
        mean(net, x).backward()  # no zero_grad() before
        optimizer.step()
        require({name: g for name, (_, g) in optimizer.factors().items()}, expected)


def test_a_likelihood_counts_the_calls_that_its_outputs_come_from() -> None:
    """And no others, in whatever order the calls are made."""
    net, x, other = network(), torch.randn(12, 4, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    labels = torch.where(torch.rand(12) < 0.5, -100, torch.randint(3, (12,)))
    labels[0] = 1
    loss = nn.CrossEntropyLoss()
    labelled = true_g(net, lambda: loss(net(x), labels), int((labels != -100).sum()))
    unlabelled = true_g(net, lambda: mean(net, other), 7)
    expected = {name: labelled[name] + unlabelled[name] for name in labelled}
    for first in (True, False):
        with KFACPreconditioner(net, loss=loss) as ours:
            value = mean(net, other) if first else torch.zeros(())
            outputs = net(x)
            ours.accumulate_fisher(outputs, labels)
            value = value + loss(outputs, labels) + (0 if first else mean(net, other))
            value.backward()
            ours.precondition_()
            require({name: g for name, (_, g) in ours.factors().items()}, expected)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", ["module", "function", "layers"])
def test_compiled_models_in_an_ordinary_loop(backend: str, way: str) -> None:
    """The number of a call must not be read again in the backward pass, when the next call may have changed it."""
    torch.compiler.reset()
    net, x = network(), torch.randn(32, 4, dtype=torch.float64)
    expected = true_g(net, lambda: mean(net, x), 32)
    if way == "layers":
        for module in net:
            module.compile(backend=backend)
        run: Callable[[Tensor], Tensor] = net
    else:
        run = torch.compile(net if way == "module" else lambda x: net(x), backend=backend, fullgraph=True)
    with KFACPreconditioner(net, ema_decay=0.0) as ours:
        for _ in range(3):
            net.zero_grad()
            mean(run, x).backward()
            assert [s.counts.tolist() for s in ours.engine.statistics] == [[32, 32]] * 2
            ours.precondition_()
        require({name: g for name, (_, g) in ours.factors().items()}, expected)
        # Two calls before their backward pass, which are accumulated.
        (mean(run, x) + mean(run, x[:16])).backward()
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[48, 48]] * 2


def test_nothing_keeps_calls_alive() -> None:
    net, x = network(), torch.randn(8, 4, dtype=torch.float64)
    for backend in ("torch", "triton"):
        with KFAC(network() if backend == "torch" else network().float(), lr=0.1, backend=backend) as optimizer:
            model, inputs = optimizer._model, x if backend == "torch" else x.float()
            for _ in range(3):
                mean(model, inputs.clone().requires_grad_()).backward()
                assert len(optimizer.engine.gate.calls.alive) == 0
            optimizer.step()
    assert net is not None


def test_a_frozen_trunk_keeps_no_calls() -> None:
    """It runs without gradients inside of each call, as what reentrant checkpoints run again does."""

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = torch.tanh(self.trunk(x))
            return self.head(x)

    model = Frozen()
    with KFAC(model, lr=0.1) as optimizer:
        for _ in range(5):
            optimizer.zero_grad()
            mean(model, torch.randn(6, 4)).backward()
            optimizer.step()
        assert len(optimizer.engine.gate.calls.alive) == 0


def test_an_image_without_a_batch_dimension_is_one_example() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Tanh(), nn.Flatten(0), nn.Linear(18, 2)).double()
    image = torch.randn(3, 5, 5, dtype=torch.float64)
    loss = lambda: net(image).square().sum()  # noqa: E731
    found, expected = g_of(net, loss), true_g(net, loss, 1)
    assert relative_error(found["3"], expected["3"]) <= TOLERANCE
    out = net[0](image)
    g = torch.autograd.grad(net[1:](out).square().sum(), out)[0].flatten(1)
    assert relative_error(found["0"], g @ g.T) <= TOLERANCE


def test_an_interrupted_call_does_not_outlive_the_step() -> None:
    """Nor does a submodule that is called afterwards, without the model, belong to it."""

    class Interrupt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Tanh()).double()
    x = torch.randn(12, 3, 4, dtype=torch.float64)
    expected = true_g(model, lambda: mean(lambda x: model[0](x).flatten(1), x), 12)
    with KFAC(model, lr=0.1) as optimizer:
        tanh, model[1] = model[1], Interrupt()
        with pytest.raises(KeyboardInterrupt):
            model(x[:2])
        model[1] = tanh
        optimizer.zero_grad()
        mean(lambda x: model[0](x).flatten(1), x).backward()
        optimizer.step()
        require({name: g for name, (_, g) in optimizer.factors().items()}, expected)
