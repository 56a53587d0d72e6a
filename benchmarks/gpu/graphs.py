"""The part `graph`: a whole training step captured as a CUDA graph. Is the result right, and how fast is a replay?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .findings import Bench
from .others import Task
from .workloads import Step, Variant, clock, task, training_step

REPLAYS = 200
WARM_UP = 4  # eager steps, on the stream that is captured: the first ones allocate state and compile kernels
ALLOWED = 1e-3  # largest difference between parameters, over the largest distance that one has moved
CAPTURABLE = tuple(Variant(name, kfac=name == "K-FAC", settings={"capturable": True}) for name in ("AdamW", "K-FAC"))


def capture(step: Step, warm_up: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the step, and the loss that every replay writes; `warm_up` runs eager steps before."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        warm_up()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step()
    return graph, loss


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says the times of eager steps and of replays, in two lines, and whether replays end where eager steps do."""
    for name in names:
        workload = task(bench, name)
        for variant in CAPTURABLE:
            what = f"{name} {variant.name}"
            if bench.on_gpu:
                bench.attempt(what, partial(_compare, bench, what, workload, variant))
            else:
                bench.say(what, skipped="no GPU")


def _compare(bench: Bench, what: str, workload: Task, variant: Variant) -> None:
    eager, other = training_step(workload, variant)
    losses = [eager() for _ in range(WARM_UP + REPLAYS)]
    stepped = [p.detach().clone() for p in _parameters(other)]
    first, last = float(losses[0]), float(losses[-1])
    milliseconds, host = clock(bench, eager, 0.5)
    # At once: recording may fail, and leave the device unusable.
    bench.say(what, eager_ms=milliseconds, eager_host_ms=host, first_loss=first, eager_loss=last)
    del eager, other, losses
    step, optimizer = training_step(workload, variant)
    graph, loss = capture(step, lambda: [step() for _ in range(WARM_UP)])
    for _ in range(REPLAYS):
        graph.replay()
    replayed = [p.detach().clone() for p in _parameters(optimizer)]
    last = float(loss)  # before more replays write another one
    off = _largest_difference(replayed, stepped)
    moved = _largest_difference(replayed, list(workload.model.parameters()))
    milliseconds, host = clock(bench, graph.replay, 1.0)
    verdict = "right" if off <= ALLOWED * moved else "WRONG"
    bench.say(what, verdict=verdict, ms=milliseconds, host_ms=host, off=off, moved=moved, loss=last)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
