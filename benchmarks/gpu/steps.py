"""The parts `step`, `vision` and `compiled`: milliseconds a training step of AdamW and K-FAC, host and device apart."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .findings import Bench
from .others import Task
from .workloads import FROZEN, Variant, certificates, clock, task, training_step

_FUSED: dict[str, Any] = {"fused": True}
_ROWS: dict[str, Any] = {"norms": "skip", "stats_fraction": 0.125}
_BLOCKS = _ROWS | {"max_factor_size": 1024, "oversize": "block"}

ADAMW = Variant("AdamW", kfac=False)
FUSED = Variant("AdamW fused, tf32", kfac=False, settings=_FUSED, precision="high")
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
VISION = (ADAMW, FUSED, TF32, NORMS, REST)
COMPILED = (
    Variant("AdamW fused, compiled", kfac=False, settings=_FUSED, precision="high", compiled=True),
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
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    milliseconds, host = clock(bench, step, 0.2 if bench.quick else 1.5)
    facts: dict[str, Any] = {"GiB": torch.cuda.max_memory_allocated() / 2**30} if bench.on_gpu else {}
    facts |= certificates(optimizer)
    over = milliseconds / (base or milliseconds)
    bench.say(what, part="step", ms=milliseconds, host_ms=host, over_AdamW=over, loss=float(step()), **facts)
    return milliseconds


def run_vision(bench: Bench, names: Sequence[str]) -> None:
    """Fewer variants, for larger models."""
    run(bench, names, VISION)


def run_compiled(bench: Bench, names: Sequence[str]) -> None:
    """With the model compiled."""
    run(bench, names, COMPILED)
