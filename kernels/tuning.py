"""Tile sizes and launch options of the kernels, measured, and kept in one JSON file per architecture.

`configs/<arch>.json` maps a kernel's name to entries sorted by `up_to`, the largest matrix side that an entry is for (null:
any). A file of the same form with what the user tuned takes precedence. Nothing is tuned at run time: timing a kernel that
updates in place would ruin the state that it updates.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

from .runtime import Target

Config = dict[str, int]
SHIPPED = Path(__file__).parent / "configs"
NEAREST = ("sm_80", "sm_90", "sm_100")  # sorted by capability; a card between two uses the lower one


def user_file(arch: str) -> Path:
    """The file of a user's own configurations: in $KFAC_TRITON_CONFIGS, or the configuration folder of the user."""
    folder = os.environ.get("KFAC_TRITON_CONFIGS")
    if folder is None:
        home = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
        folder = str(Path(home) / "kfac_triton")
    return Path(folder) / f"{arch}.json"


def shipped_file(target: Target) -> Path:
    """The shipped file for a target: its own, or that of the nearest older architecture."""
    own = SHIPPED / f"{target.arch}.json"
    if own.exists():
        return own
    if target.backend == "hip":
        return SHIPPED / "gfx942.json"
    older = [arch for arch in NEAREST if int(arch.removeprefix("sm_")) <= target.capability]
    return SHIPPED / f"{older[-1] if older else NEAREST[0]}.json"


@functools.cache
def load(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The entries of one file.

    Raises:
        ValueError: if it is not such a file; the message names it.
    """
    try:
        table = json.loads(path.read_text())
        for name, entries in table.items():
            sides = [float("inf") if entry["up_to"] is None else entry["up_to"] for entry in entries]
            if sides != sorted(sides) or not sides or sides[-1] != float("inf"):
                raise ValueError(f"entries of {name!r} must be sorted by up_to, and end with null")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a table of kernel configurations ({error}); correct it, or delete it and tune again"
        ) from error
    return table


@functools.cache
def lookup(kernel: str, size: int, target: Target) -> Config:
    """Configuration of a kernel for matrices of this side: tile sizes, num_warps, num_stages and the like."""
    user = user_file(target.arch)
    table = load(shipped_file(target))
    if user.exists():
        table = table | load(user)
    for entry in table[kernel]:
        if entry["up_to"] is None or size <= entry["up_to"]:
            return {key: value for key, value in entry.items() if key != "up_to"}
    raise AssertionError("load() checks that the last entry takes any size")
