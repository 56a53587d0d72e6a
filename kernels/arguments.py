"""Checks of the operations' arguments: a message names the argument, what it must be and what it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .covariance.window import Window


def require(condition: bool, message: str) -> None:
    """Raises ValueError with this message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def require_digits(name: str, tensor: Tensor) -> None:
    """Single or double precision."""
    require(
        tensor.dtype in (torch.float32, torch.float64),
        f"{name} must be float32 or float64, but is {tensor.dtype}; convert it (16 bits have too few digits to keep a factor)",
    )


def require_stack(name: str, stack: Tensor) -> None:
    """A stack of square matrices, in single or double precision."""
    require_digits(name, stack)
    require(
        stack.dim() == 3 and stack.shape[1] == stack.shape[2],
        f"{name} must be a stack of square matrices (B, n, n), but has shape {tuple(stack.shape)}",
    )


def require_like(name: str, tensor: Tensor, shape: tuple[int, ...], other: Tensor) -> None:
    """This shape, and the dtype and device of another tensor."""
    require(
        tuple(tensor.shape) == shape and tensor.dtype == other.dtype and tensor.device == other.device,
        f"{name} must have shape {shape}, dtype {other.dtype} and device {other.device}, but has "
        f"{tuple(tensor.shape)}, {tensor.dtype} and {tensor.device}",
    )


def require_vector(name: str, vector: Tensor, count: int, device: torch.device) -> None:
    """A number or flag for each of `count` matrices, of any dtype, on their device."""
    require(
        tuple(vector.shape) == (count,) and vector.device == device,
        f"{name} must have shape ({count},) and be on {device}, but has shape {tuple(vector.shape)} and is on {vector.device}",
    )


def columns_of(i: int, source: Tensor, window: Window) -> int:
    """Columns of X for the input of layer i, after a check that the input and its window fit."""
    shape = tuple(source.shape)
    require(
        2 <= source.dim() <= 5,
        f"inputs[{i}] must be a matrix of rows or (N, C, *spatial) with 1 to 3 spatial dimensions, but has shape {shape}",
    )
    if source.dim() == 2:
        return source.shape[1]
    kernel, stride, padding, dilation = window
    require(
        all(len(numbers) == source.dim() - 2 for numbers in window)
        and min(kernel) > 0
        and min(stride) > 0
        and min(dilation) > 0
        and min(padding) >= 0,
        f"windows[{i}] must come from window(...), with a number for each spatial dimension of inputs[{i}] of shape {shape}, "
        f"but is {window}",
    )
    require(
        min(window.positions(shape[2:])) > 0,
        f"inputs[{i}] of shape {shape} must be at least as large as its kernel, but the kernel is {list(kernel)} with dilation "
        f"{list(dilation)} and padding {list(padding)}",
    )
    return source.shape[1] * math.prod(kernel)
