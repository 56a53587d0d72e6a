"""How the kernel reads X from one input: as it lies in memory where its rows are neighbours there, else patch by patch.

A window of size one that moves by one and needs no padding reads an input (N, C, *spatial) as it is, so that X is a matrix of
N times positions rows and C columns: the gradients of every convolution, and the inputs of 1x1 convolutions. In memory either
its columns lie side by side (channels_last) or, within an image, its rows (contiguous). Both are copied in wide pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..strides import collapsed
from . import kernel
from .window import Window

ROW = 8  # elements that divide the strides of a matrix that is copied 16 bytes at a time, and of every factor
_WIDTHS = {2: (8, 4), 4: (4,)}  # by bytes of an element: positions that one copy may bring, 16 bytes or 8


class Operand(NamedTuple):
    """What decides how a tensor is read: sizes and strides in elements, and what of its address is no multiple of 16 bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class Layout(NamedTuple):
    """How the rows of one input are read.

    Attributes:
        spatial: dimensions of the windows whose patches are gathered; 0 if X is read as it lies.
        images: whether the rows of an image lie side by side, and not the columns.
        width: neighbours in memory that are copied at once; 1 if nothing is known about addresses.
        fields: the row of the layer table.
    """

    spatial: int
    images: bool
    width: int
    fields: tuple[int, ...]


def layout_of(source: Operand, factor: Operand, window: Window) -> Layout:
    """How to read the rows of this input, whose products go to this factor."""
    sizes, strides = source.shape, source.strides
    if len(sizes) == 2:
        return _matrix(sizes[0], sizes[1], strides[0], strides[1], source, factor)
    images, channels = sizes[:2]
    step = collapsed(sizes[2:], strides[2:])
    if step is None or not window.reads_as_it_is:
        return _patches(source, factor, window)
    positions = math.prod(sizes[2:])
    row = collapsed((images, positions), (strides[0], step))
    if row is not None:
        return _matrix(images * positions, channels, row, strides[1], source, factor)
    if step == 1:
        return _images(images * positions, positions, channels, strides[0], strides[1], source, factor)
    return _patches(source, factor, window)  # some images of a batch with channels last


def _is_wide(columns: int, factor: Operand) -> bool:
    return columns % ROW == factor.strides[0] % ROW == factor.offset == 0


def _matrix(rows: int, columns: int, row_stride: int, column_stride: int, source: Operand, factor: Operand) -> Layout:
    if row_stride == 1 and column_stride > 1 and reach((rows, columns), (1, column_stride)) < 2**31:
        return _images(rows, max(1, rows), columns, 0, column_stride, source, factor)  # a transposed matrix is one image
    wide = column_stride == 1 and source.offset == row_stride % ROW == 0 and _is_wide(columns, factor)
    return Layout(0, False, ROW if wide else 1, _fields(rows, columns, row_stride, column_stride, factor.strides[0], 0))


def _images(
    rows: int, positions: int, columns: int, image_stride: int, column_stride: int, source: Operand, factor: Operand
) -> Layout:
    width = 1
    if _is_wide(columns, factor):
        common = math.gcd(positions, image_stride, column_stride)
        size = source.dtype.itemsize
        width = next((w for w in _WIDTHS[size] if common % w == 0 == source.offset % (w * size)), 1)
    return Layout(0, True, width, _fields(rows, columns, image_stride, column_stride, factor.strides[0], positions))


def _fields(*known: int) -> tuple[int, ...]:
    """Rows, columns, their strides, the factor's stride and the positions; what only windows need is 0."""
    return known + (0,) * (kernel.LAYER_FIELDS - len(known))


def _patches(source: Operand, factor: Operand, window: Window) -> Layout:
    spatial = len(source.shape) - 2
    missing = 3 - spatial
    sizes = (1,) * missing + source.shape[2:]
    window = window.in_three_dimensions()
    outputs = tuple(window.positions(sizes))
    positions, columns = math.prod(outputs), source.shape[1] * math.prod(window.kernel)
    fields = list(_fields(source.shape[0] * positions, columns, 0, 0, factor.strides[0], positions))
    for at, values in (
        (kernel.KERNEL, window.kernel),
        (kernel.OUTPUT, outputs),
        (kernel.STRIDE, window.stride),
        (kernel.PADDING, window.padding),
        (kernel.DILATION, window.dilation),
        (kernel.INPUT, sizes),
        (kernel.INPUT_STRIDE, (0,) * missing + source.strides[2:]),
    ):
        fields[at : at + 3] = values
    fields[kernel.IMAGE_STRIDE], fields[kernel.CHANNEL_STRIDE] = source.strides[:2]
    return Layout(spatial, False, 1, tuple(fields))


def reach(sizes: Sequence[int], strides: Sequence[int], padding: Sequence[int] | None = None) -> int:
    """Largest distance in memory, in elements, between places that are read, padding included."""
    padding = padding or (0,) * len(sizes)
    return sum((size - 1 + 2 * p) * step for size, p, step in zip(sizes, padding, strides, strict=True))
