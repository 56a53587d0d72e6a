"""The number of loss terms belongs to a call of the model, and how calls make one loss."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.capture.loss_terms import Arithmetic

TOLERANCE = 1e-10


def network(*, inputs: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def data(*sizes: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 4, dtype=torch.float64) for n in sizes]


def gradients_of(net: nn.Module, run: Callable[[], Tensor]) -> dict[str, list[Tensor]]:
    """The loss's gradients by the outputs of each linear layer, one for each time that it runs."""
    seen: dict[str, list[Tensor]] = {}
    names = {module: name for name, module in net.named_modules() if isinstance(module, nn.Linear)}
    handles = [module.register_forward_hook(lambda m, args, out: seen.setdefault(names[m], []).append(out)) for module in names]
    try:
        loss = run()
    finally:
        for handle in handles:
            handle.remove()
    flat = [out for outs in seen.values() for out in outs]
    found = iter(torch.autograd.grad(loss, flat, materialize_grads=True))
    return {name: [next(found).flatten(0, -2) for _ in outs] for name, outs in seen.items()}


def squares(gradients: list[Tensor]) -> Tensor:
    return sum((g.T @ g for g in gradients), torch.zeros((), dtype=torch.float64))


def g_factors(net: nn.Module, *runs: Callable[[], Tensor], **settings: Any) -> dict[str, Tensor]:
    """G after the backward passes of these losses, in one step."""
    with KFACPreconditioner(net, norms="skip", **settings) as ours:
        for run in runs:
            run().backward()
        ours.precondition_()
        return {name: g for name, (_, g) in ours.factors().items()}


def require(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, g in found.items():
        assert relative_error(g, expected[name]) <= TOLERANCE, name


def mean(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum(-1).mean()


@pytest.mark.parametrize("sizes", [(128, 16), (16, 128), (5, 5), (7, 3, 11)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_of_means_in_any_order(sizes: tuple[int, ...], backend: str) -> None:
    net, parts = network(), data(*sizes)
    single = [gradients_of(net, lambda x=x: mean(net, x)) for x in parts]
    expected = {name: sum(len(x) * squares(one[name]) for x, one in zip(parts, single, strict=True)) for name in single[0]}
    if backend == "triton":  # in single precision
        net, parts = net.float(), [x.float() for x in parts]
    for order in itertools.permutations(range(len(parts))):
        found = g_factors(net, lambda order=order: sum(mean(net, parts[i]) for i in order), backend=backend)
        for name, g in found.items():
            assert relative_error(g.double(), expected[name]) <= (TOLERANCE if backend == "torch" else 1e-5)


def test_an_empty_call_changes_nothing(recwarn: pytest.WarningsRecorder) -> None:
    net, (x, none) = network(), data(20, 0)
    alone = g_factors(net, lambda: mean(net, x))
    for run in (lambda: mean(net, x) + net(none).sum(), lambda: net(none).sum() + mean(net, x)):
        require(g_factors(net, run), alone)
    assert not recwarn.list


def test_several_backward_passes_accumulate_one_mean() -> None:
    """Micro-batches of different sizes, each loss divided by the whole batch."""
    net, parts = network(), data(12, 20, 4)
    whole = torch.cat(parts)
    together = g_factors(net, lambda: mean(net, whole))
    apart = g_factors(net, *(lambda x=x: net(x).square().sum() / len(whole) for x in parts))
    require(apart, together)


def test_boundary_and_interior_in_two_micro_batches_are_one_batch() -> None:
    """Two calls in each backward pass, with 24 and 6 points in all, and losses that are divided by the number of passes."""
    net, (inside, outside) = network(), data(24, 6)

    def loss(first: Tensor, second: Tensor) -> Tensor:
        return mean(net, first) + 10 * mean(net, second)

    together = g_factors(net, lambda: loss(inside, outside))
    halves = zip(inside.chunk(2), outside.chunk(2), strict=True)
    require(g_factors(net, *(lambda a=a, b=b: loss(a, b) / 2 for a, b in halves)), together)


@pytest.mark.parametrize(
    "settings", [{"curvature": "ekfac"}, {"max_factor_size": 4}, {"max_factor_size": 3, "oversize": "block"}], ids=str
)
def test_micro_batches_of_several_calls_in_every_kind_of_sum(settings: dict[str, Any]) -> None:
    net, (inside, outside) = network(), data(24, 6)
    updates = []
    for passes in (1, 3):
        with KFACPreconditioner(net, damping=0.1, **settings) as ours:
            for _ in range(2):
                net.zero_grad()
                for a, b in zip(inside.chunk(passes), outside.chunk(passes), strict=True):
                    ((mean(net, a) + 10 * mean(net, b)) / passes).backward()
                ours.precondition_()
            updates.append([p.grad.clone() for p in net.parameters()])
    for one, other in zip(*updates, strict=True):
        assert relative_error(one, other) <= 1e-9


def test_moments_of_sums_of_means_in_any_order() -> None:
    """EKFAC's, in one basis: N times the sums of each call, as for G."""
    net, parts = network(), data(24, 6, 11)
    with KFACPreconditioner(net, damping=0.1, curvature="ekfac") as ours:
        mean(net, parts[0]).backward()
        ours.precondition_()  # makes the basis
        statistics = ours.engine.statistics

        def moments(loss: Tensor, terms: int) -> list[Tensor]:
            ours.forget_statistics()
            loss.backward()
            return [terms * tile.total.clone() for one in statistics for tile in one.moments._tiles]

        single = [moments(mean(net, x), len(x)) for x in parts]
        for order in itertools.permutations(range(3)):
            joint = moments(sum(mean(net, parts[i]) for i in order), 41)
            for k, found in enumerate(joint):
                assert relative_error(found, sum(one[k] for one in single)) <= TOLERANCE


def test_which_calls_are_parts_of_one_mean() -> None:
    """Two backward passes of one call each, against one of both: gradients are the same."""
    net, (x, y) = network(), data(64, 64)
    both = g_factors(net, lambda: mean(net, x) + mean(net, y))
    apart = g_factors(net, lambda: mean(net, x), lambda: mean(net, y))
    require(apart, {name: 2 * g for name, g in both.items()})  # as of one mean over 128, whose loss was not halved
    require(g_factors(net, lambda: mean(net, x), lambda: mean(net, y), calls="separate"), both)
    require(g_factors(net, lambda: mean(net, x) + mean(net, y), calls="joint"), apart)


def test_separate_calls_in_passes_of_two() -> None:
    net, parts = network(), data(8, 4, 12, 2)
    runs = [lambda a=a, b=b: mean(net, a) + mean(net, b) for a, b in (parts[:2], parts[2:])]
    require(g_factors(net, *runs, calls="separate"), g_factors(net, lambda: sum(mean(net, x) for x in parts)))


def test_a_rollout_of_one_row_a_call() -> None:
    """Policy gradients: the mean is over the calls."""
    net, (x,) = network(), data(16)
    whole = g_factors(net, lambda: mean(net, x))
    for rows in (x.split(1), x.unbind()):  # with and without a batch dimension
        require(g_factors(net, lambda rows=rows: sum(net(r).square().sum() for r in rows) / 16, calls="joint"), whole)


def test_a_sum_has_no_means() -> None:
    net, (x, y) = network(), data(10, 30)
    whole = g_factors(net, lambda: net(torch.cat([x, y])).square().sum(), loss_reduction="sum")
    require(g_factors(net, lambda: net(x).square().sum() + net(y).square().sum(), loss_reduction="sum"), whole)


class Loop(nn.Module):
    """A cell that runs several times in one call, as of recurrent networks and deep equilibria."""

    def __init__(self, times: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.times, self.cell, self.head = times, nn.Linear(4, 4), nn.Linear(4, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = torch.tanh(self.cell(x))
        return self.head(x)


def _plain(model: nn.Module) -> nn.Module:
    return model


def _compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


def _compiled_cell(model: Loop) -> nn.Module:
    torch.compiler.reset()
    model.cell.compile(fullgraph=True, backend="aot_eager")
    return model


@pytest.mark.parametrize("way", [_plain, _compiled, _compiled_cell])
@pytest.mark.parametrize("calls", [1, 3])
def test_calls_of_a_layer_inside_of_one_call_count_once(way: Callable[[Any], nn.Module], calls: int) -> None:
    model, parts = Loop(), data(*[8] * calls)
    passes = [gradients_of(model, lambda x=x: mean(model, x) / calls) for x in parts]
    expected = {name: 8 * calls * squares([g for one in passes for g in one[name]]) for name in passes[0]}
    run = way(model)
    require(g_factors(model, *(lambda x=x: mean(run, x) / calls for x in parts)), expected)


def test_compiled_layers_in_a_model_that_is_not() -> None:
    """Blocks that are compiled one by one take N from the model's call: here 6, whatever rows the blocks see."""

    class Windows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            windows = self.block(x.reshape(-1, 2, 4))  # (18, 2, 4)
            return self.head(windows.reshape(x.shape).mean(1))

    model = Windows()
    x = torch.randn(6, 6, 4, dtype=torch.float64)
    expected = {name: 6 * squares(found) for name, found in gradients_of(model, lambda: mean(model, x)).items()}
    require(g_factors(model, lambda: mean(model, x)), expected)
    torch.compiler.reset()
    model.block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(3):
        require(g_factors(model, lambda: mean(model, x)), expected)


class Pyramid(nn.Module):
    """A loss for each pixel, and a convolution at half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.full, self.small, self.last = (nn.Conv2d(a, b, 3, padding=1) for a, b in ((2, 3), (3, 3), (3, 2)))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.full(x))
        return self.last(x + F.interpolate(torch.tanh(self.small(F.avg_pool2d(x, 2))), scale_factor=2))


def test_a_loss_term_for_each_pixel_at_any_resolution() -> None:
    """G of the convolution at half resolution, times that of the pixels, is the sum over its own rows."""
    model, x = Pyramid(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    seen: list[Tensor] = []
    handles = [m.register_forward_hook(lambda m, args, out: seen.append(out)) for m in (model.full, model.small, model.last)]
    loss = model(x).square().sum(1).mean()
    for handle in handles:
        handle.remove()
    rows = [g.movedim(1, -1).flatten(0, -2) for g in torch.autograd.grad(loss, seen)]
    expected = {name: 3 * 64 * g.T @ g for name, g in zip(("full", "small", "last"), rows, strict=True)}
    require(g_factors(model, lambda: model(x).square().sum(1).mean(), loss_terms="tokens"), expected)


class Rearranged(nn.Module):
    """A layer whose rows are not examples."""

    def __init__(self, rearrange: Callable[[Tensor], Tensor], back: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rearrange, self.back = rearrange, back
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.positions = nn.Embedding(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(6)[None])
        return self.head(self.back(torch.tanh(self.layer(self.rearrange(x))), x).mean(1))


REARRANGED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "windows": (lambda x: x.reshape(-1, 2, 4), lambda y, x: y.reshape(x.shape)),
    "flat rays": (lambda x: x.reshape(-1, 4), lambda y, x: y.reshape(x.shape)),
    "a batch of one": (lambda x: x.reshape(1, -1, 4), lambda y, x: y.reshape(x.shape)),
    "routed": (lambda x: x[:, ::3].reshape(-1, 4), lambda y, x: x[:, ::3] + y.reshape(len(x), -1, 4)),
}


@pytest.mark.parametrize("kind", REARRANGED)
def test_rows_that_are_not_examples(kind: str) -> None:
    model, x = Rearranged(*REARRANGED[kind]), torch.randn(5, 6, 4, dtype=torch.float64)
    expected = {name: 5 * squares(found) for name, found in gradients_of(model, lambda: mean(model, x)).items()}
    found = g_factors(model, lambda: mean(model, x))
    rows = torch.autograd.grad(mean(model, x), [model.positions.weight])[0]  # that of each position, from all examples
    assert relative_error(found.pop("positions"), 5 * rows.T @ rows) <= TOLERANCE
    require(found, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_checkpoints_belong_to_the_call_that_they_recompute(reentrant: bool, order: int) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.block, self.head = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)
            self.double()
            self.uses = False

        def forward(self, x: Tensor) -> Tensor:
            if self.uses:  # one of a module, one of a function
                x = checkpoint(self.block, x.requires_grad_(), use_reentrant=reentrant)
                x = checkpoint(lambda y: torch.tanh(self.block(y.reshape(-1, 4))).reshape(y.shape), x, use_reentrant=reentrant)
            else:
                x = torch.tanh(self.block(self.block(x)))
            return self.head(x)

    model, parts = Checkpointed(), [x.reshape(-1, 2, 4) for x in data(24, 6)][::order]
    single = [gradients_of(model, lambda x=x: mean(model, x)) for x in parts]
    expected = {name: sum(len(x) * squares(one[name]) for x, one in zip(parts, single, strict=True)) for name in single[0]}
    model.uses = True
    with KFACPreconditioner(model) as ours:
        loss = sum(mean(model, x.detach()) for x in parts)
        # As many loops do it, between forward and backward.
        ours.forget_statistics()
        loss.backward()
        ours.precondition_()
        require({name: g for name, (_, g) in ours.factors().items()}, expected)


def test_submodules_that_are_called_without_the_model() -> None:
    """Each is a call of its own, which counts once however often a layer runs in it."""
    model = nn.ModuleDict({"body": Loop(), "top": nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))}).double()
    (x,) = data(10)

    def loss() -> Tensor:
        return model["top"](model["body"](x)).square().mean()

    expected = {name: 10 * squares(found) for name, found in gradients_of(model, loss).items()}
    require(g_factors(model, loss), expected)


def test_a_call_that_raised_is_over() -> None:
    net, (x,) = network(), data(6)
    expected = g_factors(net, lambda: mean(net, x))
    with KFACPreconditioner(net) as ours:
        with pytest.raises(RuntimeError):
            net(torch.randn(50, 5, dtype=torch.float64))
        assert ours.engine.gate.calls.current is None
        mean(net, x).backward()
        ours.precondition_()
        require({name: g for name, (_, g) in ours.factors().items()}, expected)


def test_a_call_that_was_interrupted_is_forgotten_with_the_gradients() -> None:
    net, (x,) = network(), data(6)

    class Interrupt(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    expected = g_factors(net, lambda: mean(net, x))
    optimizer = KFAC(net, lr=0.1)
    tanh, net[1] = net[1], Interrupt()
    with pytest.raises(KeyboardInterrupt):
        net(torch.randn(50, 4, dtype=torch.float64))
    net[1] = tanh
    optimizer.zero_grad()
    mean(net, x).backward()
    optimizer.step()
    require({name: g for name, (_, g) in optimizer.factors().items()}, expected)
    optimizer.close()


class Nested(nn.Module):
    """A model that calls itself, on half of the examples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor, deep: bool = True) -> Tensor:
        y = self.layer(x)
        return y + torch.cat([self(x[::2], False), torch.zeros_like(x[1::2])]) if deep else torch.tanh(y)


def test_a_recursive_model() -> None:
    model, (x,) = Nested(), data(8)
    expected = {"layer": 8 * squares(gradients_of(model, lambda: mean(model, x))["layer"])}
    require(g_factors(model, lambda: mean(model, x)), expected)


def test_results_of_other_loss_terms_are_not_taken_for_theirs() -> None:
    """Results are found by the addresses of their operands, which must not be given to other tensors in the meantime."""
    arithmetic, terms = Arithmetic(), torch.tensor(3.0)
    operand = weakref.ref(terms)
    assert float(arithmetic.add(terms, 1.0)) == 4
    del terms
    assert operand() is not None
    arithmetic.clear()
    assert operand() is None
