"""The parts `step`, `adam`, `vision` and `compiled`: milliseconds a training step of an optimizer, host and device apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from kfac_triton import KFACAdam

from .findings import Bench
from .others import ADAMW as PLAIN
from .others import KFAC_ADAM, Task
from .workloads import FROZEN, RARELY, Step, Variant, certificates, clock, task, training_step

_FUSED: dict[str, Any] = {"fused": True}
_ROWS: dict[str, Any] = {"norms": "skip", "stats_fraction": 0.125}
_BLOCKS = _ROWS | {"max_factor_size": 1024, "oversize": "block"}

ADAMW = Variant("AdamW", optimizer=PLAIN)
FUSED = Variant("AdamW fused, tf32", optimizer=PLAIN, settings=_FUSED, precision="high")
TF32 = Variant("K-FAC, tf32", precision="high")
NORMS = Variant("... norms skipped", settings={"norms": "skip"}, precision="high")
REST = Variant("K-FAC, tf32, no refresh, no statistics", settings=FROZEN, precision="high")
# Each line with an ellipsis adds a setting to the one above, so that differences say what a thing costs.
CUMULATIVE = (
    ADAMW,
    FUSED,
    Variant("K-FAC"),
    TF32,
    NORMS,
    Variant("... 1/8 of the rows", settings=_ROWS, precision="high"),
    Variant("... blocks of 1024", settings=_BLOCKS, precision="high"),
    Variant("... inverses every 4", settings=_BLOCKS | {"inverse_every": 4}, precision="high"),
    REST,
)
# Statistics in every step; the first one has eigenvectors by eigh.
ADAM = Variant(f"{KFAC_ADAM}, tf32", KFAC_ADAM, {"refresh_every": 1, "refresh_warmup": 0}, precision="high")
AMORTIZED = 10  # steps from a refresh to the next one, the default
VISION = (ADAMW, FUSED, TF32, NORMS, REST)
COMPILED = (
    Variant("AdamW fused, compiled", optimizer=PLAIN, settings=_FUSED, precision="high", compiled=True),
    Variant("K-FAC, compiled, tf32", precision="high", compiled=True),
)


def run(bench: Bench, names: Sequence[str], variants: Sequence[Variant] = CUMULATIVE) -> None:
    """Says the times of every variant on every task; `over_AdamW` is over the first variant."""
    for name in names:
        workload, base = task(bench, name), None
        for variant in variants:
            what = f"{name}: {variant.name}"
            found = bench.attempt(what, partial(_measure, bench, what, workload, variant, base), part="step")
            base = base or found
            torch._dynamo.reset()
            if bench.on_gpu:
                torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("highest")


def _measure(bench: Bench, what: str, workload: Task, variant: Variant, base: float | None) -> float:
    torch.set_float32_matmul_precision(variant.precision)
    step, optimizer = training_step(workload, variant)
    return _clocked(bench, what, step, optimizer, base)


def _clocked(bench: Bench, what: str, step: Step, optimizer: torch.optim.Optimizer, base: float | None, **more: float) -> float:
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    milliseconds, host = clock(bench, step, 0.2 if bench.quick else 1.5)
    facts: dict[str, Any] = {"GiB": torch.cuda.max_memory_allocated() / 2**30} if bench.on_gpu else {}
    facts |= certificates(optimizer)
    over = milliseconds / (base or milliseconds)
    bench.say(what, part="step", ms=milliseconds, host_ms=host, over_AdamW=over, loss=float(step()), **facts, **more)
    return milliseconds


def run_adam(bench: Bench, names: Sequence[str]) -> None:
    """Says the times of AdamW and of KFACAdam, with a refresh in every step, without one, and with one in ten."""
    for name in names:
        workload = task(bench, name)
        what = f"{name}: {ADAMW.name}"
        base = bench.attempt(what, partial(_measure, bench, what, workload, ADAMW, None), part="step")
        what = f"{name}: {ADAM.name}"
        bench.attempt(what, partial(_measure_adam, bench, what, workload, base), part="step")
        if bench.on_gpu:
            torch.cuda.empty_cache()
    torch.set_float32_matmul_precision("highest")


def _measure_adam(bench: Bench, what: str, workload: Task, base: float | None) -> None:
    """One optimizer for both, because the first eigenvectors of a large model take seconds."""
    torch.set_float32_matmul_precision(ADAM.precision)
    step, optimizer = training_step(workload, ADAM)
    assert isinstance(optimizer, KFACAdam)
    started = time.perf_counter()
    step()
    bench.wait()
    first = time.perf_counter() - started
    fresh = _clocked(bench, f"{what}, a refresh in every step", step, optimizer, base, first_step_s=first)
    optimizer.change(refresh_every=RARELY)
    plain = _clocked(bench, f"{what}, no refresh", step, optimizer, base)
    mean = plain + (fresh - plain) / AMORTIZED  # of these two, not measured
    over = {"over_AdamW": mean / base} if base else {}
    bench.say(f"{what}, a refresh in {AMORTIZED} steps", part="step", ms=mean, **over, mean_of="the two above")


def run_vision(bench: Bench, names: Sequence[str]) -> None:
    """Fewer variants, for larger models."""
    run(bench, names, VISION)


def run_compiled(bench: Bench, names: Sequence[str]) -> None:
    """With the model compiled."""
    run(bench, names, COMPILED)
