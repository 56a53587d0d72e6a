"""`graphed_step` and what is known to break CUDA graphs: streams, shared tensors, failed recordings, gradients of batches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.graphed import CapturableSGD, graphed, kinds, pretend_gpu, sgd, tiny
from support.recording import LOSS, Case, Run
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner, graphed_step


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)


def _capturable(model: nn.Module, lr: Any) -> torch.optim.Optimizer:
    return CapturableSGD([{"params": [p], "capturable": True, "lr": lr} for p in model.parameters()])


def test_a_rate_that_groups_share_is_not_overwritten_when_one_of_them_gets_another() -> None:
    rate = torch.tensor(0.1)
    run = Run(Case(tiny), lambda model: _capturable(model, rate))
    step = graphed(run)
    for _ in range(4):
        step(*run.batch)
    run.optimizer.param_groups[1]["lr"] = 0.5
    for _ in range(3):
        step(*run.batch)
    assert [float(group["lr"]) for group in run.optimizer.param_groups] == pytest.approx([0.1, 0.5])
    assert step.counts.recorded == 2


def test_rates_computed_from_the_first_one_do_not_change_it() -> None:
    rate = torch.tensor(0.1)
    run = Run(Case(tiny), lambda model: _capturable(model, rate))
    step = graphed(run)
    step(*run.batch)  # sees the user's tensor
    for i in range(8):
        for group in run.optimizer.param_groups:
            group["lr"] = rate * (1 - i / 10)
        step(*run.batch)
    assert float(rate) == pytest.approx(0.1)
    assert [float(group["lr"]) for group in run.optimizer.param_groups] == pytest.approx([0.03, 0.03])
    assert step.counts.recorded == 1


@pytest.mark.parametrize("is_attached", [True, False])
def test_a_recording_that_fails_after_the_backward_pass_leaves_no_gradients_and_no_statistics(is_attached: bool) -> None:
    """They are in memory that no kernel has written, and the next eager step would add them to the factors."""
    kept: list[Any] = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = sgd(model)
        kept.append(KFACPreconditioner(model, damping=0.1, inverse="factored", backend="triton"))
        kept[0].attach(optimizer)
        return optimizer

    run = Run(Case(tiny), make if is_attached else None)
    engine = kept[0].engine if is_attached else run.optimizer.engine

    def check() -> None:
        if step.counts.eager and bool(next(run.model.parameters()).grad.isnan().any()):  # type: ignore[union-attr]
            raise ArithmeticError("NaN")

    step = graphed(run, warmup=1, before_step=check)
    step(*run.batch)
    with pytest.raises(RuntimeError, match="cannot record this step"):
        step(*run.batch)
    assert all(p.grad is None for p in run.model.parameters())
    assert all(s.on_host.rows == 0 for s in engine.statistics)


def test_streams_are_put_back_and_waited_for_when_a_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.graph leaves its stream current if ending the recording raises an error."""
    events: list[str] = []
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(wait_stream=lambda other: events.append("waited"))
    )

    @contextmanager
    def stream(stream: object) -> Iterator[None]:
        events.append("entered")
        try:
            yield
        finally:
            events.append("left")

    @contextmanager
    def recording(graph: object, stream: object, capture_error_mode: str) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("capture_end")

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    run = Run(Case(tiny), sgd)
    step = graphed(run, warmup=1)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        step(torch.zeros(3, 7), run.batch[1])
    assert events == ["entered", "left", "waited"]
    step(*run.batch)
    events.clear()
    with pytest.raises(RuntimeError, match="cannot record this step: capture_end"):
        step(*run.batch)
    assert events == ["entered", "left"]


def test_a_tensor_of_the_batch_that_requires_a_gradient_is_refused() -> None:
    """An eager step would send it back to what computed the tensor, a replay would not."""
    run = Run(Case(tiny), sgd)
    encoder = nn.Linear(5, 5)
    with pytest.raises(ValueError, match="a tensor of the batch requires a gradient, which replays would not compute"):
        graphed(run)(encoder(run.batch[0]), run.batch[1])


def test_the_loss_may_ask_for_gradients_of_the_batch() -> None:
    """A gradient penalty; the user's tensor stays as it was."""
    run = Run(Case(tiny), sgd)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        x.requires_grad_()
        value = LOSS(run.model(x), y)
        (slope,) = torch.autograd.grad(value, x, create_graph=True)
        return value + slope.square().sum()

    step = graphed_step(run.optimizer, loss, warmup=1)
    for _ in range(4):
        step(*run.batch)
    assert kinds(step) == (1, 3, 0, 1)
    assert not run.batch[0].requires_grad


def test_equal_constants_of_different_types_are_different_steps() -> None:
    run = Run(Case(tiny), sgd)
    seen: list[Any] = []

    def loss(x: Tensor, y: Tensor, constant: Any) -> Tensor:
        seen.append(constant)
        return LOSS(run.model(x), y)

    step = graphed_step(run.optimizer, loss, warmup=1)
    for constant in (1, 1, True, 1.0, None, None):
        step(*run.batch, constant)
    assert [type(x) for x in seen] == [int, int, bool, float, type(None), type(None)]


def test_the_optimizer_does_not_keep_the_graphs() -> None:
    """A second phase of training makes another function with the same optimizer."""
    run = Run(Case(tiny), sgd)
    step = graphed(run, warmup=1)
    for _ in range(3):
        step(*run.batch)
    kept = weakref.ref(step)
    del step
    gc.collect()
    assert kept() is None
    run.optimizer.load_state_dict(run.optimizer.state_dict())


@pytest.mark.parametrize("change", [lambda x: x.t().contiguous().t(), lambda x: x[:, :1].expand(-1, 5)])
def test_batches_need_not_be_contiguous(change: Any) -> None:
    eager, run = Run(Case(tiny), sgd), Run(Case(tiny), sgd)
    step = graphed(run, warmup=1)
    for _ in range(4):
        x, y = eager.case.batch()
        eager.optimizer.zero_grad()
        LOSS(eager.model(change(x)), y).backward()
        eager.optimizer.step()
        step(change(x), y)
    assert kinds(step) == (1, 3, 0, 1)
    assert all(
        torch.allclose(*pair, rtol=1e-6, atol=1e-7)
        for pair in zip(eager.model.parameters(), run.model.parameters(), strict=True)
    )
