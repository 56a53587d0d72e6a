"""Launches the preconditioning products, and sums up <V, W>: three launches for inverses, five for roots."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..tiles import count
from .kernel import product_kernel

# Above this side the library's batched products are taken, which are said to be fast there. Not measured: no GPU has run both.
LARGEST_PREFERRED = 512
_ALIGNMENT = 16  # rows of scratch start 64 bytes apart or a multiple
_MOST_MATRICES = 65535  # the second dimension of a launch


def can_use(gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor, factored: bool) -> str | None:
    """What keeps the kernel from serving these layers; None for nothing."""
    batch, m, n = gradient.shape
    if gradient.dtype != torch.float32:
        return f"gradient is {gradient.dtype}, and the kernel multiplies float32"
    if m == 0 or n == 0:
        return "the gradients are empty"
    if batch > _MOST_MATRICES:
        return f"gradient has {batch} matrices, and a launch takes {_MOST_MATRICES}"
    for name, stack in (("gradient", gradient), ("left", left), ("right", right), ("out", out)):
        if stack.shape[2] > 1 and stack.stride(2) != 1:
            return f"{name} has columns {stack.stride(2)} apart, and the kernel wants them side by side"
        if stack.shape[1] * max(stack.stride(1), m + _ALIGNMENT, n + _ALIGNMENT) >= 2**31:
            return f"{name} has matrices larger than 32 bits count"
    return None


def prefer_reference(gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor, factored: bool) -> str | None:
    """Why the library's products should serve a call that leaves the choice open; None for no reason."""
    largest = max(gradient.shape[1:])
    if largest > LARGEST_PREFERRED:
        return f"gradients have a side of {largest}, and above {LARGEST_PREFERRED} the library's products are preferred"
    return None


def launch(gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor, factored: bool) -> None:
    """The Triton twin of `precondition_reference`, for calls that `can_use` has nothing against."""
    batch, m, n = gradient.shape
    if batch == 0:
        return
    target = runtime.target(gradient.device)
    config = dict(tuning.lookup("precondition", max(m, n), target))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    partials = gradient.new_empty(batch, count(m, block_m) * count(n, block_n))

    def scratch(rows: int, columns: int) -> Tensor:
        padded = count(columns, _ALIGNMENT) * _ALIGNMENT
        return gradient.new_empty(batch, rows, padded)[:, :, :columns]

    def multiply(a: Tensor, b: Tensor, into: Tensor, transposed: bool = False) -> Tensor:
        """Into <- a b^T or a^T b^T."""
        rows, columns = into.shape[1:]
        product_kernel[(count(rows, block_m) * count(columns, block_n), batch)](
            a, b, into, gradient, partials, rows, columns, b.shape[2],
            a.stride(0), a.stride(1), b.stride(0), b.stride(1), into.stride(0), into.stride(1),
            gradient.stride(0), gradient.stride(1),
            PRECISION=precision.resolve(precision.COARSE, target), LEFT_TRANSPOSED=transposed, TRIANGULAR=factored,
            REDUCE=into is out, enable_fp_fusion=True, **config,
        )  # fmt: skip
        return into

    if factored:
        inner = multiply(right, multiply(gradient, right, scratch(m, n)), scratch(n, m), transposed=True)
        multiply(left, multiply(inner, left, scratch(n, m)), out, transposed=True)
    else:
        multiply(left, multiply(right, gradient, scratch(n, m)), out)
    torch.sum(partials, 1, out=product)
