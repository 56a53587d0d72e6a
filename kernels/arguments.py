"""Checks of the operations' arguments: a message names the argument, what it must be and what it is."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .covariance.window import Window
from .norm_fisher.norm import KINDS, Norm

DIGITS = (torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds.

    The message is made in any case. What is checked for every tensor of a step makes it only when it is needed.
    """
    if not condition:
        raise ValueError(message)


def require_digits(name: str, tensor: Tensor) -> None:
    """Single or double precision."""
    if tensor.dtype not in DIGITS:
        raise ValueError(_not_digits(name, tensor.dtype))


def _not_digits(name: str, dtype: torch.dtype) -> str:
    return f"{name} must be float32 or float64, but is {dtype}; convert it (16 bits have too few digits to keep a factor)"


def require_stack(name: str, stack: Tensor) -> None:
    """A stack of square matrices, in single or double precision."""
    require_digits(name, stack)
    shape = stack.shape
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"{name} must be a stack of square matrices (B, n, n), but has shape {tuple(shape)}")


def require_like(name: str, tensor: Tensor, shape: tuple[int, ...], other: Tensor) -> None:
    """This shape, and the dtype and device of another tensor."""
    if tensor.shape != shape or tensor.dtype != other.dtype or tensor.device != other.device:
        raise ValueError(
            f"{name} must have shape {tuple(shape)}, dtype {other.dtype} and device {other.device}, but has "
            f"{tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}"
        )


def require_vector(name: str, vector: Tensor, count: int, device: torch.device) -> None:
    """A number or flag for each of `count` matrices, of any dtype, on their device."""
    if vector.shape != (count,) or vector.device != device:
        raise ValueError(
            f"{name} must have shape ({count},) and be on {device}, but has shape {tuple(vector.shape)} and is on "
            f"{vector.device}"
        )


def columns_of(i: int, shape: Sequence[int], window: Window) -> int:
    """Columns of X for the input of layer i, of this shape, after a check that it and its window fit."""
    spatial = len(shape) - 2
    if not spatial:
        return shape[1]
    require(
        0 < spatial <= 3,
        f"inputs[{i}] must be a matrix of rows or (N, C, *spatial) with 1 to 3 spatial dimensions, but has shape "
        f"{tuple(shape)}",
    )
    kernel, stride, padding, dilation = window
    if not (
        len(kernel) == len(stride) == len(padding) == len(dilation) == spatial
        and min(kernel) > 0
        and min(stride) > 0
        and min(dilation) > 0
        and min(padding) >= 0
    ):
        raise ValueError(
            f"windows[{i}] must come from window(...), with a number for each spatial dimension of inputs[{i}] of shape "
            f"{tuple(shape)}, but is {window}"
        )
    if min(window.positions(shape[2:])) <= 0:
        raise ValueError(
            f"inputs[{i}] of shape {tuple(shape)} must be at least as large as its kernel, but the kernel is {list(kernel)} "
            f"with dilation {list(dilation)} and padding {list(padding)}"
        )
    return shape[1] * math.prod(kernel)


def require_layers(
    factors: tuple[Sequence[int], ...],
    inputs: tuple[Sequence[int], ...],
    dtypes: tuple[torch.dtype, ...],
    ones_column: tuple[bool, ...],
    windows: tuple[Window, ...],
) -> None:
    """That the shapes of factors and inputs fit each other and their windows, and factors have enough digits (dtypes)."""
    for i, (shape, source, dtype) in enumerate(zip(factors, inputs, dtypes, strict=True)):
        if dtype not in DIGITS:
            raise ValueError(_not_digits(f"factors[{i}]", dtype))
        columns = columns_of(i, source, windows[i]) + bool(ones_column[i])
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] < columns:
            raise ValueError(
                f"factors[{i}] must be square and at least {columns} wide for inputs[{i}] of shape {tuple(source)}, "
                f"but has shape {tuple(shape)}"
            )


# What has been right is right again. A training loop repeats a handful of calls, with a hundred layers each.
require_layers_once = functools.lru_cache(maxsize=64)(require_layers)


def _norm_fault(norm: Norm, total: tuple[int, ...], x: tuple[int, ...], gradient: tuple[int, ...]) -> str | None:
    """What is wrong with the shapes of a norm layer, with {i} for its number."""
    if norm.kind not in KINDS:
        return f"norms[{{i}}].kind must be one of {', '.join(KINDS)}, but is {norm.kind!r}"
    if norm.dims < 1 or norm.groups < 1:
        return f"norms[{{i}}] must have positive dims and groups, but has {norm.dims} and {norm.groups}"
    least = 2 if norm.has_channels else norm.dims
    if len(x) < least or x != gradient:
        return (
            f"inputs[{{i}}] must have at least {least} dimensions and the shape of gradients[{{i}}], but they have shapes "
            f"{tuple(x)} and {tuple(gradient)}"
        )
    width = norm.width(x)
    if norm.kind == "group" and width % norm.groups:
        return f"norms[{{i}}].groups must divide the {width} channels of inputs[{{i}}], but is {norm.groups}"
    size = width * (1 + norm.has_shift)
    if total != (size,):
        return f"totals[{{i}}] must have shape ({size},) for inputs[{{i}}] of shape {tuple(x)}, but has shape {tuple(total)}"
    return None


def require_norms(
    norms: tuple[Norm, ...],
    totals: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    inputs: tuple[tuple[int, ...], ...],
    gradients: tuple[tuple[int, ...], ...],
) -> None:
    """That norm layers are possible, their shapes fit each other, and their totals have enough digits (dtypes)."""
    for i, (norm, total, dtype, x, gradient) in enumerate(zip(norms, totals, dtypes, inputs, gradients, strict=True)):
        if dtype not in DIGITS:
            raise ValueError(_not_digits(f"totals[{i}]", dtype))
        if fault := _norm_fault(norm, total, x, gradient):
            raise ValueError(fault.format(i=i))


require_norms_once = functools.lru_cache(maxsize=64)(require_norms)


def require_running(i: int, norm: Norm, running: tuple[Tensor, Tensor], x: Tensor) -> None:
    """That running statistics fit the norm layer with number i, whose input is x."""
    require(norm.kind == "batch", f"running[{i}] must be None for kind {norm.kind!r}")
    for name, statistic in zip(("mean", "variance"), running, strict=True):
        require_vector(f"the {name} of running[{i}]", statistic, norm.width(x.shape), x.device)
