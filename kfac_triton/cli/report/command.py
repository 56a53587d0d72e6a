"""`kfac-triton report`: what a log of `append_log` says, as a table of the last entry and a picture of the run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...curvature.inverse import ACCEPT
from ...scalars import Log, is_texts, layer_label, read_log
from ..arguments import NO_FILE, picture_file
from ..output import table
from .picture import as_size, figure_of, last_memory, layer_names, numbers_of, panels_of, steps_of

HELP = "show what a log of diagnostics says: a table of the last entry, a picture of the run"
DESCRIPTION = (
    "Read a log that kfac_triton.scalars.append_log wrote, print its last entry, the layers with the worst "
    "signs first, and draw how loss, damping, condition, certificates and steps went."
)

NEARLY_GRADIENT = 0.99  # cosine from which on a step is that of gradient descent
_NAMED = 5  # layers that a line above the table names
# Values whose names begin so make one column: the sum of those in _COUNTED, the largest of the others.
_COLUMNS = ("trace_A", "trace_G", "condition", "pi", "damping_A", "damping_G", "residual", "cosine", "fallbacks", "dropped")
_COUNTED = {"dropped": 2, "fallbacks": 3}  # the rank of a count that is not zero, as `signs` has it
# Said in another form, or left to the picture. A key that is in neither list gets a column of its own.
_NO_COLUMN = {"size_A", "size_G", "norm_A", "norm_G", "raised_A", "raised_G", "updates", "refreshes"} | {
    *("gradient_norm", "update_norm", "product")
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("log", metavar="LOG", type=Path, help="file of JSON lines")
    output = f"picture, or {NO_FILE!r} (default: %(default)s)"
    picture = parser.add_mutually_exclusive_group()
    picture.add_argument("--output", type=picture_file, default="report.png", help=output)
    picture.add_argument("--last", dest="output", action="store_const", const=None, help="print the table alone, draw nothing")
    parser.add_argument("--layers", metavar="PATTERN", default="*", help="only layers of such names, for example 'encoder.*'")


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    log = _read(parser, arguments.log)
    entries = select_layers(log.entries, arguments.layers)
    if not layer_names(entries):
        known = ", ".join(layer_names(select_layers(log.entries, "*"))[:20])
        parser.error(f"argument --layers: {arguments.layers!r} matches no layer of the log; it has {known}")

    print(render(entries, arguments.log.name))
    if log.unfinished is not None:
        print(f"Note: line {log.unfinished}, the last, is half-written and left out; the run was killed, or is writing it.")
    if arguments.output is not None and not (panels_of(entries) or last_memory(entries)):
        print("Note: the log has nothing to draw over steps; there is no picture.")
    elif arguments.output is not None:
        figure_of(entries, arguments.log.name).savefig(arguments.output, format="png", dpi=110)
        print(f"Picture: {arguments.output}")
    return 0


def _read(parser: argparse.ArgumentParser, path: Path) -> Log:
    """The log, or the end of the command with a message."""
    where = f"argument LOG: {str(path)!r}"
    try:
        log = read_log(path)
    except OSError as error:
        parser.error(f"{where} cannot be read ({error.strerror}); give a file that kfac_triton.scalars.append_log wrote")
    except ValueError as error:
        parser.error(f"{where}: {error}")
    if not log.entries:
        state = "is empty" if log.unfinished is None else "has no complete line"
        parser.error(f"{where} {state}; let the training log a step first")
    if not layer_names(select_layers(log.entries, "*")):
        parser.error(f"{where} has no layers; pass optimizer.diagnostics() to append_log")
    return log


def select_layers(entries: Sequence[Mapping[str, Any]], pattern: str) -> list[dict[str, Any]]:
    """The entries with only the layers whose names fit a pattern of the shell's kind."""
    chosen = []
    for entry in entries:
        layers = entry.get("layers")
        labeled = {layer_label(name): layer for name, layer in layers.items()} if isinstance(layers, dict) else {}
        fitting = {name: layer for name, layer in labeled.items() if isinstance(layer, dict) and fnmatchcase(name, pattern)}
        chosen.append({**entry, "layers": fitting})
    return chosen


def render(entries: Sequence[Mapping[str, Any]], name: str) -> str:
    """The last entry that has layers, as text: a table with the worst layers first, and below it what is wrong with them."""
    number = max(number for number, entry in enumerate(entries, start=1) if entry["layers"])
    entry = entries[number - 1]
    head = [f"{name}: step {steps_of(entries)[number - 1]:g}, entry {number} of {len(entries)}"]
    head.append(_listed({key: value for key, value in entry.items() if key not in ("step", "steps")}))
    head += [_group(key, value) for key, value in entry.items() if key != "layers"]

    found = {layer: signs(values) for layer, values in entry["layers"].items()}
    order = sorted(found, key=lambda layer: (min(found[layer], default=(math.inf,))[0], -len(found[layer])))
    columns = columns_of([entry["layers"][layer] for layer in order])
    cells = zip(order, *(map(_short, values) for values in columns.values()), strict=True)
    flagged = [f"  {layer}: {'; '.join(text for _, text in found[layer])}" for layer in order if found[layer]]
    verdict = f"Layers with a bad sign: {len(flagged)} of {len(found)}." if flagged else "No layer has a bad sign."
    return "\n".join([*filter(None, head), "", table([("layer", *columns), *cells]), "", verdict, *flagged])


def signs(layer: Mapping[str, Any]) -> list[tuple[int, str]]:
    """What is wrong with a layer, as far as its numbers tell: (rank, words), the worst of rank 0 first."""
    numbers = numbers_of(layer)
    if numbers.get("updates") == 0:
        return [(2, "no statistics yet")]
    broken = ", ".join(key for key, value in numbers.items() if not math.isfinite(value))
    found = [(0, f"{broken} not finite")] if broken else []
    if numbers.get("cosine", 0) < 0:
        found.append((1, "update points uphill"))
    if numbers.get("gradient_norm") == 0:
        found.append((3, "gradient is zero"))
    for key, value in numbers.items():
        kind = key.partition("_")[0]
        if kind == "residual" and ACCEPT < value < math.inf:
            found.append((1, f"{key} above {ACCEPT:g}"))
        elif kind == "raised" and value:
            found.append((2, f"damping_{key[-1]} raised tenfold, {value:g} times"))
        elif kind in _COUNTED and value:
            found.append((_COUNTED[kind], f"{key.replace('_', ' ')}: {value:g}"))
    return sorted(found + _strength(numbers), key=lambda sign: sign[0])


def _strength(numbers: Mapping[str, float]) -> list[tuple[int, str]]:
    """Whether damping leaves something of the curvature. The largest eigenvalue is at most the trace; sizes are not logged."""
    found = [(3, f"trace_{side} is zero") for side in "AG" if numbers.get(f"trace_{side}") == 0]
    # A condition of exactly 1 belongs to an input that is constant: there, A has nothing to damp.
    constant = "A" if numbers.get("condition_A") == 1 else ""
    sides = [side for side in "AG" if numbers.get(f"trace_{side}") and side != constant]
    weak = [side for side in sides if numbers.get(f"damping_{side}", 0) > numbers[f"trace_{side}"]]
    if numbers.get("cosine", 0) > NEARLY_GRADIENT:
        found.append((4, f"close to gradient descent: cosine above {NEARLY_GRADIENT:g}"))
    elif weak and weak == sides:
        found.append((4, "close to gradient descent: damping exceeds the trace"))
    elif weak:
        found.append((4, f"damping_{weak[0]} exceeds trace_{weak[0]}"))
    return found


def columns_of(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    """Title -> the value of each layer, for all columns that some layer has a value for."""
    rows = [numbers_of(layer) for layer in layers]
    groups: dict[str, list[str]] = {title: [] for title in _COLUMNS}
    for key in dict.fromkeys(key for row in rows for key in row if key not in _NO_COLUMN):
        groups.setdefault(next(filter(key.startswith, _COLUMNS), key), []).append(key)
    columns: dict[str, list[float | None]] = {}
    for title, keys in groups.items():
        if keys:
            merge = sum if title in _COUNTED else max
            values = [[row[key] for key in keys if key in row] for row in rows]
            columns[title.replace("_", " ") if title in _COLUMNS else title] = [merge(v) if v else None for v in values]
    return columns


def _group(key: str, value: Any) -> str:
    """A line for a list or a dict beside the layers; empty for anything else."""
    if not isinstance(value, (list, dict)) or not value:
        return ""
    if isinstance(value, list) or is_texts(value):
        reasons = value if isinstance(value, dict) else {}
        named = [layer_label(str(name)) + (f" ({reasons[name]})" if name in reasons else "") for name in value]
        more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return f"{key.replace('_', ' ')}: {len(named)}: {', '.join(named[:_NAMED])}{more}"
    if key == "memory":
        sizes = numbers_of(value)
        kinds = ", ".join(f"{kind} {as_size(size)}" for kind, size in sizes.items() if size)
        return f"memory: {as_size(sum(sizes.values()))} ({kinds})"
    listed = _listed(value)
    return listed and f"{key}: {listed}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_short(number)}" for name, number in numbers_of(values).items())


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.3g}"
