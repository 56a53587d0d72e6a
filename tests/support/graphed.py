"""`graphed_step` on a CPU, beside a run of eager steps.

Graphs are those of `recording`. As a GPU would not have, they have executed the step when it was recorded; so the first replay
of each does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.recording import LOSS, Case, Run, Tape, equal, recorded
from torch import Tensor, nn

from kfac_triton import KFAC, GraphedStep, graphed_step, training_graph

WARMUP = 2


class Graph:
    """A `torch.cuda.CUDAGraph`."""

    def __init__(self) -> None:
        self.tape: Tape | None = None
        self.has_run = False

    def replay(self) -> None:
        assert self.tape is not None, "a replay before the recording has ended"
        if self.has_run:
            self.tape.replay()
        self.has_run = True


@contextmanager
def _recording(graph: Graph, stream: object, capture_error_mode: str) -> Iterator[None]:
    assert capture_error_mode == "thread_local"
    with recorded() as tape:
        yield
    graph.tape = tape


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of the test."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda stream: nullcontext(),
        "CUDAGraph": Graph,
        "graph": _recording,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(training_graph, "can_record", lambda device: True)


def loss_of(run: Run) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: LOSS(run.model(x), y)


def tiny() -> nn.Module:
    """One layer: the interpreter of the kernels is slow."""
    return nn.Sequential(nn.Linear(5, 4))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    """For what does not depend on K-FAC."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class CapturableSGD(torch.optim.SGD):
    """SGD with a rate that may be a tensor, as AdamW's with capturable=True, which PyTorch refuses on a CPU."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * p.grad)


def pair(make: Any = None, case: Case | None = None, **options: Any) -> tuple[Run, Run]:
    """Two equal runs."""
    return Run(case or Case(tiny), make, **options), Run(case or Case(tiny), make, **options)


def same(eager: Run, run: Run) -> bool:
    """Whether training was the same, bit for bit."""
    if isinstance(run.optimizer, KFAC):
        return equal(eager, run)
    return all(torch.equal(*x) for x in zip(eager.model.parameters(), run.model.parameters(), strict=True))


def graphed(run: Run, **options: Any) -> GraphedStep:
    return graphed_step(run.optimizer, loss_of(run), **{"warmup": WARMUP, **options})


def both(eager: Run, run: Run, step: GraphedStep, count: int, change: Callable[[Tensor], Tensor] = lambda x: x) -> list[float]:
    """As many steps of each on the same batches, whose tensors may be changed; the losses, which are equal."""
    losses = []
    for _ in range(count):
        torch.manual_seed(eager.seed)
        batch = [change(x) for x in eager.case.batch()]
        eager.seed += 1
        state = torch.get_rng_state()
        eager.optimizer.zero_grad()
        loss = loss_of(eager)(*batch)
        loss.backward()
        eager.optimizer.step()
        torch.set_rng_state(state)
        result = step(*batch)
        assert not result.requires_grad
        assert torch.equal(result, loss.detach())
        losses.append(result)
    return [float(x) for x in losses]


def kinds(step: GraphedStep) -> tuple[int, int, int, int]:
    counts = step.counts
    return counts.eager, counts.replayed, counts.mended, counts.recorded
