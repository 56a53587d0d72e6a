"""How far the runs are."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """One bar over all steps of the race, and a line for every finished run; nothing if quiet, no bar without tqdm."""

    def __init__(self, total: int, quiet: bool):
        self.quiet = quiet
        self._bar: Any = None
        if not quiet:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, unit="step", smoothing=0.05)

    def start(self, title: str) -> None:
        """Name the run that begins."""
        if self._bar is not None:
            self._bar.set_description_str(title)

    def step(self, count: int = 1) -> None:
        """Steps are done."""
        if self._bar is not None:
            self._bar.update(count)

    def skip(self, steps: int) -> None:
        """Steps that need not be done: found in the log, or given up by a diverged run."""
        if self._bar is not None:
            self._bar.total -= steps
            self._bar.refresh()

    def say(self, line: str) -> None:
        """Print a line above the bar; standard output is for results alone."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        elif not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress_over(total: int, quiet: bool) -> Iterator[Progress]:
    """A progress that is closed at the end, whatever happens."""
    progress = Progress(total, quiet)
    try:
        yield progress
    finally:
        progress.close()
