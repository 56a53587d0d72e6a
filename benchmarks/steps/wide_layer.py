"""What a Linear layer of 16k inputs costs K-FAC in each form of its factors: memory, and seconds of a step's parts.

    python -m benchmarks.steps.wide_layer

Each form runs in a process of its own, so that its peak memory is its own. Times are of this machine; compare the rows.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kfac_triton import KFACPreconditioner

FORMS: dict[str, dict[str, Any]] = {
    "full": {"max_factor_size": None},
    "blocks of 4096": {"max_factor_size": 4097, "oversize": "block"},
    "blocks of 1024": {"max_factor_size": 1025, "oversize": "block"},
    "diagonal": {"max_factor_size": 4096, "oversize": "diagonal"},
}
COLUMNS = ("statistics", "inversion", "preconditioning")


def seconds(function: Callable[[], object]) -> float:
    """Wall-clock time of a call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(inputs: int, outputs: int, rows: int, settings: dict[str, Any]) -> dict[str, float]:
    """Seconds of a step's parts, mebibytes by kind, and the peak beyond that of the layer's own training step."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, outputs)
    x, y = torch.randn(rows, inputs), torch.randn(rows, outputs)

    def backward() -> None:
        model.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()

    backward()
    plain = seconds(backward)
    before = _peak_mebibytes()
    ours = KFACPreconditioner(model, damping=0.1, inverse_every=1_000_000, **settings)
    backward()
    first = seconds(ours.precondition_)  # with inverses
    statistics = seconds(backward) - plain
    gradient = seconds(ours.precondition_)  # without
    memory = {kind: size / 2**20 for kind, size in ours.diagnostics()["memory"].items()}
    times = dict(zip(COLUMNS, (max(statistics, 0.0), max(first - gradient, 0.0), gradient), strict=True))
    return times | memory | {"peak": _peak_mebibytes() - before}


def _peak_mebibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _child(connection: Any, arguments: tuple[Any, ...]) -> None:
    connection.send(measure(*arguments))


def in_a_process(*arguments: Any) -> dict[str, float]:
    """`measure` in a fresh process.

    Raises:
        RuntimeError: if the process died, for example of a lack of memory.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, arguments))
    process.start()
    theirs.close()
    try:
        result: dict[str, float] = ours.recv()
    except EOFError as error:
        process.join()
        raise RuntimeError(f"the measuring process ended with exit status {process.exitcode}") from error
    process.join()
    return result


def table(results: dict[str, dict[str, float]]) -> str:
    """Markdown: a form a row."""
    lines = [
        "| form | " + " | ".join(f"{name} (s)" for name in COLUMNS) + " | factors (MiB) | sums | inverses | all | peak |",
        "|---" * 9 + "|",
    ]
    for form, found in results.items():
        kinds = [found[kind] for kind in ("factors", "sums", "inverses")]
        cells = [f"{found[name]:.3f}" for name in COLUMNS] + [f"{size:,.1f}" for size in (*kinds, sum(kinds), found["peak"])]
        lines.append(f"| {form} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=16384)
    parser.add_argument("--outputs", type=int, default=256)
    parser.add_argument("--rows", type=int, default=512)
    arguments = parser.parse_args()
    sizes = arguments.inputs, arguments.outputs, arguments.rows
    print(f"Linear layer, {sizes[0]} inputs, {sizes[1]} outputs, batch {sizes[2]}, float32, {torch.get_num_threads()} threads")
    print(table({form: in_a_process(*sizes, settings) for form, settings in FORMS.items()}))


if __name__ == "__main__":
    main()
