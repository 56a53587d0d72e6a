"""torch.compile around a step of K-FAC: the step runs as it would without, and after the first ones nothing is compiled again.

Graphs are made of the model only, one for each position of the gate: that of steps with statistics, and of those without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from support.helpers import mlp, relative_error
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACPreconditioner

STEPS, WARM = 20, 4
FOREACH = [None, False, True]
Step = Callable[[Tensor, Tensor], Any]
loss_of = nn.functional.cross_entropy


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def _batch(seed: int, rows: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64), torch.randint(4, (rows,), generator=generator)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return mlp()


def _run(step: Step, steps: int = STEPS, warm: int = WARM, rows: Callable[[int], int] = lambda seed: 12) -> int:
    """Takes steps, of which those after the warm-up may not compile anything; returns how many graphs there are."""
    for seed in range(steps):
        with torch._dynamo.config.patch(error_on_recompile=seed >= warm):
            before = counters["stats"]["unique_graphs"]
            step(*_batch(seed, rows(seed)))
            assert seed < warm or counters["stats"]["unique_graphs"] == before
    return int(counters["stats"]["unique_graphs"])


def _vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# Each takes seconds; the choice of foreach is varied where the step alone is compiled.
WHOLE = [(foreach, True) if foreach is None else pytest.param(foreach, True, marks=pytest.mark.slow) for foreach in FOREACH]


@pytest.mark.parametrize(("foreach", "whole"), [*((foreach, False) for foreach in FOREACH), *WHOLE])
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("tail", ["sgd", "adamw"])
def test_a_compiled_step_is_the_step(tail: str, foreach: bool | None, tensor_lr: bool, whole: bool) -> None:
    """Bit for bit, with a rate that a scheduler changes, and intervals that do not fit each other."""
    if tensor_lr and tail == "adamw" and foreach:
        with pytest.raises(ValueError, match=r"foreach is True and lr is a tensor.*capturable=True"):
            KFAC(_net(), lr=torch.tensor(0.1), tail=tail, foreach=foreach)
        return
    results = []
    for compiled in (False, True):
        model = _net()
        lr = torch.tensor(0.1, dtype=torch.float64) if tensor_lr else 0.1
        optimizer = KFAC(
            model, lr=lr, damping=0.1, tail=tail, foreach=foreach, weight_decay=0.1, statistics_every=2, inverse_every=3
        )
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        if compiled and not whole:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")  # type: ignore[method-assign]

        def step(x: Tensor, y: Tensor, model: nn.Module = model, optimizer: KFAC = optimizer) -> None:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()

        run = torch.compile(step, backend="aot_eager") if compiled and whole else step

        def scheduled(x: Tensor, y: Tensor, run: Step = run, scheduler: Any = scheduler) -> None:
            run(x, y)
            scheduler.step()

        graphs = _run(scheduled)
        assert graphs == (2 if compiled and whole else 0)
        results.append(_vector(model))
    assert torch.equal(*results)


def _preconditioned(model: nn.Module) -> Step:
    ours = KFACPreconditioner(model, damping=0.1, inverse_every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        ours.precondition_()
        optimizer.step()

    return step


def _attached(model: nn.Module) -> Step:
    ours = KFACPreconditioner(model, damping=0.1, inverse_every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.1))
    ours.attach(optimizer)

    def step(x: Tensor, y: Tensor) -> None:
        assert not ours.engine.closed  # it is held
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()

    return step


def _fisher(model: nn.Module) -> Step:
    optimizer = KFAC(model, damping=0.1, fisher="ggn", loss=nn.CrossEntropyLoss())

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        outputs = model(x)
        optimizer.accumulate_fisher(outputs, y)
        loss_of(outputs, y).backward()
        optimizer.step()

    return step


def _paused(model: nn.Module) -> Step:
    """A penalty that leaves no statistics."""
    optimizer = KFAC(model, damping=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        with optimizer.paused():
            penalty = model(2 * x).square().mean()
        (loss_of(model(x), y) + penalty).backward()
        optimizer.step()

    return step


def _changed(model: nn.Module) -> Step:
    optimizer = KFAC(model, damping=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        loss_of(model(x), y).backward()
        optimizer.step()
        optimizer.change(damping=0.9 * optimizer.engine.settings.damping)

    return step


def _closure(model: nn.Module) -> Step:
    optimizer = KFAC(model, damping=0.1)

    def step(x: Tensor, y: Tensor) -> Any:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model(x), y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    return step


def _auto(model: nn.Module) -> Step:
    optimizer = KFAC(model, lr="auto", loss=nn.CrossEntropyLoss())
    return lambda x, y: optimizer.step(lambda: (model(x), y))


@pytest.mark.parametrize("make", [_preconditioned, _attached, _fisher, _paused, _changed, _closure, _auto])
def test_what_else_a_compiled_step_may_call(make: Callable[[nn.Module], Step]) -> None:
    """PyTorch's SGD and the model are compiled: they round otherwise."""
    results = []
    for compiled in (False, True):
        model = _net()
        step = make(model)
        _run(torch.compile(step, backend="aot_eager") if compiled else step, steps=10)
        results.append(_vector(model))
    assert relative_error(*results) <= 1e-13
    reasons = " ".join(counters["graph_break"])
    assert "decides on the host what is due" in reasons


@pytest.mark.parametrize("in_closure", [False, True])
def test_a_compiled_model_stays_compiled_within_a_step(in_closure: bool) -> None:
    """A closure is run by the step, which is not."""
    traced = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        traced.append(graph)
        return graph.forward

    model = _net()
    optimizer = KFAC(model, damping=0.1)
    compiled = torch.compile(model, backend=backend, fullgraph=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        x, y = _batch(0)
        loss = loss_of(compiled(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        if in_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
    assert len(traced) == 1


@pytest.mark.parametrize("every", [1, 2])
def test_batches_of_changing_size(every: int) -> None:
    results = []
    for compiled in (False, True):
        model = _net()
        optimizer = KFAC(model, damping=0.1, statistics_every=every)
        run = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True) if compiled else model

        def step(x: Tensor, y: Tensor, optimizer: KFAC = optimizer, run: Callable[[Tensor], Tensor] = run) -> None:
            optimizer.zero_grad()
            loss_of(run(x), y).backward()
            optimizer.step()

        graphs = _run(step, steps=12, rows=lambda seed: 8 + 3 * seed)
        assert graphs == (every if compiled else 0)
        assert all(layer["updates"] == 12 // every for layer in optimizer.diagnostics()["layers"].values())
        results.append(_vector(model))
    assert relative_error(*results) <= 1e-12


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Deep(nn.Module):
    """Blocks that may be checkpointed, and a head."""

    def __init__(self, depth: int, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(5) for _ in range(depth)), nn.Linear(5, 4)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


def test_alike_blocks_compiled_one_by_one_share_their_graphs() -> None:
    """More of them than Dynamo recompiles a function for; the first alone has an input without gradient."""
    depth, results = torch._dynamo.config.recompile_limit + 2, []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Deep(depth).double()
        optimizer = KFAC(model, damping=0.1, statistics_every=2)
        if compiled:
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True)

        def step(x: Tensor, y: Tensor, optimizer: KFAC = optimizer, model: nn.Module = model) -> None:
            optimizer.zero_grad()
            loss_of(model(x), y).backward()
            optimizer.step()

        assert _run(step, steps=8) == (4 if compiled else 0)
        results.append(_vector(model))
    assert relative_error(*results) <= 1e-12


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_autocast_and_checkpointing_in_one_graph(autocast: bool, checkpointed: bool) -> None:
    factors = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = Deep(2, checkpointed)
        optimizer = KFAC(model, damping=0.1, lr=0.01)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

        def step(x: Tensor, y: Tensor, optimizer: KFAC = optimizer, run: Callable[[Tensor], Tensor] = run) -> None:
            optimizer.zero_grad()
            context: AbstractContextManager[Any] = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
            with context:
                loss = loss_of(run(x.float()), y)
            loss.backward()
            optimizer.step()

        assert _run(step, steps=6) == int(compiled)
        assert all(layer["updates"] == 6 for layer in optimizer.diagnostics()["layers"].values())
        factors.append([side for pair in optimizer.factors().values() for side in pair])
    # Operations in 16 bits: compiled, casts are fused and round less often.
    assert max(relative_error(x, y) for x, y in zip(*factors, strict=True)) <= (2e-2 if autocast else 1e-5)


def test_evaluation_between_steps() -> None:
    """eval(), no_grad() and paused() have graphs of their own, made once."""
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Dropout(0.0), nn.Linear(6, 4)).double()
        optimizer = KFAC(model, damping=0.1, statistics_every=2)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model

        def step(
            x: Tensor, y: Tensor, optimizer: KFAC = optimizer, run: Callable[[Tensor], Tensor] = run, model: nn.Module = model
        ) -> None:
            model.train()
            optimizer.zero_grad()
            loss_of(run(x), y).backward()
            optimizer.step()
            model.eval()
            with torch.no_grad():
                run(x)
            with optimizer.paused():
                run(x)

        _run(step, steps=10)
        assert all(layer["updates"] == 5 for layer in optimizer.diagnostics()["layers"].values())
        results.append(_vector(model))
    assert relative_error(*results) <= 1e-13
