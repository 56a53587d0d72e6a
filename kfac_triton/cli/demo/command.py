"""`kfac-triton demo`: K-FAC against tuned Adam and SGD on the deep autoencoder; a table, a picture and JSON."""

import argparse
import importlib.util
import json
import math
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ... import __version__
from ..arguments import NO_FILE, at_least, usable_device, writable_file
from .autoencoder import WIDTHS
from .digits import HELD_OUT, MNIST_TRAIN, MissingDataError, load_images
from .training import AUTO, FIRST_ORDER, AutoSettings, KFACSettings, OnStep, Race, Result, steps_to


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the subcommand `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="train a deep autoencoder with K-FAC, Adam and SGD and compare them",
        description="Train the 784-1000-500-250-30-250-500-1000-784 autoencoder with K-FAC (fixed settings), Adam and "
        "SGD (tuned learning rates) from the same weights on the same batches, and compare them.",
    )
    shown = "(default: %(default)s)"
    parser.add_argument("--data", choices=("mnist", "curves"), default="mnist", help=f"digits, or drawn curves {shown}")
    parser.add_argument("--steps", type=at_least(4), default=300, help=f"steps of Adam and SGD; K-FAC takes a third {shown}")
    parser.add_argument("--auto", action="store_true", help='also K-FAC with lr="auto", as many steps as K-FAC')
    parser.add_argument("--train", type=at_least(1), default=4000, help=f"number of training images {shown}")
    parser.add_argument("--batch", type=at_least(1), default=1000, help=f"images per step {shown}")
    parser.add_argument("--seed", type=at_least(0), default=0, help=f"of weights, data split and batch order {shown}")
    parser.add_argument("--device", type=usable_device, default="cpu", help=f"cpu, cuda, cuda:1, ... {shown}")
    parser.add_argument("--output", type=writable_file(".png"), default="demo.png", help=f"picture, or {NO_FILE!r} {shown}")
    parser.add_argument("--json", type=writable_file(".json"), help="also write all results to this file")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    if arguments.batch > arguments.train:
        parser.error(f"argument --batch: {arguments.batch} is more than --train {arguments.train}; lower it")
    if arguments.data == "mnist" and arguments.train > MNIST_TRAIN:
        parser.error(f"argument --train: {arguments.train} is more than the {MNIST_TRAIN} digits there are; lower it")
    if arguments.output is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "argument --output: the picture needs matplotlib, which is not installed; "
            f'run: pip install "kfac-triton[demo]", or give --output {NO_FILE}'
        )
    try:
        images = load_images(arguments.data, arguments.train, arguments.seed).to(arguments.device)
    except MissingDataError as error:
        parser.error(f"argument --data: {error}")

    results = _compete(Race(images, arguments.batch, arguments.seed), arguments)
    targets = choose_targets(results)
    print(render(results, targets))
    if arguments.output is not None:
        from .pictures import draw

        shown = {"mnist": "MNIST digits", "curves": "drawn curves"}[arguments.data]
        title = f"Deep autoencoder on {arguments.train} {shown}, batch {arguments.batch}, seed {arguments.seed}"
        draw(results, images.held_out, title, arguments.output)
        print(f"Picture: {arguments.output}")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_as_json(arguments, results, targets), indent=1, allow_nan=False) + "\n")
        print(f"All results: {arguments.json}")
    return 0


def _compete(race: Race, arguments: argparse.Namespace) -> list[Result]:
    """Run K-FAC, for a third of the steps, then Adam and SGD."""
    steps, quiet = arguments.steps, arguments.quiet

    def say(line: str) -> None:
        if not quiet:
            print(line, flush=True)

    kfac_steps, first_round = max(1, steps // 3), max(1, steps // 4)
    say(f"Autoencoder {'-'.join(map(str, WIDTHS))}, {len(race.images.train)} training images, batch {race.batch}.")
    say("Same initial weights and batches for all; seconds are of training steps only.")
    say(f"K-FAC: fixed settings, {kfac_steps} steps.")
    with _progress("K-FAC", kfac_steps, quiet) as on_step:
        results = [race.run_kfac(KFACSettings(), kfac_steps, on_step)]
    for name, (_, grid) in FIRST_ORDER.items():
        rates = ", ".join(f"{lr:g}" for lr in grid)
        say(f"{name}: learning rates {rates} for {first_round} steps each, the best two of them for {steps}.")
        total = len(grid) * first_round + 2 * (steps - first_round)
        with _progress(name, total, quiet) as on_step:
            results.append(race.run_first_order(name, steps, on_step))
    if arguments.auto:
        say(f"{AUTO}: no learning rate, {kfac_steps} steps; each evaluates the model up to five times.")
        with _progress(AUTO, kfac_steps, quiet) as on_step:
            results.append(race.run_auto(AutoSettings(), kfac_steps, on_step))
    return results


def choose_targets(results: Sequence[Result]) -> dict[float, str]:
    """Target losses, lowest first, with their names: the final training losses of Adam and SGD, and round ones between."""
    finals = {result.run.losses[-1]: f"{result.name}'s final" for result in results if result.tuning is not None}
    finals = {loss: name for loss, name in finals.items() if math.isfinite(loss)}
    between = round_numbers_between(min(finals), max(finals)) if finals else []
    return dict(sorted((finals | dict.fromkeys(between, "")).items()))


def round_numbers_between(low: float, high: float, at_most: int = 4) -> list[float]:
    """Multiples of a 1, 2 or 5 times a power of ten strictly between two numbers, as many as fit into `at_most`."""
    if high <= low:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / 10))
    for unit in (factor * power * scale for scale in (1, 10, 100) for factor in (1, 2, 5)):
        first, last = math.floor(low / unit) + 1, math.ceil(high / unit) - 1
        if last - first + 1 <= at_most:
            return [unit * multiple for multiple in range(first, last + 1)]
    return []


def render(results: Sequence[Result], targets: dict[float, str]) -> str:
    """The tables and the closing sentences."""
    overview = [["", "steps", "ms / step", "train loss", "held-out loss"]]
    reached = [["steps / seconds to loss", *(f"{target:.1f} {name}".strip() for target, name in targets.items())]]
    for result in results:
        steps, seconds = len(result.run.losses), result.run.seconds[-1]
        losses = [_number(result.train_loss), _number(result.held_out_loss)]
        overview.append([result.name, str(steps), f"{1000 * seconds / steps:.1f}", *losses])
        reached.append([result.name, *(_reached(result, target) for target in targets)])
    settings = "\n".join(map(_settings, results))
    closing = "\n".join([*_warnings(results), *closing_sentences(results)])
    return "\n\n".join([settings, _table(overview), _table(reached), closing])


def _settings(result: Result) -> str:
    line = f"{result.name}: " + ", ".join(f"{name} {value:g}" for name, value in result.settings.items())
    if result.tuning is None:
        return f"{line} (fixed)"
    trials = ", ".join(f"{lr:g}: {_number(loss)} at {steps}" for lr, (steps, loss) in result.tuning.trials.items())
    return f"{line} (best lr by train loss at step: {trials})"


def closing_sentences(results: Sequence[Result]) -> list[str]:
    """How far K-FAC, the first of the results, is ahead of each other one."""
    kfac, *others = results
    sentences = []
    for other in others:
        if other.name == AUTO:
            sentences.append(
                f'With lr="auto" K-FAC ended at a training loss of {_number(other.train_loss)} after '
                f"{len(other.run.losses)} steps, with hand-tuned settings at {_number(kfac.train_loss)} after "
                f"{len(kfac.run.losses)}."
            )
            continue
        target = other.run.losses[-1]
        theirs, ours = steps_to(other.run.losses, target), steps_to(kfac.run.losses, target)
        if theirs is None:
            sentences.append(f"{other.name} diverged with every learning rate: nothing to compare.")
        elif ours is None:
            sentences.append(
                f"K-FAC did not reach {other.name}'s final training loss of {target:.1f}: "
                f"it stood at {_number(kfac.run.losses[-1])} after {len(kfac.run.losses)} steps."
            )
        else:
            our_seconds, their_seconds = kfac.run.seconds[ours - 1], other.run.seconds[theirs - 1]
            sentences.append(
                f"K-FAC reached {other.name}'s final training loss of {target:.1f} in {ours} steps instead of {theirs} "
                f"({theirs / ours:.1f} times fewer) and {our_seconds:.1f} s instead of {their_seconds:.1f} s "
                f"({our_seconds / their_seconds:.2f} of the time)."
            )
    return sentences


def _warnings(results: Sequence[Result]) -> list[str]:
    return [
        f"Warning: {result.name}'s best learning rate {result.tuning.lr:g} is the {result.tuning.edge} of its grid: "
        "a better one may lie beyond."
        for result in results
        if result.tuning is not None and result.tuning.edge is not None
    ]


def _reached(result: Result, target: float) -> str:
    step = steps_to(result.run.losses, target)
    return "not reached" if step is None else f"{step} / {result.run.seconds[step - 1]:.1f} s"


def _number(loss: float) -> str:
    return f"{loss:.1f}" if math.isfinite(loss) else "diverged"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """RowSource of cells in aligned columns: text to the left, numbers to the right."""
    columns = []
    for cells in zip(*rows, strict=True):
        width = max(map(len, cells))
        is_text = not any(cell[:1].isdigit() for cell in cells[1:])
        columns.append([cell.ljust(width) if is_text else cell.rjust(width) for cell in cells])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns, strict=True))


def _as_json(arguments: argparse.Namespace, results: Sequence[Result], targets: dict[float, str]) -> dict[str, Any]:
    """All results; losses that are not finite become null."""
    device = arguments.device
    return {
        "data": arguments.data,
        "seed": arguments.seed,
        "steps": arguments.steps,
        "train": arguments.train,
        "held_out": HELD_OUT,
        "batch": arguments.batch,
        "widths": WIDTHS,
        "device": str(device),
        "device_name": _device_name(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "kfac_triton": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "targets": [{"loss": loss, "name": name} for loss, name in targets.items()],
        "optimizers": {result.name: _result_as_json(result, targets) for result in results},
        "summary": closing_sentences(results),
    }


def _result_as_json(result: Result, targets: dict[float, str]) -> dict[str, Any]:
    def finite(loss: float) -> float | None:
        return loss if math.isfinite(loss) else None

    run, tuning = result.run, result.tuning
    trials = tuning.trials.items() if tuning is not None else ()
    return {
        "settings": result.settings,
        "learning_rates": [{"lr": lr, "steps": steps, "train_loss": finite(loss)} for lr, (steps, loss) in trials],
        "at_edge_of_grid": tuning.edge if tuning is not None else None,
        "train_loss": finite(result.train_loss),
        "held_out_loss": finite(result.held_out_loss),
        "steps_to_target": [steps_to(run.losses, target) for target in targets],
        "losses": [finite(loss) for loss in run.losses],
        "batch_losses": [finite(loss) for loss in run.batch_losses],
        "seconds": run.seconds,
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()


@contextmanager
def _progress(title: str, total: int, quiet: bool) -> Iterator[OnStep]:
    """A progress bar that the yielded function moves by a step; none if quiet or without tqdm."""
    try:
        from tqdm import tqdm
    except ImportError:
        quiet = True
    if quiet:
        yield lambda loss: None
        return
    with tqdm(total=total, desc=title, unit="step") as bar:

        def on_step(loss: float) -> None:
            bar.set_postfix_str(f"loss {loss:.1f}", refresh=False)
            bar.update()

        yield on_step
