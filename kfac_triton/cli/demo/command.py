"""`kfac-triton demo`: K-FAC against tuned Adam and SGD on the deep autoencoder; a table, a picture and JSON."""

import argparse
import json
import math
import platform
import textwrap
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from ... import __version__
from ..arguments import NO_FILE, at_least, picture_file, usable_device, writable_file
from ..output import progress, table
from .autoencoder import WIDTHS
from .digits import HELD_OUT, Images, MissingDataError, load_images
from .training import AUTO, CONTESTANTS, Result, compete, first_round, steps_to

HELP = "train a deep autoencoder with K-FAC, Adam and SGD and compare them"
DESCRIPTION = (
    "Train the 784-1000-500-250-30-250-500-1000-784 autoencoder with K-FAC (fixed settings), Adam and "
    "SGD (tuned learning rates) from the same weights on the same batches, and compare them."
)
# K-FAC takes a third of the steps of Adam and SGD, but at least so many, or all: the KL clip makes its first steps short.
_KFAC_STEPS = 100
_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `demo`."""
    shown = "(default: %(default)s)"
    kfac_steps = f"steps of Adam and SGD; K-FAC takes a third, or up to {_KFAC_STEPS} if that is more {shown}"
    parser.add_argument("--data", choices=("mnist", "curves"), default="mnist", help=f"digits, or drawn curves {shown}")
    parser.add_argument("--steps", type=at_least(4), default=300, help=kfac_steps)
    parser.add_argument("--auto", action="store_true", help='also K-FAC with lr="auto", as many steps as K-FAC')
    parser.add_argument("--train", type=at_least(1), default=4000, help=f"number of training images {shown}")
    parser.add_argument("--batch", type=at_least(1), default=1000, help=f"images per step {shown}")
    parser.add_argument("--seed", type=at_least(0), default=0, help=f"of weights, data, batches and label draws {shown}")
    parser.add_argument("--device", type=usable_device, default="cpu", help=f"cpu, cuda, cuda:1, ... {shown}")
    parser.add_argument("--output", type=picture_file, default="demo.png", help=f"picture, or {NO_FILE!r} {shown}")
    parser.add_argument("--json", type=writable_file(".json"), help="also write all results to this file")
    parser.add_argument("--quiet", action="store_true", help="print the results alone, without progress")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    if arguments.batch > arguments.train:
        parser.error(f"argument --batch: {arguments.batch} is more than --train {arguments.train}; lower it")
    try:
        images = load_images(arguments.data, arguments.train, arguments.seed, arguments.device)
    except (MissingDataError, ValueError) as error:
        parser.error(f"argument --data: {error}")

    results = _compete(images, arguments)
    targets = choose_targets(results)
    print(render(results, targets))
    if arguments.output is not None:
        from .pictures import draw

        shown = {"mnist": "MNIST digits", "curves": "drawn curves"}[arguments.data]
        title = f"Deep autoencoder on {arguments.train} {shown}, batch {arguments.batch}, seed {arguments.seed}"
        draw(results, images.held_out, title, arguments.output)
        print(f"Picture: {arguments.output}")
    if arguments.json is not None:
        # JSON has no NaN and no infinity: they become null.
        strict = json.loads(json.dumps(_as_json(arguments, results, targets)), parse_constant=lambda name: None)
        arguments.json.write_text(json.dumps(strict, indent=1) + "\n")
        print(f"All results: {arguments.json}")
    return 0


def _compete(images: Images, arguments: argparse.Namespace) -> list[Result]:
    """Run all contestants one after the other."""
    say = (lambda line: None) if arguments.quiet else partial(print, flush=True)
    say(f"Autoencoder {'-'.join(map(str, WIDTHS))}, {len(images.train)} training images, batch {arguments.batch}.")
    say("Same initial weights and batches for all; seconds are of training steps only.")
    results = []
    for name, contestant in CONTESTANTS.items():
        if name == AUTO and not arguments.auto:
            continue
        steps, rates = arguments.steps, contestant.rates
        if len(rates) > 1:
            tried = ", ".join(map(str, rates))
            say(f"{name}: learning rates {tried} for {first_round(steps)} steps each, the best two of them for {steps}.")
        else:
            steps = max(steps // 3, min(steps, _KFAC_STEPS))
            say(f"{name}: fixed settings, {steps} steps.")
        with progress(name, contestant.total_steps(steps), "step", arguments.quiet) as on_step:
            results.append(compete(name, images, arguments.batch, arguments.seed, steps, on_step))
    return results


def choose_targets(results: Sequence[Result]) -> dict[float, str]:
    """Target losses, lowest first, with their names: the final training losses of Adam and SGD, and round ones between."""
    ends = {result.run.losses[-1]: f"{result.name}'s final" for result in results if result.is_tuned}
    finals = {loss: name for loss, name in ends.items() if math.isfinite(loss)}
    between = round_numbers_between(min(finals), max(finals)) if finals else []
    return dict(sorted((finals | dict.fromkeys(between, "")).items()))


def round_numbers_between(low: float, high: float) -> list[float]:
    """At most four numbers strictly between two others: multiples of a 1, 2 or 5 times a power of ten."""
    if high <= low:
        return []
    power = 10.0 ** math.floor(math.log10(high - low))
    unit = next(factor * power for factor in (0.5, 1, 2, 5) if high - low <= 4 * factor * power)
    return [unit * multiple for multiple in range(math.floor(low / unit) + 1, math.ceil(high / unit))]


def render(results: Sequence[Result], targets: dict[float, str]) -> str:
    """The tables and the closing sentences."""
    overview = [["loss over all images", "steps", "ms / step", "training", "held out"]]
    for result in results:
        steps, seconds = len(result.run.losses), result.run.seconds[-1]
        losses = [_number(result.train_loss), _number(result.held_out_loss)]
        overview.append([result.name, str(steps), f"{1000 * seconds / steps:.1f}", *losses])
    reached = [["steps / seconds to an epoch's mean loss of", *(result.name for result in results)]]
    for target, name in targets.items():
        reached.append([f"{target:.1f} {name}".strip(), *(_reached(result, target) for result in results)])
    warnings = [
        f"Warning: {result.name}'s best learning rate {result.settings['lr']} is the {result.edge} of its grid: "
        "a better one may lie beyond."
        for result in results
        if result.edge is not None
    ]
    settings = _paragraphs(map(_settings, results))
    closing = _paragraphs([*warnings, *closing_sentences(results)])
    return "\n\n".join([settings, table(overview), table(reached), closing])


def _settings(result: Result) -> str:
    line = f"{result.name}: " + ", ".join(f"{name} {value}" for name, value in result.settings.items())
    trials = ", ".join(f"{lr}: {_number(loss)} at {steps}" for lr, (steps, loss) in result.trials.items())
    return f"{line} (best lr by train loss at step: {trials})" if result.is_tuned else f"{line} (fixed)"


def closing_sentences(results: Sequence[Result]) -> list[str]:
    """How far K-FAC, the first of the results, is ahead of each other one."""
    kfac, *others = results
    return [_compared(kfac, other) for other in others]


def _compared(kfac: Result, other: Result) -> str:
    ended = f"{_number(kfac.run.losses[-1])} after {len(kfac.run.losses)} steps"
    target = other.run.losses[-1]
    if other.name == AUTO:
        return (
            f'With lr="auto" K-FAC ended at a training loss of {_number(target)} after {len(other.run.losses)} steps, '
            f"with hand-tuned settings at {ended}."
        )
    theirs, ours = steps_to(other.run.losses, target), steps_to(kfac.run.losses, target)
    if theirs is None:
        return f"{other.name} diverged with every learning rate: nothing to compare."
    if ours is None:
        return f"K-FAC did not reach {other.name}'s final training loss of {target:.1f}: it stood at {ended}."
    our_seconds, their_seconds = kfac.run.seconds[ours - 1], other.run.seconds[theirs - 1]
    return (
        f"K-FAC reached {other.name}'s final training loss of {target:.1f} in {ours} steps instead of {theirs} "
        f"({theirs / ours:.1f} times fewer) and {our_seconds:.1f} s instead of {their_seconds:.1f} s "
        f"({our_seconds / their_seconds:.2f} of the time)."
    )


def _paragraphs(lines: Iterable[str]) -> str:
    return "\n".join(textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def _reached(result: Result, target: float) -> str:
    step = steps_to(result.run.losses, target)
    return "not reached" if step is None else f"{step} / {result.run.seconds[step - 1]:.1f} s"


def _number(loss: float) -> str:
    return f"{loss:.1f}" if math.isfinite(loss) else "diverged"


def _as_json(arguments: argparse.Namespace, results: Sequence[Result], targets: dict[float, str]) -> dict[str, Any]:
    device = arguments.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {key: getattr(arguments, key) for key in ("data", "seed", "steps", "train", "batch")} | {
        "held_out": HELD_OUT,
        "widths": WIDTHS,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "versions": {"kfac_triton": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "targets": [{"loss": loss, "name": name} for loss, name in targets.items()],
        "optimizers": {result.name: _result_as_json(result, targets) for result in results},
        "summary": closing_sentences(results),
    }


def _result_as_json(result: Result, targets: dict[float, str]) -> dict[str, Any]:
    run = result.run
    return {
        "settings": result.settings,
        "learning_rates": [{"lr": lr, "steps": n, "train_loss": loss} for lr, (n, loss) in result.trials.items()],
        "at_edge_of_grid": result.edge,
        "train_loss": result.train_loss,
        "held_out_loss": result.held_out_loss,
        "steps_to_target": [steps_to(run.losses, target) for target in targets],
        "losses": run.losses,
        "batch_losses": run.batch_losses,
        "seconds": run.seconds,
    }
