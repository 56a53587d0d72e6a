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
