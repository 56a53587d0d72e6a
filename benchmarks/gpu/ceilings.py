"""The part `env`: what the machine is, and the rates that nothing on it can exceed."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .findings import Bench
from .others import machine


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says versions, and rates of products, of a copy, and of small operations."""
    device = torch.device(bench.device)
    facts: dict[str, Any] = {**machine(device), "cpus": os.cpu_count(), "date": datetime.date.today().isoformat()}
    if bench.on_gpu:
        found = torch.cuda.get_device_properties(device)
        facts |= {
            "processors": found.multi_processor_count,
            "GiB": found.total_memory >> 30,
            "L2 MiB": found.L2_cache_size >> 20,
        }
    bench.say("machine", **facts)

    def rate(run: Callable[[], object], amount: float, repeats: int = 3 if bench.quick else 10) -> float:
        run()
        bench.wait()
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        bench.wait()
        return amount * repeats / (time.perf_counter() - start)

    full = 256 if bench.quick else 8192
    before = torch.backends.cuda.matmul.allow_tf32
    for name, dtype, side in (
        ("bf16", torch.bfloat16, full),
        ("tf32", torch.float32, full),
        ("fp32", torch.float32, full // 2),
    ):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        bench.say(f"product {name}", TFLOPs=rate(lambda a=a, b=b: a @ b, 2 * side**3) / 1e12)  # type: ignore[misc]
    torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.zeros(1 << (18 if bench.quick else 29), device=device)
    target = torch.empty_like(source)
    bench.say("copy", TBs=rate(lambda: target.copy_(source), 2 * source.nbytes) / 1e12)
    few = torch.zeros(8, device=device)
    bench.say("host, one small operation", us=1e6 / rate(lambda: few.add_(1), 1, 2000))
