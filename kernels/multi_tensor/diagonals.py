"""Vectors that hold the diagonals of several matrices, one after another."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

from torch import Tensor

_KEPT = 64


@functools.lru_cache(maxsize=_KEPT)
def runs_of(sizes: tuple[int, ...], lengths: tuple[int, ...]) -> tuple[tuple[int, ...], ...] | None:
    """The sizes of the diagonals in each vector.

    Args:
        sizes: of all diagonals; empty if each vector is one.
        lengths: of the vectors.

    Returns:
        The sizes in each vector; None if they do not divide the vectors.
    """
    if not sizes:
        return tuple((length,) for length in lengths)
    ends, cuts = [0, *itertools.accumulate(sizes)], [0, *itertools.accumulate(lengths)]
    if min(sizes) < 1 or ends[-1] != cuts[-1] or not set(cuts) <= set(ends):
        return None
    return tuple(sizes[ends.index(start) : ends.index(stop)] for start, stop in itertools.pairwise(cuts))


def split(stacks: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Stacks of matrices as they are, and the diagonals in vectors as stacks (1, n)."""
    runs = iter(runs_of(tuple(sizes), tuple([len(stack) for stack in stacks if stack.dim() == 1])) or ())
    return [piece for stack in stacks for piece in ([stack] if stack.dim() > 1 else stack[None].split(next(runs), 1))]
