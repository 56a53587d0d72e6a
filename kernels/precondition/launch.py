"""Launches the preconditioning products, and sums up <V, W>: three launches for inverses, five for roots."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import precision, runtime, tuning
from ..tiles import ALIGNMENT, MOST_MATRICES, count, padded
from .kernel import product_kernel
from .library import precondition_by_roots
from .reference import precondition_reference


def can_use(gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor | None, factored: bool) -> str | None:
    """Why the kernel cannot serve these layers; None if it can."""
    batch, m, n = gradient.shape
    if gradient.dtype != torch.float32:
        return f"gradient is {gradient.dtype}, and the kernel multiplies float32"
    if m == 0 or n == 0:
        return "the gradients are empty"
    if batch > MOST_MATRICES:
        return f"gradient has {batch} matrices, and a launch takes {MOST_MATRICES}"
    for name, stack in (("gradient", gradient), ("left", left), ("right", right), ("out", out)):
        if stack.shape[2] > 1 and stack.stride(2) != 1:
            return f"{name} has columns {stack.stride(2)} elements apart, and the kernel needs adjacent ones"
        if stack.shape[1] * max(stack.stride(1), m + ALIGNMENT, n + ALIGNMENT) >= 2**31:
            return f"{name} has matrices with more elements than 32 bits can count"
    return None


def prefers_library(device: torch.device) -> bool:
    """Whether the library's TF32 products are the fastest: on NVIDIA GPUs.

    Measured on an H200, GPT-2 small's layers: this file's kernel took 3.7 times as long as TF32 products with inverses, which
    have half as many products as roots. On other GPUs the library has no TF32.
    """
    return precision.has_library_tf32(device)


def multiply_by_library(
    gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor | None, factored: bool
) -> None:
    """As `precondition_reference`, in the kernel's precision: TF32 products, sums in float32. Large roots go by panels."""
    with precision.library_tf32():
        if factored:
            precondition_by_roots(gradient, left, right, out, product)
        else:
            precondition_reference(gradient, left, right, out, product, factored)


def launch(gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor | None, factored: bool) -> None:
    """The Triton implementation of `precondition_reference`, for a call that `can_use` accepts."""
    batch, m, n = gradient.shape
    if batch == 0:
        return
    target = runtime.target(gradient.device)
    config = dict(tuning.lookup("precondition", max(m, n), target))
    block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
    partials = gradient.new_empty(batch, count(m, block_m) * count(n, block_n))

    def scratch(rows: int, columns: int) -> Tensor:
        return gradient.new_empty(batch, rows, padded(columns))[:, :, :columns]

    def multiply(a: Tensor, b: Tensor, into: Tensor, transposed: bool = False) -> Tensor:
        """Into <- a b^T or a^T b^T."""
        rows, columns = into.shape[1:]
        product_kernel[(count(rows, block_m) * count(columns, block_n), batch)](
            a, b, into, gradient, partials, rows, columns, b.shape[2],
            a.stride(0), a.stride(1), b.stride(0), b.stride(1), into.stride(0), into.stride(1),
            gradient.stride(0), gradient.stride(1),
            PRECISION=precision.resolve(precision.COARSE, target), LEFT_TRANSPOSED=transposed, TRIANGULAR=factored,
            REDUCE=into is out and product is not None, enable_fp_fusion=True, **config,
        )  # fmt: skip
        return into

    if factored:
        inner = multiply(right, multiply(gradient, right, scratch(m, n)), scratch(n, m), transposed=True)
        multiply(left, multiply(inner, left, scratch(n, m)), out, transposed=True)
    else:
        multiply(left, multiply(right, gradient, scratch(n, m)), out)
    if product is not None:
        torch.sum(partials, 1, out=product)
