"""The host's share of a step: its time, kernel launches and PyTorch operators, with kernels launched into nothing.

    PYTHONPATH=tests python -m benchmarks.steps.host_time --models gpt autoencoder
    PYTHONPATH=tests python -m benchmarks.steps.host_time --tree OTHER    # also for the package of another checkout, in turns

The networks have the structure of those that they are named after, and a fraction of their width, because the time of the host
does not depend on it. With `few` rows, those of all layers take less memory than the factors. With `adam` the optimizer is
KFACAdam instead of KFAC, in steps without a refresh of the eigenvectors and in steps with one. Times are CPU time of one
thread; only their ratios in one run mean something.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
ADAM = "-adam"  # ends the names of what KFACAdam trains
MODELS = ("gpt", "gpt48", "gpt-few", "gpt48-few", "autoencoder", "vit", "resnet", f"gpt{ADAM}", f"gpt48{ADAM}")
RARELY = 10**6  # steps; more than any measurement has
# Operators that only make views or memory.
FREE = frozenset(
    [
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "as_strided",
        "_unsafe_view",
        "lift_fresh",
        "unbind",
        "diagonal",
        "split_with_sizes",
        "reshape",
        "_reshape_alias",
        "is_pinned",
        "chunk",
    ]
)
Task = tuple[nn.Module, Callable[[], Tensor], str]


def task(name: str) -> Task:
    """A model, its loss on a batch, and what the loss is a mean over."""
    from ..convergence.models import TextTransformer
    from ..gpu import vision_models

    torch.manual_seed(0)
    if name.startswith("gpt"):
        blocks, (batch_size, context) = 48 if "48" in name else 12, (1, 16) if name.endswith("few") else (8, 64)
        gpt = TextTransformer(symbols=64, context=context, width=32, heads=2, blocks=blocks)
        windows = torch.randint(64, (batch_size, context + 1))
        return gpt, lambda: F.cross_entropy(gpt(windows[:, :-1]), windows[:, 1:]), "tokens"
    if name == "autoencoder":
        sizes = [-(-size // 8) for size in (784, 1000, 500, 250, 30, 250, 500, 1000, 784)]
        layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
        autoencoder, batch = nn.Sequential(*layers[:-1]), torch.rand(32, sizes[0])
        return autoencoder, lambda: F.mse_loss(autoencoder(batch), batch), "examples"
    if name == "vit":
        network = vision_models.vit(side=32, patch=8, width=32, heads=2, blocks=12, classes=16)
    else:
        network = vision_models.resnet((4, 8, 16, 32), (3, 4, 6, 3), 16)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    return network, lambda: F.cross_entropy(network(images), labels), "examples"


def _clock(step: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of CPU time of one call."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def _optimizer(name: str, model: nn.Module, terms: str, settings: dict[str, Any]) -> Any:
    """KFAC with everything fresh in every step, or KFACAdam with statistics alone; None if the package has no KFACAdam."""
    import kfac_triton

    options: dict[str, Any] = {"lr": 1e-4, "loss_terms": terms, "backend": "triton", "stats_fraction": 1.0}
    if hasattr(model, "positions"):
        options["skip"] = "positions"
    if not name.endswith(ADAM):
        return kfac_triton.KFAC(model, **options | {"tail": "adamw", "damping": 0.1, "inverse": "factored"} | settings)
    kind = getattr(kfac_triton, "KFACAdam", None)
    rest = {"statistics_every": 1, "refresh_warmup": 0, "refresh_every": RARELY}
    return None if kind is None else kind(model, **options | rest | settings)


def _count(run: Callable[[], object]) -> tuple[Counter[str], Counter[str], int]:
    """Kernels and operators of one call by name, and the number of operators that are not free."""
    from support.launches import CountedOperators

    from . import null_driver

    null_driver.LAUNCHES.clear()
    with CountedOperators() as operators:
        run()
    return Counter(null_driver.LAUNCHES), operators.counts, sum(n for name, n in operators.counts.items() if name not in FREE)


def measure(name: str, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Times, launches and operators of one model; in a process of its own, because it replaces Triton's driver.

    Of KFACAdam, `step` has no refresh, and `refresh` is a step with one. Empty if the package has no such optimizer.
    """
    torch.set_num_threads(1)
    from . import null_driver

    null_driver.install()
    model, loss, terms = task(name)
    optimizer = _optimizer(name, model, terms, settings)
    if optimizer is None:
        return {}
    copies = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    adamw = torch.optim.AdamW(copies, lr=1e-4, foreach=True)
    for p in copies:
        p.grad = torch.randn_like(p)

    def passes() -> None:
        optimizer.zero_grad()
        loss().backward()

    for _ in range(3):
        passes()
        optimizer.step()
        # What no kernel wrote may say that a layer has no statistics, which the host would look for in every step.
        engine = optimizer.engine
        engine.progress = engine.progress.with_statistics(set(range(len(engine.layers))))
    with_taps, step = [], []
    for _ in range(repeats):
        with_taps.append(_clock(passes, 1))
        step.append(_clock(optimizer.step, 1))
    with optimizer.paused():
        without = _clock(passes, repeats)
    result: dict[str, Any] = {
        "taps_ms": statistics.median(with_taps) - without,
        "step_ms": statistics.median(step),
        "adamw_ms": _clock(adamw.step, repeats),
        "passes_ms": without,
    }
    counts = {}
    for part, run in (("passes", passes), ("step", optimizer.step)):
        kernels, operators, counts[part] = _count(run)
        result[f"{part}_launches"] = kernels.total()
        result[f"{part}_kernels"] = dict(kernels)
        result[f"{part}_by_operator"] = dict(operators.most_common())
    with optimizer.paused():
        plain = _count(passes)[2]
    result |= {"taps_operators": counts["passes"] - plain, "step_operators": counts["step"]}
    return result | (_refresh(optimizer, passes, repeats) if name.endswith(ADAM) else {})


def _refresh(optimizer: Any, passes: Callable[[], None], repeats: int) -> dict[str, Any]:
    """The same of a step of KFACAdam that refreshes the eigenvectors by products."""
    optimizer.change(refresh_every=1)
    times = []
    # The first one compiles kernels. There are few of the others: the passes before each of them take longer than they do.
    for _ in range(2 + repeats // 4):
        passes()
        times.append(_clock(optimizer.step, 1))
    passes()
    kernels, operators, computing = _count(optimizer.step)
    return {
        "refresh_ms": statistics.median(times[1:]),
        "refresh_launches": kernels.total(),
        "refresh_kernels": dict(kernels),
        "refresh_by_operator": dict(operators.most_common()),
        "refresh_operators": computing,
    }


def run_in_process(name: str, tree: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in another process, with the package of a checkout."""
    command = [sys.executable, "-m", "benchmarks.steps.host_time", "--child", name, "--tree", str(tree)]
    command += ["--repeats", str(arguments.repeats), "--settings", json.dumps(arguments.settings)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    # Compiled, even where the caller interprets kernels.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} with {tree} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """One line for each model and checkout, or two with KFACAdam; none where the checkout has no KFACAdam."""
    lines = [
        "| model | package | launches: backward, step | operators: hooks, step | CPU ms: hooks, step, both | AdamW |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for (name, label), r in results.items():
        for step in ("step", "refresh"):
            if f"{step}_launches" not in r:
                continue
            shown = f"{name}, step with a refresh" if step == "refresh" else name
            launches, milliseconds = r[f"{step}_launches"], r[f"{step}_ms"]
            lines.append(
                f"| {shown} | {label} | {r['passes_launches']} + {launches} = **{r['passes_launches'] + launches}** "
                f"| {r['taps_operators']} + {r[f'{step}_operators']} "
                f"| {r['taps_ms']:.2f} + {milliseconds:.2f} = **{r['taps_ms'] + milliseconds:.2f}** | {r['adamw_ms']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(default: all)")
    parser.add_argument("--tree", type=Path, help="root of a checkout of another version, to compare with")
    parser.add_argument("--settings", type=json.loads, default={}, help="further arguments of the optimizer, as JSON")
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is shown (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for all numbers, launches and operators by name too")
    parser.add_argument("--child", choices=MODELS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        sys.path.insert(0, str(arguments.tree))
        print(json.dumps(measure(arguments.child, arguments.settings, arguments.repeats)))
        return
    trees = {"this": ROOT} | ({"other": arguments.tree.resolve()} if arguments.tree else {})
    results = {}
    for name in arguments.models:
        rounds: dict[str, list[dict[str, Any]]] = {label: [] for label in trees}
        for _ in range(arguments.rounds):
            for label, tree in trees.items():
                rounds[label].append(run_in_process(name, tree, arguments))
        for label, series in rounds.items():
            times = {key: statistics.median(r[key] for r in series) for key in series[0] if key.endswith("_ms")}
            results[name, label] = series[0] | times
        if arguments.json:
            arguments.json.write_text(json.dumps({f"{k}, {v}": r for (k, v), r in results.items()}, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
