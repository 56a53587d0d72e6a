"""The findings of several runs as one list: a later run's take the place of earlier ones about the same thing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .findings import Line, read

_GROUPED = ("train", "profile")  # parts with several lines about a subject
_ANNOTATION = "Optimizer."  # a range that the profiler sets over kernels, whose time is theirs and counts once


def merge(files: Sequence[Path]) -> list[Line]:
    """All findings, each with the name of its run, in the order in which they were made first.

    A training problem and a profile are replaced as a whole, for their lines belong together; anything else line by line,
    within a file too.
    """
    merged: dict[tuple[str, str], list[Line]] = {}
    for name, file in zip(run_names(files), files, strict=True):
        found: dict[tuple[str, str], list[Line]] = {}
        for line in _with_subjects(read(file)):
            lines = found.setdefault((line["part"], line["subject"]), [])
            if line["part"] not in _GROUPED:
                lines.clear()
            lines.append({"run": name, **line})
        merged |= found
    return [line for lines in merged.values() for line in lines]


def run_names(files: Sequence[Path]) -> list[str]:
    """The folders' names, numbered where two are the same."""
    names = [file.resolve().parent.name for file in files]
    return [name if names.count(name) == 1 else f"{name} {number}" for number, name in enumerate(names, 1)]


def _with_subjects(lines: list[Line]) -> list[Line]:
    """What each line is about; kernels of a profile stand below the line of their model."""
    result, model = [], ""
    for line in lines:
        subject = line["what"]
        if line["part"] == "train":
            subject = subject.partition(":")[0]
        elif line["part"] == "profile":
            model = line.get("model", model) if subject.startswith(" ") else subject
            subject = model
        result.append({**line, "subject": subject})
    return result


def without_annotations(profile: list[Line]) -> list[Line]:
    """A profile without the lines that are no kernels, and without their time in the sum and in the shares."""
    kept = [line for line in profile if not line["what"].strip().startswith(_ANNOTATION)]
    extra = sum(line["ms"] for line in profile if line not in kept)
    busy = next((line["busy_ms"] for line in kept if "busy_ms" in line), 0.0) - extra
    cleaned = []
    for line in kept:
        if "busy_ms" in line:
            line = line | {"busy_ms": busy}
        elif "ms" in line and busy > 0:
            line = line | {"share": f"{line['ms'] / busy:.0%}"}
        cleaned.append(line)
    return cleaned
