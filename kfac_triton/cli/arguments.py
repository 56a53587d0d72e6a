"""Argument types that the commands share."""

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import torch

NO_FILE = "none"


def at_least(minimum: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least `minimum`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {minimum}; give one")
        return int(text)

    return parse


def usable_device(text: str) -> torch.device:
    """Argument type: a device that this machine can compute on."""
    try:
        device = torch.device(text)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here ({reason}); try --device cpu") from error
    return device


def add_device(parser: argparse.ArgumentParser, examples: str) -> None:
    """Adds `--device`: a GPU by default if there is one."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=usable_device, default=default, help=f"{examples} (default: %(default)s)")


def writable_file(suffix: str) -> Callable[[str], Path | None]:
    """Argument type: a file name with this suffix, in a folder that can be written to; None for `none`."""

    def parse(text: str) -> Path | None:
        path = Path(text)
        if text == NO_FILE:
            return None
        if path.suffix.lower() != suffix:
            raise argparse.ArgumentTypeError(f"{text!r} does not end in {suffix}; give a name that does")
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder; give a file name")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist; create it first")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text!r} cannot be written; choose another place")
        return path

    return parse


def picture_file(text: str) -> Path | None:
    """Argument type: a PNG file that can be written, where matplotlib is there to draw it; None for `none`."""
    path = writable_file(".png")(text)
    if path is not None and importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError(
            "the picture needs matplotlib, which is not installed; "
            f'run: pip install "kfac-triton[demo]", or give --output {NO_FILE}'
        )
    return path
