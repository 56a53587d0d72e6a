"""Passes that wait for those of other layers: launches, memory, and what happens when something fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from support.launches import CountedOperators, counted_launches
from support.memory_meter import MemoryMeter
from support.queued import ROWS, WIDTH, Net, queued
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.capture import row_queue
from kfac_triton.kernels import device_tables, ops


def _backward_launches(depth: int, rows: int, **settings: Any) -> tuple[int, int]:
    """Launches of a forward and a backward pass, without the reductions, and torch operators beside those of a plain model."""
    torch.manual_seed(0)
    model, x = Net(depth, width=8), torch.randn(rows, 8)
    with counted_launches() as counts:
        ours = KFACPreconditioner(model, backend="triton", **settings)
        operators = []
        for paused in (False, False, True):
            model.zero_grad()
            counts.clear()
            device_tables._copies.cache_clear()  # a table of the same addresses may be there from an earlier pass, or may not
            with CountedOperators() as counted, ours.paused() if paused else nullcontext():
                model(x).square().mean().backward()
            operators.append((counts["covariance_kernel"], counted.counts))
            ours.forget_statistics()
    assert operators[2][0] == 0
    return operators[1][0], sum((operators[1][1] - operators[2][1]).values())


def test_launches_of_a_backward_pass_do_not_depend_on_the_depth(show: Callable[..., None]) -> None:
    found = {(depth, rows): _backward_launches(depth, rows) for depth in (12, 48) for rows in (4, 200)}
    show(f"\nLaunches and torch operators of the hooks in forward and backward, by layers and rows: {found}")
    assert found[12, 200][0] == found[48, 200][0] <= 2  # another for the batch, which does not start at a multiple of 16 bytes
    assert found[12, 4][0] == found[48, 4][0] <= 1  # the first layer's input is the batch: it is not deferred
    assert found[12, 200][1] == found[48, 200][1] <= 15  # nine make three tables, of which two are kept; three count the call


@pytest.mark.parametrize("layers_at_once", [1, 3, 8])
def test_with_a_limit_there_is_a_launch_for_as_many_layers_as_fit(layers_at_once: int) -> None:
    rows, depth = 200, 24
    # A layer's gradient, and its input, which is kept once: that of one layer is not the output of another, but its tanh.
    limit = 2 * rows * 8 * 4 * layers_at_once - 1
    launches, _ = _backward_launches(depth, rows, max_kept_bytes=limit)
    assert launches == -(-depth // layers_at_once)


def test_what_is_kept_is_limited() -> None:
    """The peak of a backward pass is above that of a plain one by the limit and a layer at most."""
    rows, depth, width = 4000, 12, 16
    layer = 2 * rows * width * 4

    def peak(**settings: Any) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(width, width) for _ in range(depth)))  # what is kept is not freed otherwise
        x = torch.randn(rows, width)
        with counted_launches(), MemoryMeter() as meter:
            ours = KFACPreconditioner(model, backend="triton", **settings)
            for step in range(2):
                if step == 1:  # tables are there
                    meter.restart()
                    before = meter.current
                model(x).square().mean().backward()
                ours.precondition_()
                model.zero_grad()
            return meter.peak - before

    at_once = peak(max_kept_bytes=0)
    for count in (1, 4):
        assert peak(max_kept_bytes=count * layer) <= at_once + (count + 1) * layer
    assert peak(max_kept_bytes=1 << 40) > at_once + layer  # else the limit would not show


def test_nothing_is_kept_where_nothing_is_gained() -> None:
    """On a CPU each layer is summed at once, and so are factors in double precision, which the kernels do not take."""
    for dtype in (torch.float32, torch.float64):
        model = Net().to(dtype)
        with KFACPreconditioner(model) as ours:
            seen: list[tuple[int, bool]] = []
            for statistics in ours.engine.statistics:
                statistics.layer.weight.register_hook(
                    lambda _, s=statistics, seen=seen, ours=ours: seen.append((queued(ours), bool(s.on_host.passes)))
                )
            model(torch.randn(ROWS, WIDTH, dtype=dtype)).sum().backward()
            assert seen == [(0, True)] * 3


def test_what_is_overwritten_after_a_backward_pass_has_counted() -> None:
    factors = []
    for overwrites in (False, True):
        torch.manual_seed(0)
        model = Net()
        with KFACPreconditioner(model, backend="triton") as ours:
            inputs: list[Tensor] = []
            outputs: list[Tensor] = []

            def keep(module: nn.Module, args: tuple[Tensor], output: Tensor, found: Any = (inputs, outputs)) -> None:
                output.retain_grad()
                found[0].append(args[0])
                found[1].append(output)

            for layer in model.layers:
                layer.register_forward_hook(keep)
            model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            if overwrites:
                for x in [*inputs, *outputs, *(output.grad for output in outputs)]:
                    assert x is not None
                    x.data.fill_(torch.nan)
            ours.precondition_()
            factors.append([side for pair in ours.factors().values() for side in pair])
    assert all(torch.equal(x, y) for x, y in zip(*factors, strict=True))


class Failing(torch.autograd.Function):
    """The identity, whose backward raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ArithmeticError


@pytest.mark.parametrize("then", ["forget", "step", "another pass"])
def test_what_a_backward_pass_leaves_when_it_fails(then: str) -> None:
    """It is dropped with the statistics without a launch, or summed, as it would have been at once."""
    factors = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = Net()
        with KFACPreconditioner(model, backend=backend) as ours:
            handle = model.layers[0].register_forward_hook(lambda m, args, out: Failing.apply(out))
            with pytest.raises(ArithmeticError):
                model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            handle.remove()
            assert queued(ours) == (2 if backend == "triton" else 0)
            if then == "forget":
                with counted_launches() as counts:
                    ours.forget_statistics()
                assert queued(ours) == counts.total() == 0
            if then != "step":
                model(torch.randn(ROWS, WIDTH)).square().mean().backward()
                assert queued(ours) == 0
            ours.engine.precondition(lambda p: 0.1)
            factors.append([side for pair in ours.factors().values() for side in pair])
    for found, truth in zip(*factors, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)


def test_a_sum_that_fails_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """For want of memory, at the end of a backward pass: the step sums what was counted."""
    factors = []
    for fails in (False, True):
        torch.manual_seed(0)
        model = Net()
        with KFACPreconditioner(model, backend="triton") as ours, monkeypatch.context() as patch:
            loss = model(torch.randn(ROWS, WIDTH)).square().mean()
            if fails:

                def refuse(*args: Any, **options: Any) -> None:
                    raise torch.OutOfMemoryError

                patch.setattr(ops, "covariance_ema", refuse)
                with pytest.raises(torch.OutOfMemoryError):
                    loss.backward()
                patch.undo()
                assert queued(ours) == 3
            else:
                loss.backward()
            ours.engine.precondition(lambda p: 0.1)
            factors.append([side for pair in ours.factors().values() for side in pair])
    assert all(torch.equal(x, y) for x, y in zip(*factors, strict=True))


def test_a_step_within_a_backward_pass_takes_what_has_come() -> None:
    """By a hook on a gradient: the layers that come later have their statistics in the next step."""
    factors = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = Net()
        with KFACPreconditioner(model, backend=backend) as ours:

            def step(p: Tensor, engine: Any = ours.engine) -> None:
                engine.precondition(lambda _: 0.1)

            model.layers[1].weight.register_post_accumulate_grad_hook(step)
            for _ in range(2):
                model(torch.randn(ROWS, WIDTH)).square().mean().backward()
            factors.append([side for pair in ours.factors().values() for side in pair])
    for found, truth in zip(*factors, strict=True):
        torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)


class Stream:
    """Stands in for a CUDA stream; writes down what waits for what."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_rows_are_summed_where_they_are_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of one stream there, before rows of another are queued, and at the end on the stream of the caller, which waits."""
    log: list[str] = []
    streams = [Stream("caller", log), Stream("first", log), Stream("second", log)]
    current = [streams[0]]

    @contextmanager
    def within(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def launch(*args: Any, **options: Any) -> None:
        log.append(f"{len(args[0])} sums on {current[-1].name}")

    monkeypatch.setattr(row_queue, "_current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: log.append(f"memory for {stream.name}"))
    monkeypatch.setattr(ops, "covariance_ema", launch)
    model = Net()
    with KFACPreconditioner(model, backend="triton") as ours:
        for statistics, number in zip(ours.engine.statistics, (2, 2, 1), strict=True):

            def add(*args: Any, original: Any = statistics.add, stream: Stream = streams[number], **options: Any) -> None:
                with within(stream):
                    original(*args, **options)

            monkeypatch.setattr(statistics, "add", add)
        model(torch.randn(ROWS, WIDTH)).square().mean().backward()
    assert log == ["2 sums on first", "caller waits for second", *["memory for caller"] * 4, "4 sums on caller"]


def test_the_limit_can_be_changed_and_is_checked() -> None:
    ours = KFACPreconditioner(Net(), max_kept_bytes=5)
    assert ours.engine.gate.max_kept_bytes == 5
    ours.change(max_kept_bytes=0)
    assert ours.engine.gate.max_kept_bytes == 0
    for bad, error in ((-1, ValueError), (1.5, TypeError), (None, TypeError)):
        with pytest.raises(error, match="max_kept_bytes"):
            ours.change(max_kept_bytes=bad)


def test_settings_from_before_the_limit_have_the_default() -> None:
    """A pickle of them has no such entry."""
    settings = KFACPreconditioner(Net()).engine.settings
    default = settings.max_kept_bytes
    del vars(settings)["max_kept_bytes"]
    assert settings.max_kept_bytes == default


class Overwriting(torch.autograd.Function):
    """Multiplies its incoming gradient in place, which PyTorch does not allow: the other branch has the same tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.mul_(3.0)


@pytest.mark.parametrize("max_kept_bytes", [0, 1 << 20])
def test_a_gradient_that_is_overwritten_is_noticed(max_kept_bytes: int) -> None:
    model = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])
    ours = KFACPreconditioner(model, backend="triton", max_kept_bytes=max_kept_bytes)
    x = torch.randn(ROWS, WIDTH)
    loss = (Overwriting.apply(model[0](x)) + model[1](x)).tanh().mean()
    with counted_launches():
        if max_kept_bytes == 0:
            loss.backward()
            return
        with pytest.raises(RuntimeError, match=r"of layer '1' was changed in place .* pass max_kept_bytes=0"):
            loss.backward()
    ours.forget_statistics()
    assert queued(ours) == 0
