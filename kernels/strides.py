"""How the elements of a tensor lie in memory, from its sizes and strides."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor


def span(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last one in memory, both included; of a tensor that has some."""
    return 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill one stretch of memory, in any order."""
    return tensor.numel() == 0 or tensor.numel() == span(tensor.shape, tensor.stride())


def collapsed(sizes: Sequence[int], strides: Sequence[int], of_one: int | None = None) -> int | None:
    """The stride of the one dimension that these dimensions are together; None if they are not one.

    Dimensions of one element do not matter. If there are no others, the result is `of_one`, or else the last stride.
    """
    pairs = [(size, stride) for size, stride in zip(sizes, strides, strict=True) if size != 1]
    for (_, outer), (size, inner) in itertools.pairwise(pairs):
        if outer != size * inner:
            return None
    if pairs:
        return pairs[-1][1]
    return strides[-1] if of_one is None else of_one
