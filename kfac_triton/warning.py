"""Warnings that point at the line of the user's that is their cause."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(f"{Path(module).parent}/" for module in (__file__, torch.__file__))


def warn(message: str) -> None:
    """A UserWarning with the line as its place that called into this package (or torch, which calls back from a step)."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def warn_of_missing_statistics(names: list[str], fisher: str, any_came: bool) -> None:
    """Warns of layers whose weights have gradients, but that no statistics came from.

    Args:
        names: of the layers.
        fisher: the setting.
        any_came: whether statistics came from other layers.
    """
    reason = (
        "Either the module's forward never ran (something else reads its weight), or the model was compiled and run before "
        "the optimizer was made (make it first, or call torch.compiler.reset()), or the forward pass ran inside paused()."
    )
    if fisher != "empirical" and not any_came:
        reason = f"fisher is {fisher!r}: call accumulate_fisher(outputs, targets) between the forward pass and backward()."
    warn(
        f"no statistics came from layers {', '.join(map(repr, names))}, although their weights have gradients, which are "
        f"not preconditioned. {reason}"
    )
