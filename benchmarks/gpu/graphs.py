"""The part `graph`: a whole training step captured as a CUDA graph. Is the result right, and how fast is a replay?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kfac_triton import graphed_step

from .findings import Bench
from .others import ADAMW, KFAC_NAME, Task
from .workloads import Step, Variant, clock, prepared, task, training_step

REPLAYS = 200
WARM_UP = 4  # eager steps, on the stream that is captured: the first ones allocate state and compile kernels
ALLOWED = 1e-3  # largest difference between parameters, over the largest distance that one has moved
CAPTURABLE = tuple(Variant(name, name, {"capturable": True}) for name in (ADAMW, KFAC_NAME))


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
    """Says the times of eager steps and of replays, recorded by hand and by `graphed_step`, and whether all end alike."""
    for name in names:
        workload = task(bench, name)
        for variant in CAPTURABLE:
            what = f"{name} {variant.name}"
            if bench.on_gpu:
                stepped = bench.attempt(what, partial(_eager, bench, what, workload, variant))
                if stepped is not None:
                    bench.attempt(what, partial(_replays, bench, what, workload, variant, stepped))
                    what = f"{what}, graphed_step"
                    bench.attempt(what, partial(_graphed_step, bench, what, workload, variant, stepped))
            else:
                bench.say(what, skipped="no GPU")


def _eager(bench: Bench, what: str, workload: Task, variant: Variant) -> list[Tensor]:
    """Says the times of eager steps at once: recording may fail, and leave the device unusable. Returns the parameters."""
    step, optimizer = training_step(workload, variant)
    losses = [step() for _ in range(WARM_UP + REPLAYS)]
    stepped = [p.detach().clone() for p in _parameters(optimizer)]
    first, last = float(losses[0]), float(losses[-1])
    milliseconds, host = clock(bench, step, 0.5)
    bench.say(what, eager_ms=milliseconds, eager_host_ms=host, first_loss=first, eager_loss=last)
    return stepped


def _replays(bench: Bench, what: str, workload: Task, variant: Variant, stepped: list[Tensor]) -> None:
    step, optimizer = training_step(workload, variant)
    graph, loss = capture(step, lambda: [step() for _ in range(WARM_UP)])
    for _ in range(REPLAYS):
        graph.replay()
    _judge(bench, what, workload, optimizer, stepped, graph.replay, float(loss))


def _graphed_step(bench: Bench, what: str, workload: Task, variant: Variant, stepped: list[Tensor]) -> None:
    """As users record a step; each call copies the batch, and no step is eager that is not warm-up or made by a refusal."""
    model, optimizer = prepared(workload, variant)
    step = graphed_step(optimizer, partial(workload.loss, model), warmup=WARM_UP, mend_every=10**6)
    losses = [step(workload.batch) for _ in range(WARM_UP + REPLAYS)]
    counts = {"eager_steps": step.counts.eager, "recorded": step.counts.recorded}
    _judge(bench, what, workload, optimizer, stepped, lambda: step(workload.batch), float(losses[-1]), **counts)


def _judge(
    bench: Bench,
    what: str,
    workload: Task,
    optimizer: torch.optim.Optimizer,
    stepped: list[Tensor],
    replay: Callable[[], object],
    loss: float,
    **facts: int,
) -> None:
    """Says whether parameters are those of eager steps, and how fast a replay is."""
    replayed = [p.detach().clone() for p in _parameters(optimizer)]
    off = _largest_difference(replayed, stepped)
    moved = _largest_difference(replayed, list(workload.model.parameters()))
    milliseconds, host = clock(bench, replay, 1.0)
    verdict = "right" if off <= ALLOWED * moved else "WRONG"
    bench.say(what, verdict=verdict, ms=milliseconds, host_ms=host, off=off, moved=moved, loss=loss, **facts)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@torch.no_grad()
def _largest_difference(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
