"""The part `profile`: the kernels that take the time of a K-FAC step, and how often the host launches and waits."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .findings import Bench
from .workloads import Variant, task, training_step

STEPS = 3
KERNELS = 22  # said one by one
RANGES = ("Optimizer.", "ProfilerStep")  # marks that the profiler sets over kernels, and no kernels themselves
CALLS = (
    *("cudaLaunchKernel", "cuLaunchKernel", "cudaMemcpyAsync", "cudaStreamSynchronize", "cudaDeviceSynchronize"),
    *("cudaEventSynchronize", "cudaHostAlloc", "cudaMalloc"),
)


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says totals a step, then the kernels, those that take longest first; a compressed trace goes to the folder."""
    for name in names:
        bench.attempt(name, partial(_profile, bench, name))


def _profile(bench: Bench, name: str) -> None:
    step, _ = training_step(task(bench, name), Variant("K-FAC"))
    for _ in range(5):
        step()
    bench.wait()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.on_gpu else [])
    with torch.profiler.profile(activities=activities) as seen:
        for _ in range(STEPS):
            step()
        bench.wait()
    events = seen.key_averages()
    kernels = sorted((event for event in events if _is_kernel(bench, event)), key=lambda event: -_time(bench, event))
    busy = sum(_time(bench, event) for event in kernels)
    calls = {name: sum(event.count for event in events if event.key.startswith(name)) / STEPS for name in CALLS}
    launched = sum(event.count for event in kernels) / STEPS
    bench.say(name, busy_ms=busy, kernels=launched, **{call: count for call, count in calls.items() if count})
    for event in kernels[:KERNELS]:
        spent = _time(bench, event)
        share = f"{spent / busy:.0%}"
        bench.say(f"  {event.key[:70]}", model=name, ms=spent, calls=event.count / STEPS, share=share)
    trace = bench.folder / f"trace_{name}.json"
    seen.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(f"{trace}.gz", "wb") as compressed:
        shutil.copyfileobj(plain, compressed)
    trace.unlink()


def _is_kernel(bench: Bench, event: Any) -> bool:
    device = not bench.on_gpu or "CUDA" in str(event.device_type)
    return device and _time(bench, event) > 0 and not event.key.startswith(RANGES)


def _time(bench: Bench, event: Any) -> float:
    """Milliseconds a step, of a kernel on a GPU, of an operator on a CPU."""
    microseconds = event.self_device_time_total if bench.on_gpu else event.self_cpu_time_total
    return float(microseconds) / 1e3 / STEPS
