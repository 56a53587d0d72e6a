"""Trial runs: their settings on the command line, and what is printed of them."""

from __future__ import annotations

import argparse
import ast
import math
import re
from dataclasses import dataclass
from typing import Any

from .log import Log
from .optimizers import ADAMW, CONTESTANTS, Config
from .problems import Problem
from .table import number, reached, settings
from .training import Run


@dataclass(frozen=True)
class Trial:
    """A contestant, and settings over the first of its grid."""

    optimizer: str
    settings: Config


def of_one(key: str, text: str) -> Trial:
    """Argument type: settings of the contestant with this name on the command line."""
    return Trial(CONTESTANTS[key], parse_settings(text))


def parse_trial(text: str) -> Trial:
    """Argument type: `name:settings`."""
    key, _, rest = text.partition(":")
    if key.strip() not in CONTESTANTS:
        raise argparse.ArgumentTypeError(f"{key!r} is no contestant; choose from {', '.join(CONTESTANTS)}, as in muon:lr=0.03")
    return of_one(key.strip(), rest.strip())


def parse_settings(text: str) -> Config:
    """Argument type: `name=value,name=value`; values are Python's literals, `none`, `true`, `false`, or words."""
    config: Config = {}
    for part in filter(None, re.split(r",(?![^[(]*[])])", text)):  # not at the comma of a pair
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name.isidentifier() and value):
            raise argparse.ArgumentTypeError(f"{part!r} is not of the form name=value; write, for example, lr=0.3,damping=0.01")
        config[name] = _value(value)
    return config


def _value(text: str) -> Any:
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def curve(problem: Problem, run: Run, log: Log) -> str:
    """A trial's curve, and when it got to AdamW's final loss if the log has it."""
    points = "  ".join(f"{step}: {number(loss)}" for step, loss in zip(run.steps, run.losses, strict=True))
    accuracy = f", held-out accuracy {run.held_out_accuracy:.3f}" if problem.is_classification else ""
    lines = [
        f"{problem.name}, {run.optimizer}, seed {run.seed}, {run.horizon} steps: {settings(run.config)}",
        f"{problem.loss_name} at step: {points}",
        f"at the end {number(run.final)}, held-out loss {number(run.held_out_loss)}{accuracy}; {run.ms_per_step:.1f} ms a step",
    ]
    target = _best_adamw(problem, run.seed, log)
    if target is not None:
        found = reached(run, target.final)
        when = "not reached" if found is None else f"reached in {found[0]} steps, {found[1]:.1f} s"
        lines.append(
            f"AdamW's best at this seed in the log, {number(target.final)} "
            f"({target.horizon} steps, {target.seconds[-1]:.1f} s): {when}"
        )
    return "\n".join(lines)


def _best_adamw(problem: Problem, seed: int, log: Log) -> Run | None:
    """AdamW's run with the lowest final loss at a seed."""
    runs = [r for r in log.runs if (r.problem, r.version, r.optimizer, r.seed) == (problem.name, problem.version, ADAMW, seed)]
    return min((run for run in runs if math.isfinite(run.final)), key=lambda run: run.final, default=None)
