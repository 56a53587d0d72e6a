"""The race's log: one JSON file with every finished run, written at once, so that a race goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

import kfac_triton

from . import peers
from .optimizers import KEYS, OURS, Config
from .problems import Problem
from .training import Run

FORMAT = 2


class LogError(ValueError):
    """The file is no log of the race."""


class Log:
    """Finished runs, and what was spent on tuning.

    Args:
        path: JSON file, made with the first run; None keeps everything in memory.
        rerun: Optimizers whose runs in the file are not used, but replaced.

    Raises:
        LogError: if the file is there and cannot be read as a log.
    """

    def __init__(self, path: Path | None, rerun: Collection[str] = ()):
        self.path = path
        self.runs: list[Run] = []
        self.tuning: dict[str, dict[str, Any]] = {}
        self._stale: set[str] = set()
        if path is not None and path.exists():
            self._read(path)
        self._stale = {_key(run) for run in self.runs if run.optimizer in rerun}

    def find(
        self, problem: Problem, optimizer: str, config: Config, seed: int, horizon: int, device: torch.device
    ) -> Run | None:
        """The run of this kind, on this device with as many threads; None if it has yet to be made."""
        threads = torch.get_num_threads()
        wanted = _key(Run(problem.name, problem.version, optimizer, config, seed, horizon, str(device), threads))
        if wanted in self._stale:
            return None
        return next((run for run in self.runs if _key(run) == wanted), None)

    def add(self, run: Run) -> None:
        """Keep a run, in the place of an older one of its kind, and write the file."""
        key = _key(run)
        self.runs = [old for old in self.runs if _key(old) != key] + [run]
        self._stale.discard(key)
        self._write()

    def note_tuning(self, problem: Problem, optimizer: str, facts: dict[str, Any]) -> None:
        """Keep what was spent on tuning a contestant, and what it gave."""
        entry = self.tuning.setdefault(problem.name, {})
        if entry.get(optimizer) != facts:
            entry[optimizer] = facts
            self._write()

    def remarks(self, problems: Iterable[Problem], device: torch.device) -> list[str]:
        """What a reader must know: which runs of these problems are not used, and which are of other code."""
        lines = []
        for problem in problems:
            mine = [run for run in self.runs if run.problem == problem.name]
            usable = [run for run in mine if run.version == problem.version and _key(run) not in self._stale]
            if foreign := sum(run.version != problem.version for run in mine):
                lines.append(f"{foreign} runs of {problem.name} in {self.path} are of another version of the problem: ignored.")
            here = (str(device), torch.get_num_threads())
            for (where, threads), count in Counter((run.device, run.threads) for run in usable).items():
                if (where, threads) != here:
                    lines.append(
                        f"{count} runs of {problem.name} in {self.path} were made on {where}, threads {threads}: ignored."
                    )
            others = Counter(run.optimizer for run in usable if run.sources != sources_of(run.optimizer))
            for name, count in others.items():
                lines.append(
                    f"{count} runs of {name} on {problem.name} in {self.path} are of other sources and are used as they are; "
                    f"--rerun {KEYS[name]} makes them again."
                )
        return lines

    def _read(self, path: Path) -> None:
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise LogError(
                    f"{str(path)!r} has format {content['format']}, and this version of the race reads {FORMAT}; "
                    "give another --log, or remove the file"
                )
            self.runs = [_from_json(run) for run in content["runs"]]
            self.tuning = content["tuning"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            if isinstance(error, LogError):
                raise
            raise LogError(
                f"{str(path)!r} is no log of the race ({type(error).__name__}: {error}); give another --log, or remove the file"
            ) from error

    def _write(self) -> None:
        """The whole file anew, moved into place in one go: a stop in the middle leaves the old one."""
        if self.path is None:
            return
        content = {"format": FORMAT, "tuning": self.tuning, "runs": [_as_json(run) for run in self.runs]}
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        os.replace(partial, self.path)


def sources() -> str:
    """Fingerprint of the code of kfac_triton, commands left out."""
    folder = Path(kfac_triton.__file__).parent
    files = sorted(path for path in folder.rglob("*.py") if path.relative_to(folder).parts[0] not in ("cli", "kernels"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def sources_of(optimizer: str) -> str:
    """What a contestant's code is known by: a fingerprint, or of PyTorch's optimizers its version."""
    if optimizer in OURS:
        return sources()
    return peers.sources(optimizer) if optimizer in peers.places() else f"PyTorch {torch.__version__}"


def _key(run: Run) -> str:
    config = dict(sorted(run.config.items()))
    return json.dumps([run.problem, run.version, run.optimizer, config, run.seed, run.horizon, run.device, run.threads])


def _as_json(run: Run) -> dict[str, Any]:
    """Infinite losses become null."""

    def finite(loss: float) -> float | None:
        return loss if math.isfinite(loss) else None

    return asdict(run) | {"losses": [finite(loss) for loss in run.losses], "held_out_loss": finite(run.held_out_loss)}


def _from_json(content: dict[str, Any]) -> Run:
    if missing := {item.name for item in fields(Run)} - set(content):
        raise KeyError(f"a run lacks {', '.join(sorted(missing))}")
    run = Run(**content)
    run.losses = [math.inf if loss is None else loss for loss in run.losses]
    run.held_out_loss = math.inf if run.held_out_loss is None else run.held_out_loss
    return run
