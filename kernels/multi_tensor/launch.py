"""Operations over many tensors, one launch each: squares, gradients into a stack, sums into averages, copies put back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table
from ..tiles import count
from . import kernel

_WORDS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}  # what elements of so many bytes are copied as
_SHARES = 16  # programs for each tensor that might be restored; all but those of bad gradients end at once


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in any order."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() == 0 or tensor.numel() == span


def can_use_squares(inputs: list[Tensor], out: Tensor) -> str | None:
    """Why the kernel cannot serve these inputs; None if it can."""
    for i, source in enumerate(inputs):
        if reason := runtime.unreadable(f"inputs[{i}]", source):
            return reason
        if not is_dense(source):
            return f"inputs[{i}] of shape {tuple(source.shape)} and strides {source.stride()} has gaps"
    return None if out.dtype == torch.float32 else f"out is {out.dtype}, and the kernel sums in float32"


def launch_squares(inputs: list[Tensor], out: Tensor) -> None:
    """The Triton implementation of `squares_reference`."""
    for dtype in sorted({source.dtype for source in inputs}, key=str):
        members = [i for i, source in enumerate(inputs) if source.dtype == dtype]
        table = device_table(tuple((inputs[i].data_ptr(), inputs[i].numel(), i) for i in members), out.device)
        kernel.squares_kernel[(len(members),)](
            table, out, DTYPE=runtime.TYPES[dtype], BLOCK=1024 if runtime.INTERPRETED else 8192, num_warps=8
        )


def can_use_gather(weights: list[Tensor], biases: list[Tensor], out: Tensor) -> str | None:
    """Why the kernel cannot serve these gradients; None if it can."""
    for name, tensors in (("weights", weights), ("biases", biases)):
        for i, tensor in enumerate(tensors):
            if reason := runtime.unreadable(f"{name}[{i}]", tensor):
                return reason
            if not tensor.is_contiguous():
                return f"{name}[{i}] is not contiguous"
    if len({tensor.dtype for tensor in weights + biases if tensor.numel()}) > 1:
        return "the gradients have different types"
    return None if out.dtype == torch.float32 and out.is_contiguous() else "out is not a contiguous float32 stack"


def launch_gather(weights: list[Tensor], biases: list[Tensor], out: Tensor) -> None:
    """The Triton implementation of `gather_reference`."""
    rows = [
        (w.data_ptr(), b.data_ptr(), w.shape[0] if w.numel() else 0, w[0].numel() if w.numel() else 0, b.numel())
        for w, b in zip(weights, biases, strict=True)
    ]
    dtype = next((tensor.dtype for tensor in weights if tensor.numel()), torch.float32)
    block = 64 if runtime.INTERPRETED else 1024
    grid: Sequence[int] = (count(out.shape[1] * out.shape[2], block), len(weights))
    kernel.gather_kernel[grid](
        device_table(tuple(rows), out.device),
        out,
        out.shape[1],
        out.shape[2],
        DTYPE=runtime.TYPES[dtype],
        BLOCK=block,
        num_warps=4,
    )


def can_use_blend(factor: Tensor, total: Tensor, keep: Tensor, gain: Tensor, accept: Tensor) -> str | None:
    """Why the kernel cannot serve this stack; None if it can."""
    if factor.dtype != torch.float32:
        return f"factor is {factor.dtype}, and the kernel needs float32"
    return None if factor.is_contiguous() and total.is_contiguous() else "factor or total is not contiguous"


def launch_blend(factor: Tensor, total: Tensor, keep: Tensor, gain: Tensor, accept: Tensor) -> None:
    """The Triton implementation of `blend_reference`."""
    size, block = factor[0].numel(), 1024
    kernel.blend_kernel[(count(size, block), len(factor))](
        factor, total, keep, gain, accept.to(torch.uint8), size, BLOCK=block, num_warps=4, enable_fp_fusion=True
    )


def can_use_restore(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> str | None:
    """Why the kernel cannot serve these tensors; None if it can."""
    for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True)):
        if tensor.element_size() not in _WORDS:
            return f"tensors[{i}] is {tensor.dtype}, and the kernel copies elements of up to 8 bytes"
        if not is_dense(tensor) or tensor.stride() != copy.stride():
            return f"tensors[{i}] has gaps, or other strides than its copy"
    return None


def launch_restore(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> None:
    """The Triton implementation of `restore_reference`."""
    for size in sorted({tensor.element_size() for tensor in tensors}):
        rows = [
            (tensor.data_ptr(), copy.data_ptr(), tensor.numel(), i % len(finite))
            for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True))
            if tensor.element_size() == size
        ]
        kernel.restore_kernel[(len(rows), _SHARES)](
            device_table(tuple(rows), finite.device),
            finite.view(torch.uint8),
            DTYPE=getattr(runtime.tl, _WORDS[size]),
            BLOCK=1024,
            num_warps=4,
        )
