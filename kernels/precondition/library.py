"""V = G^-1 W A^-1 through triangular roots by the library's products, which skip most of the zeros of large roots.

The library multiplies whole matrices. A root that is cut into p panels of rows (or of columns, where it is transposed) needs
only the part of each panel up to (or from) the diagonal: (1 + 1/p) / 2 of the operations, in p products.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from .reference import finish

_MOST_PANELS = 4  # more save little: an eighth of the operations is left at most
_MULTIPLE = 128  # a side of the library's tiles
# Operations that a further product has to save: some 12 to 20 microseconds of an H100, which is what the host takes to launch
# it.
_WORTH = 4e9


def panels(batch: int, side: int, across: int) -> int:
    """How many panels a stack of roots (B, side, side) is cut into that multiplies matrices of `across` columns.

    The p-th panel saves 1 / (2 p (p - 1)) of all operations.
    """
    operations, count = 2 * batch * side * side * across, 1
    while count < _MOST_PANELS and operations >= _WORTH * 2 * count * (count + 1) and side >= _MULTIPLE * (count + 1):
        count += 1
    return count


def bounds(side: int, count: int) -> list[tuple[int, int]]:
    """Where each panel begins and ends: at multiples of a tile's side, about equally far apart."""
    ends = [round(side * i / count / _MULTIPLE) * _MULTIPLE for i in range(count)] + [side]
    return list(itertools.pairwise(ends))


def root_times(root: Tensor, matrix: Tensor, count: int, transposed: bool = False) -> Tensor:
    """T B or T^T B with lower triangular T (B, m, m), by panels of the result's rows."""
    out = matrix.new_empty(matrix.shape)  # given, so that autocast does not choose another type
    if count == 1:  # without views, which the host pays for
        return torch.bmm(root.mT if transposed else root, matrix, out=out)
    for start, stop in bounds(root.shape[1], count):
        if transposed:
            torch.bmm(root[:, start:, start:stop].mT, matrix[:, start:], out=out[:, start:stop])
        else:
            torch.bmm(root[:, start:stop, :stop], matrix[:, :stop], out=out[:, start:stop])
    return out


def times_root(matrix: Tensor, root: Tensor, count: int, out: Tensor, transposed: bool = False) -> Tensor:
    """Out <- B T or B T^T with lower triangular T (B, n, n), by panels of the result's columns."""
    if count == 1:
        return torch.bmm(matrix, root.mT if transposed else root, out=out)
    for start, stop in bounds(root.shape[1], count):
        if transposed:
            torch.bmm(matrix[:, :, :stop], root[:, start:stop, :stop].mT, out=out[:, :, start:stop])
        else:
            torch.bmm(matrix[:, :, start:], root[:, start:, start:stop], out=out[:, :, start:stop])
    return out


def precondition_by_roots(gradient: Tensor, left: Tensor, right: Tensor, out: Tensor, product: Tensor | None) -> None:
    """As `precondition_reference` with factored=True; what is above the diagonals of the roots must be zero."""
    batch, m, n = gradient.shape
    of_left, of_right = panels(batch, m, n), panels(batch, n, m)
    inner = root_times(left, gradient, of_left)
    inner = times_root(inner, right, of_right, gradient.new_empty(gradient.shape), transposed=True)
    times_root(root_times(left, inner, of_left, transposed=True), right, of_right, out)
    finish(gradient, out, product)
