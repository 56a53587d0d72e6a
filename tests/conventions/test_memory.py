"""Memory on a CPU, counted: what a step with K-FAC takes beside one without, and that nothing grows."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contenders import batch, loss_of, net, train
from support.memory_meter import MemoryMeter
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from torch.profiler import profile

from benchmarks.steps import memory
from kfac_triton import KFAC, KFACAdam, KFACPreconditioner
from kfac_triton.kernels import device_tables

LOSS = nn.CrossEntropyLoss()

# The meter


def test_the_meter_counts_every_storage_once_and_until_it_is_gone() -> None:
    known = torch.ones(100)
    with MemoryMeter([known]) as meter:
        assert meter.current == 400
        x = torch.zeros(50, 4)
        view = x[3:].mT
        x.add_(1.0).mul_(2.0)
        table = torch.tensor([1.0, 2.0])
        assert meter.current == 400 + 800 + 8
        del x
        assert meter.current == 400 + 800 + 8  # the view holds it
        del view, table
        assert meter.current == 400
        known.mul_(torch.full((), 2.0)).view(10, 10)
        assert (meter.current, meter.peak) == (400, 400 + 800 + 8)
        del known
        assert meter.current == 0
        meter.restart()
        assert meter.peak == 0


def test_the_meter_sees_what_autograd_saves_and_what_a_hook_keeps() -> None:
    x, weight = torch.randn(10, 8), torch.randn(8, 6).requires_grad_()
    with MemoryMeter() as meter:
        y = (x @ weight).exp().sum()
        assert meter.current == 10 * 6 * 4 + 4  # what exp saves: its result
        y.backward()
        del y
        assert meter.current == 8 * 6 * 4  # the gradient
        weight.grad = None
        kept: list[Tensor] = []
        layer = nn.Linear(8, 6, bias=False)
        layer.register_forward_hook(lambda module, args, output: kept.append(output.detach() + 1))
        layer(x)
        assert meter.current == 8 * 6 * 4 + 10 * 6 * 4


@pytest.mark.parametrize("make", [lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), KFAC], ids=["SGD", "KFAC"])
def test_the_meter_agrees_with_the_allocator(make: Callable[[nn.Module], Optimizer]) -> None:
    """PyTorch's profiler writes down every allocation, also the small ones that an operation makes for itself."""
    device_tables._copies.cache_clear()  # full after many tests: a table that comes in sends another one out
    model = nn.Sequential(nn.Linear(20, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 10))
    x, y = torch.randn(64, 20), torch.randint(10, (64,))
    optimizer = make(model)

    def step() -> None:
        LOSS(model(x), y).backward()
        optimizer.step()

    for _ in range(2):
        step()
        optimizer.zero_grad()
    with MemoryMeter() as meter:
        step()
    found = meter.current, meter.peak
    optimizer.zero_grad()
    gc.collect()  # what tests before have left would be freed at any time
    gc.disable()
    try:
        with profile(profile_memory=True) as run:
            step()
    finally:
        gc.enable()
    assert run.profiler is not None
    events = [e for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    current = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    assert found[0] == current
    assert found[1] <= peak <= 1.001 * found[1]


# A step with and without

SIZE = memory.Size(blocks=2, width=64, heads=2, tokens=32, batch=4)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_what_kfac_takes_in_a_step_is_what_its_diagnostics_say(checkpointed: bool, autocast: bool) -> None:
    """Activations: nothing, to the byte. Forward and backward: its state. The step: a few copies of one stack, for a while."""
    names = ("SGD, momentum", "K-FAC", "K-FAC, 16-bit factors")
    plain, *ours = (memory.measure(memory.CONTESTANTS[name], SIZE, checkpointed, autocast) for name in names)
    model = memory.Transformer(SIZE, checkpointed)
    largest = max(stack.sums.nbytes for stack in KFAC(model).engine.bank.stacks)
    assert plain.activations > (1e4 if checkpointed else 5e5)
    # Where a stack is in 16 bits between steps, a step unpacks it, and rounds it in four more copies.
    for usage, copies in zip(ours, (5, 6.5), strict=True):
        assert usage.activations == plain.activations
        state, reported = usage.state - plain.state, sum(usage.kinds.values())
        assert reported <= state <= 1.01 * reported  # certificates, counters
        assert 0 <= usage.backward - plain.backward - state <= 0.01 * reported
        assert usage.step <= usage.state + 2 * usage.parameters + copies * largest
    assert ours[1].kinds["factors"] == pytest.approx(ours[0].kinds["factors"] / 2, rel=0.01)  # but for diagonals


def test_the_table_of_the_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    memory.main(["--blocks", "1", "--width", "16", "--heads", "2", "--tokens", "4", "--batch", "2"])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 4 * len(memory.CONTESTANTS)
    assert len({row.count("|") for row in rows}) == 1


# Growth


def _plain(model: nn.Module, optimizer: Any) -> Callable[[int], object]:
    def step(number: int) -> None:
        optimizer.zero_grad()
        x, y = batch(model, number)
        outputs = model(x)
        if isinstance(optimizer, KFAC) and optimizer.engine.settings.loss is not None:
            optimizer.accumulate_fisher(outputs, y)
        LOSS(outputs, y).backward()
        optimizer.step()

    return step


def _attached(model: nn.Module) -> Callable[[int], object]:
    optimizer = torch.optim.AdamW(model.parameters())
    KFACPreconditioner(model).attach(optimizer)
    return _plain(model, optimizer)


def _auto(model: nn.Module) -> Callable[[int], object]:
    optimizer = KFAC(model, lr="auto", loss=LOSS)
    return lambda number: train(model, optimizer, 1, first=number)


def _raising(model: nn.Module) -> Callable[[int], object]:
    """Every second closure raises, before its backward pass or after it."""
    optimizer = KFAC(model)

    def closure(number: int) -> Tensor:
        loss = loss_of(model, number)
        if number % 4 == 1:
            raise ArithmeticError
        loss.backward()
        if number % 4 == 3:
            raise ArithmeticError
        return loss

    def step(number: int) -> None:
        if number % 2 == 0:
            optimizer.zero_grad()
        try:
            optimizer.step(lambda: closure(number))
        except ArithmeticError:
            assert number % 2 == 1

    return step


LOOPS: dict[str, Callable[[nn.Module], Callable[[int], object]]] = {
    "default": lambda model: _plain(model, KFAC(model)),
    "mc": lambda model: _plain(model, KFAC(model, fisher="mc", loss=LOSS)),
    "ekfac": lambda model: _plain(model, KFAC(model, curvature="ekfac")),
    "adam": lambda model: _plain(model, KFACAdam(model, lr=1e-3)),
    "preconditioner": _attached,
    "auto": _auto,
    "closure that raises": _raising,
}
LENGTHS = [80, pytest.param(500, marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("name", LOOPS)
def test_nothing_grows(name: str, steps: int) -> None:
    """Most bytes alive after a step and within one: in the last twenty steps what they were in those before the 50th."""
    with MemoryMeter() as meter:
        model = net(torch.float32)
        step = LOOPS[name](model)
        seen = []
        for first, last in ((0, 30), (30, 50), (50, steps - 20), (steps - 20, steps)):
            meter.restart()
            after = []
            for number in range(first, last):
                step(number)
                after.append(meter.current)
            gc.collect()
            seen.append((max(after), meter.peak, len(gc.get_objects())))
    assert seen[3][:2] == seen[1][:2]
    # Half an object a step would be more; one or two come and go with what tests before have left in caches.
    assert seen[3][2] <= seen[1][2] + (steps - 50) // 2


def test_a_schedule_of_the_learning_rate_leaves_a_limited_number_of_tables() -> None:
    """One row of rates is remembered for each step, and the oldest are forgotten."""
    with MemoryMeter() as meter:
        model = net(torch.float32)
        optimizer = KFAC(model)
        scheduler = ExponentialLR(optimizer, 0.999)
        step = _plain(model, optimizer)
        live = []
        for number in range(320):
            step(number)
            scheduler.step()
            live.append(meter.current)
    assert live[49] < live[289] <= live[1] + 256 * 3 * 4
    assert live[319] <= live[289]
