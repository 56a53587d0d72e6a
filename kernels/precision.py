"""How exactly `tl.dot` multiplies float32: one place decides, from the architecture and what a product is for.

mode     NVIDIA (sm_80 and newer)            AMD
ieee     CUDA cores, slow                    matrix cores, exact
tf32     one pass, 10-bit mantissas          gfx942 alone
tf32x3   three passes, almost exact          not there
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .runtime import Target

# What a product is for.
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
    if target.backend == "interpreter":  # which multiplies in float32 whatever it is told
        return "ieee"
    if target.backend == "hip":
        return "ieee"
    if purpose == EXACT:
        return "tf32x3"
    return "tf32"


@contextmanager
def library_tf32() -> Iterator[None]:
    """Lets the library's products of float32 matrices use TF32 on NVIDIA GPUs, and sets the user's choice back afterwards.

    The setting is one of the whole process: do not wait, and run nothing of the user's, inside.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before
