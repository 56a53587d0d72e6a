"""The part `ops`: operations over layers of real models, against what a user would write."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .findings import Bench
from .others import BY_NAME, Layer, Model, equal_layers, machine, measured_rates, race, rates_of

_MIXED = tuple(
    Layer(1024, inputs, outputs, bias=False, count=count)
    for inputs, outputs, count in ((128, 256, 3), (256, 512, 4), (512, 384, 3))
)
# Layer sets beside those of the other benchmarks.
MORE = {
    "mixed_20": Model("mixed_20", "20 factors of sides 128 to 512, 1,024 rows, bfloat16", _MIXED),
    "stack_2048": equal_layers(2048, 8, 4096),
    "stack_4096": equal_layers(4096, 4, 4096),
}
QUICK = ("quick_perceptron", "quick_convolutions")
# The sets that say most about an operation; None for all. Cold inverses are a run's first ones alone.
RACED: dict[str, set[str] | None] = {
    "factored_newton_refresh": {"stack_512", "stack_1024", "autoencoder", "resnet50", "vit_b", "gpt2", "wide_block"},
    "covariance_ema": None,
    "precondition": {"autoencoder", "resnet50", "vit_b", "gpt2", "wide_block"},
}


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says the time of every contestant, or why there is none."""
    device = torch.device(bench.device)
    size = {"side": 128, "repeats": 3} if bench.quick else {}
    rates = rates_of(machine(device)["device"]) or measured_rates(device, **size)
    models = {**BY_NAME, **MORE}

    def contest(operation: str, name: str) -> None:
        say_rows(bench, f"{operation} {name}", race(operation, models[name], device, rates, 0.02 if bench.quick else 0.4))

    for operation, sets in RACED.items():
        for name in QUICK if bench.quick else names:
            if bench.quick or sets is None or name in sets:
                bench.attempt(f"{operation} {name}", partial(contest, operation, name))


def say_rows(bench: Bench, race: str, rows: Sequence[dict[str, Any]]) -> None:
    """Says a race's rows, see `benchmarks.kernels.timing`."""
    for row in rows:
        what = f"{race}: {row['contestant']}"
        if "best_seconds" not in row:
            bench.say(what, not_timed=row.get("not_timed"))
            continue
        times = {key: f"{way}_seconds" for key, way in (("ms", "best"), ("eager_ms", "eager"), ("floor_ms", "floor"))}
        milliseconds = {key: 1e3 * row[way] for key, way in times.items() if way in row}
        more = {"of_ours": row["over_ours"]} if "over_ours" in row else {}
        more |= {key: row[key] for key in ("no_graph", "not_timed") if key in row}  # errors that left a time
        bench.say(what, **milliseconds, error=row["error"], **more)
