"""How rows are read from an input: the window of a convolution, and the integers that stand for it in an operator's schema."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Window(NamedTuple):
    """Kernel, stride, padding and dilation, each with one number per spatial dimension; empty for a matrix of rows."""

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()

    def in_three_dimensions(self) -> Window:
        """The same window with the spatial dimensions that are missing filled in front."""
        missing = 3 - len(self.kernel)
        ones, zeros = (1,) * missing, (0,) * missing
        return Window(ones + self.kernel, ones + self.stride, zeros + self.padding, ones + self.dilation)

    @property
    def reads_as_it_is(self) -> bool:
        """Whether the rows are an input's positions: of size one, moves by one, without padding."""
        return math.prod(self.kernel) == math.prod(self.stride) == 1 and not any(self.padding)

    def positions(self, sizes: Sequence[int]) -> list[int]:
        """Number of places of the window along each spatial dimension of images of these sizes."""
        return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(sizes, *self, strict=True)]


ROWS = Window()  # of an input that already is a matrix of rows


def window(
    kernel: Sequence[int], stride: Sequence[int] = (), padding: Sequence[int] = (), dilation: Sequence[int] = ()
) -> Window:
    """The window of an input (N, C, *spatial) with one to three spatial dimensions."""
    ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
    return Window(tuple(kernel), tuple(stride) or ones, tuple(padding) or zeros, tuple(dilation) or ones)


def flatten(windows: Sequence[Window]) -> list[int]:
    """Twelve integers for each window of a convolution, as the operator takes them: each field in three dimensions."""
    return [number for window in windows if window[0] for numbers in window.in_three_dimensions() for number in numbers]


def unflatten(numbers: Sequence[int], shapes: Sequence[Sequence[int]]) -> list[Window]:
    """The windows of inputs of these shapes, (rows, n) or (N, C, *spatial), from their integers."""
    windows, start = [], 0
    for shape in shapes:
        spatial = len(shape) - 2
        if not spatial:
            windows.append(ROWS)
            continue
        ends = range(start + 3, start + 13, 3)
        windows.append(Window(*(tuple(numbers[end - spatial : end]) for end in ends)))
        start += 12
    return windows
