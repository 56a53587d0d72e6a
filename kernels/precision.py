"""How exactly `tl.dot` multiplies float32, decided here from the architecture and the purpose of a product.

mode     NVIDIA (sm_80 and newer)            AMD
ieee     CUDA cores, slow                    matrix cores, exact
tf32     one pass, 10-bit mantissas          gfx942 only
tf32x3   three passes, almost exact          not there
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .runtime import Target

# The purposes of a product.
ROWS = "rows"  # X^T X of float32 rows: rounding X leaves a Gram matrix, and sampling noise is far larger
EXACT = "exact"  # products whose error the condition number multiplies
COARSE = "coarse"  # corrections, and operands that are TF32 numbers already
PURPOSES = (ROWS, EXACT, COARSE)


def resolve(purpose: str, target: Target) -> str:
    """The `input_precision` of `tl.dot` for a purpose on a target.

    Raises:
        ValueError: if the purpose is unknown.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose must be one of {', '.join(PURPOSES)}, but is {purpose!r}")
    if target.backend == "interpreter":  # it always multiplies in float32
        return "ieee"
    if target.backend == "hip":
        return "ieee"
    if purpose == EXACT:
        return "tf32x3"
    return "tf32"


@contextmanager
def _library(precision: str) -> Iterator[None]:
    """How the library multiplies float32 matrices on NVIDIA GPUs; the user's choice is back afterwards.

    The setting concerns the whole process: inside, do not wait for anything and run no code of the user.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def library_tf32() -> AbstractContextManager[None]:
    """Lets the library's products of float32 matrices use TF32 on NVIDIA GPUs; see `_library`."""
    return _library("tf32")


@contextmanager
def library_float32() -> Iterator[None]:
    """Keeps the library's products of float32 matrices from TF32, which the user may have allowed; see `_library`."""
    with _library("ieee"):
        yield


def has_library_tf32(device: torch.device) -> bool:
    """Whether the library multiplies float32 matrices in TF32 there: on NVIDIA GPUs."""
    return device.type == "cuda" and torch.version.hip is None


def library_for_gradients(device: torch.device, backend: str) -> AbstractContextManager[None]:
    """How the library multiplies gradients with inverses: in TF32 where `ops.precondition` prefers the library, too."""
    return library_tf32() if backend == "auto" and has_library_tf32(device) else nullcontext()
