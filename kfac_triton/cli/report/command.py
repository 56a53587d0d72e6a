"""`kfac-triton report`: what a log of `append_log` says, as a table of the last entry and a picture of the run."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ...curvature.inverse import ACCEPT
from ...scalars import Log, as_number, is_texts, layer_label, read_log
from ..arguments import NO_FILE, writable_file
from .picture import as_size, draw, last_memory, layer_names, panels_of, steps_of

Layer = Mapping[str, Any]

NEARLY_GRADIENT = 0.99  # cosine from which on a step is that of gradient descent
_SIDES = ("A", "G")
_NAMED = 5  # layers that a line below the table names
# In the table in another form, or left to the picture; keys that are not known get a column of their own.
_NO_COLUMN = (
    "size_A",
    "size_G",
    "norm_A",
    "norm_G",
    "raised_A",
    "raised_G",
    "updates",
    "refreshes",
    "gradient_norm",
    "update_norm",
    "product",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the subcommand `report`."""
    parser = subparsers.add_parser(
        "report",
        help="show what a log of diagnostics says: a table of the last entry, a picture of the run",
        description="Read a log that kfac_triton.scalars.append_log wrote, print its last entry, the layers with the worst "
        "signs first, and draw how loss, damping, condition, certificates and steps went.",
    )
    parser.add_argument("log", metavar="LOG", type=Path, help="file of JSON lines")
    picture = writable_file(".png")
    output = f"picture, or {NO_FILE!r} (default: %(default)s)"
    parser.add_argument("--output", type=picture, default="report.png", help=output)
    parser.add_argument("--layers", metavar="PATTERN", default="*", help="only layers of such names, for example 'encoder.*'")
    parser.add_argument("--last", action="store_true", help="print the table alone, draw nothing")
    parser.set_defaults(run=lambda arguments: _run(parser, arguments))


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    drawing = arguments.output is not None and not arguments.last
    if drawing and importlib.util.find_spec("matplotlib") is None:
        parser.error(
            "argument --output: the picture needs matplotlib, which is not installed; "
            f'run: pip install "kfac-triton[demo]", or give --output {NO_FILE}'
        )
    log = _read(parser, arguments.log)
    entries = select_layers(log.entries, arguments.layers)
    if not layer_names(entries):
        known = ", ".join(layer_names(select_layers(log.entries, "*"))[:20])
        parser.error(f"argument --layers: {arguments.layers!r} matches no layer of the log; it has {known}")

    print(render(entries, arguments.log.name))
    if log.unfinished is not None:
        print(f"Note: line {log.unfinished}, the last, is half-written and left out; the run was killed, or is writing it.")
    if drawing and not (panels_of(entries) or last_memory(entries)):
        print("Note: the log has nothing to draw over steps; there is no picture.")
    elif drawing:
        steps = steps_of(entries)
        draw(entries, f"{arguments.log.name}, steps {min(steps):g} to {max(steps):g}", arguments.output)
        print(f"Picture: {arguments.output}")
    return 0


def _read(parser: argparse.ArgumentParser, path: Path) -> Log:
    """The log, or the end of the command with a message."""
    hint = "give a file that kfac_triton.scalars.append_log wrote"
    try:
        log = read_log(path)
    except FileNotFoundError:
        parser.error(f"argument LOG: {str(path)!r} does not exist; {hint}")
    except OSError as error:
        parser.error(f"argument LOG: {str(path)!r} cannot be read ({error.strerror}); {hint}")
    except ValueError as error:
        parser.error(f"argument LOG: {str(path)!r}: {error}")
    if not log.entries:
        state = "is empty" if log.unfinished is None else "has no whole line"
        parser.error(f"argument LOG: {str(path)!r} {state}; let the training log a step first")
    if not layer_names(select_layers(log.entries, "*")):
        parser.error(f"argument LOG: {str(path)!r} has no layers; pass optimizer.diagnostics() to append_log")
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
    """The last entry that has layers, as text."""
    number = max(number for number, entry in enumerate(entries, start=1) if entry["layers"])
    entry = entries[number - 1]
    head = [f"{name}: step {steps_of(entries)[number - 1]:g}, entry {number} of {len(entries)}"]
    numbers = {key: as_number(value) for key, value in entry.items() if key not in ("step", "steps")}
    head.append(", ".join(f"{key} {_short(value)}" for key, value in numbers.items() if value is not None))
    for key, value in entry.items():
        if key != "layers":
            head.extend(_group(key, value))

    found = {layer: signs(values) for layer, values in entry["layers"].items()}
    rank = {layer: min((sign[0] for sign in these), default=math.inf) for layer, these in found.items()}
    order = sorted(entry["layers"], key=lambda layer: (rank[layer], -len(found[layer])))
    flagged = sum(bool(these) for these in found.values())
    columns = columns_of(list(entry["layers"].values()))
    rows = [["layer", *columns, "signs"]]
    for layer in order:
        cells = [_short(column(entry["layers"][layer])) for column in columns.values()]
        rows.append([layer, *cells, "; ".join(text for _, text in found[layer])])
    verdict = f"Layers with a bad sign: {flagged} of {len(found)}." if flagged else "No layer has a bad sign."
    return "\n".join([*filter(None, head), "", _table(rows), "", verdict])


def signs(layer: Layer) -> list[tuple[int, str]]:
    """What is wrong with a layer, as far as its numbers tell: (rank, words), the worst of rank 0 first."""
    numbers = _numbers(layer)
    if numbers.get("updates") == 0:
        return [(2, "no statistics yet")]
    found = []
    broken = [key for key, value in numbers.items() if not math.isfinite(value)]
    if broken:
        found.append((0, f"{', '.join(broken)} not finite"))
    found += [
        (1, f"{key} above {ACCEPT:g}")
        for key, value in numbers.items()
        if key.startswith("residual") and ACCEPT < value < math.inf
    ]
    cosine = numbers.get("cosine", math.nan)
    if cosine < 0:
        found.append((1, "update points uphill"))
    for key, value in numbers.items():
        words = key.replace("_", " ")
        if key.startswith("dropped") and value:
            found.append((2, f"{words}: {value:g}"))
        elif key.startswith("raised") and value:
            found.append((2, f"damping_{key[-1]} raised tenfold, {value:g} times"))
        elif key.startswith("fallbacks") and value:
            found.append((3, f"{words}: {value:g}"))
    if numbers.get("gradient_norm") == 0:
        found.append((3, "gradient is zero"))
    return sorted(found + _strength(numbers, cosine), key=lambda sign: sign[0])


def _strength(numbers: Mapping[str, float], cosine: float) -> list[tuple[int, str]]:
    """Whether damping leaves something of the curvature. The largest eigenvalue is at most the trace; sizes are not logged."""
    found = [(3, f"trace_{side} is zero") for side in _SIDES if numbers.get(f"trace_{side}") == 0]
    # A condition of exactly 1 belongs to an input that is constant: there, A has nothing to damp.
    constant = {"A"} if numbers.get("condition_A") == 1 else set()
    sides = [side for side in _SIDES if numbers.get(f"trace_{side}") and side not in constant]
    weak = [side for side in sides if numbers.get(f"damping_{side}", 0) > numbers[f"trace_{side}"]]
    if (weak and len(weak) == len(sides)) or cosine > NEARLY_GRADIENT:
        reason = f"cosine above {NEARLY_GRADIENT:g}" if cosine > NEARLY_GRADIENT else "damping exceeds the trace"
        found.append((4, f"close to gradient descent: {reason}"))
    elif weak:
        found.append((4, f"damping_{weak[0]} exceeds trace_{weak[0]}"))
    return found


def columns_of(layers: Sequence[Layer]) -> dict[str, Callable[[Layer], float | None]]:
    """Title -> value of a layer, for all columns that some layer has a value for."""
    columns: dict[str, Callable[[Layer], float | None]] = {
        "trace A": _key("trace_A"),
        "trace G": _key("trace_G"),
        "condition": _merged("condition", max),
        "pi": _key("pi"),
        "damping A": _key("damping_A"),
        "damping G": _key("damping_G"),
        "residual": _merged("residual", max),
        "cosine": _key("cosine"),
        "fallbacks": _merged("fallbacks", sum),
        "dropped": _merged("dropped", sum),
    }
    shown = {"trace_A", "trace_G", "pi", "damping_A", "damping_G", "cosine", *_NO_COLUMN}
    merged = ("condition", "residual", "fallbacks", "dropped")
    unknown = dict.fromkeys(key for layer in layers for key in _numbers(layer) if key not in shown)
    columns |= {key: _key(key) for key in unknown if not key.startswith(merged)}
    return {title: column for title, column in columns.items() if any(column(layer) is not None for layer in layers)}


def _key(key: str) -> Callable[[Layer], float | None]:
    return lambda layer: as_number(layer.get(key))


def _merged(prefix: str, merge: Callable[[list[float]], float]) -> Callable[[Layer], float | None]:
    """Of all values whose names begin so, the worst or the sum."""

    def value(layer: Layer) -> float | None:
        values = [number for key, number in _numbers(layer).items() if key.startswith(prefix)]
        return merge(values) if values else None

    return value


def _numbers(layer: Layer) -> dict[str, float]:
    numbers = {key: as_number(value) for key, value in layer.items()}
    return {key: value for key, value in numbers.items() if value is not None}


def _group(key: str, value: Any) -> list[str]:
    """A line for a list or a dict beside the layers, or none if it is empty."""
    if not isinstance(value, (list, dict)) or not value:
        return []
    if isinstance(value, list) or is_texts(value):
        reasons = value if isinstance(value, dict) else {}
        named = [layer_label(str(name)) + (f" ({reasons[name]})" if name in reasons else "") for name in value]
        more = f", and {len(named) - _NAMED} more" if len(named) > _NAMED else ""
        return [f"{key.replace('_', ' ')}: {len(named)}: {', '.join(named[:_NAMED])}{more}"]
    numbers = _numbers(value)
    if not numbers:
        return []
    if key == "memory":
        kinds = ", ".join(f"{kind} {as_size(size)}" for kind, size in numbers.items() if size)
        return [f"memory: {as_size(sum(numbers.values()))} ({kinds})"]
    return [f"{key}: " + ", ".join(f"{name} {_short(number)}" for name, number in numbers.items())]


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.3g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """RowSource of cells in aligned columns: the first and the last hold text, the others numbers."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    lines = []
    for first, *cells, last in rows:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers, last]).rstrip())
    return "\n".join(lines)
