"""What `diagnostics()` returns, for loggers: flat numbers for TensorBoard and W&B, lines of JSON for `kfac-triton report`."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from torch import Tensor

NON_FINITE = "non_finite"  # key of a line: "inf", "-inf" or "nan" -> the paths of the nulls that stand for it
_REMOVE = "remove the line, or give a file that append_log wrote"


def scalars(diagnostics: Mapping[str, Any]) -> dict[str, float]:
    """Flat numbers by slash-separated names, for a loop of `SummaryWriter.add_scalar` or for `wandb.log` as it is.

    Args:
        diagnostics: what `diagnostics()` returned, or any nested dict.

    Returns:
        Name -> value, such as "layers/encoder.0/trace_A". A list becomes its length, and so does a dict of texts alone, which
        tells for "skipped" and "without_statistics" how many there are; other texts are left out. Values that are not finite
        stay. The model itself, when it is a layer, is called "root".

    Raises:
        TypeError: if diagnostics is no dict.
    """
    _require_dict(diagnostics)
    return dict(_flat(diagnostics, ()))


def _require_dict(diagnostics: object) -> None:
    if not isinstance(diagnostics, Mapping):
        raise TypeError(f"diagnostics must be a dict, but is {type(diagnostics).__name__}; pass optimizer.diagnostics()")


def _flat(node: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        here = (*path, layer_label(str(key)))
        number = as_number(value)
        if number is not None:
            yield "/".join(here), number
        elif isinstance(value, (list, tuple, set, frozenset)) or is_texts(value):
            yield "/".join(here), float(len(value))
        elif isinstance(value, Mapping):
            yield from _flat(value, here)


def as_number(value: Any) -> float | None:
    """A number, or a tensor of one, as a float; None for anything else."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, Real) else None


def is_texts(value: Any) -> bool:
    """Whether this is a dict with texts for values, or empty."""
    return isinstance(value, Mapping) and all(isinstance(text, str) for text in value.values())


def layer_label(name: str) -> str:
    """How a module is called: its name, but "root" for the model itself, whose name is empty."""
    return name or "root"


def append_log(path: str | os.PathLike[str], diagnostics: Mapping[str, Any], /, **extra: Any) -> None:
    """Appends one line of strict JSON to a log that `kfac-triton report` reads; from one process only.

    A number that is not finite becomes null, and "non_finite" keeps which it was. A half-written last line, left by a run that
    was killed, is removed. A line has some hundred bytes a layer; a long run may log every tenth step.

    Args:
        path: file to append to; made if it does not exist.
        diagnostics: what `diagnostics()` returned.
        extra: more values for this line, such as loss=..., step=...; tensors of one number are welcome.

    Raises:
        FileNotFoundError: if the folder of the file does not exist.
        TypeError: if diagnostics is no dict, or a value is not plain: numbers, texts, lists and dicts.
        ValueError: if an extra value has the name of one of the diagnostics.
    """
    _require_dict(diagnostics)
    taken = sorted(name for name in extra if name in diagnostics or name == NON_FINITE)
    if taken:
        raise ValueError(f"extra: {', '.join(map(repr, taken))} would replace a value of the diagnostics; choose another name")
    file = Path(path)
    if not file.absolute().parent.is_dir():
        raise FileNotFoundError(f"path: the folder of {str(path)!r} does not exist; create it first")
    lost: dict[str, list[list[str | int]]] = {}
    line = _strict({**extra, **diagnostics}, [], lost)
    if lost:
        line[NON_FINITE] = lost
    text = json.dumps(line, allow_nan=False)
    _mend(file)
    with file.open("a", encoding="utf-8") as log:
        log.write(text + "\n")


def _strict(value: Any, path: list[str | int], lost: dict[str, list[list[str | int]]]) -> Any:
    """The value as JSON has it; paths to numbers that are not finite are added to `lost`."""
    if isinstance(value, Mapping):
        return {str(key): _strict(item, [*path, str(key)], lost) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item, [*path, index], lost) for index, item in enumerate(value)]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        if math.isfinite(value):
            return float(value)
        lost.setdefault(str(float(value)), []).append(path)
        return None
    name = "/".join(map(str, path))
    kind = f"a tensor of {value.numel()} numbers" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
    raise TypeError(f"{name} is {kind}, which cannot be logged; give a number, a text, or lists and dicts of them")


def _mend(file: Path) -> None:
    """Ends an unfinished last line: a new one would continue it."""
    if not file.exists() or file.stat().st_size == 0:
        return
    with file.open("r+b") as log:
        log.seek(-1, os.SEEK_END)
        if log.read() == b"\n":
            return
        log.seek(0)
        content = log.read()
        start = content.rfind(b"\n") + 1
        if _half_written(content[start:]):
            log.truncate(start)
        else:
            log.write(b"\n")


def _half_written(line: bytes) -> bool:
    """Whether the line begins as an entry does, but is none."""
    if not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    return False


@dataclass(frozen=True)
class Log:
    """What a log file holds.

    Attributes:
        entries: the lines, numbers that are not finite put back.
        unfinished: number of the last line if it was half-written and left out.
    """

    entries: list[dict[str, Any]]
    unfinished: int | None = None


def read_log(path: str | os.PathLike[str]) -> Log:
    """Reads what `append_log` wrote; empty lines do not count.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line, other than a half-written last one, is no JSON object.
    """
    entries: list[dict[str, Any]] = []
    *lines, rest = Path(path).read_bytes().split(b"\n")  # a whole last line leaves an empty rest
    for number, line in enumerate([*lines, rest], start=1):
        if not line.strip():
            continue
        if number > len(lines) and _half_written(line):
            return Log(entries, number)
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON ({error}); {_REMOVE}") from error
        if not isinstance(entry, dict):
            raise ValueError(f"line {number} is not a JSON object; {_REMOVE}")
        try:
            _put_back(entry)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"line {number}: {NON_FINITE!r} names values that the line does not have; {_REMOVE}") from error
        entries.append(entry)
    return Log(entries)


def _put_back(entry: dict[str, Any]) -> None:
    """Undo what `_strict` did to the numbers that were not finite."""
    for value, paths in entry.pop(NON_FINITE, {}).items():
        for *outer, last in paths:
            node: Any = entry
            for key in outer:
                node = node[key]
            node[last] = float(value)
