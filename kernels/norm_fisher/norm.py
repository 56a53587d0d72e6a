"""What a norm layer normalizes, and the integers that stand for it in an operator's schema."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

KINDS = ("layer", "rms", "batch", "group")
_NUMBERS = 5  # integers of one norm


class Norm(NamedTuple):
    """A layer y = scale * xhat + shift.

    Attributes:
        kind: "layer" or "rms", whose statistics are those of a position; "batch" or "group", which have a scale per channel.
        eps: what is added to the variance; None is torch's default for "rms", which depends on the type that it computes in.
        has_shift: whether the shift is trained, too.
        by_position: whether each position is a loss term.
        dims: the number of last dimensions that "layer" and "rms" normalize.
        groups: those of "group".
    """

    kind: str
    eps: float | None = 1e-5
    has_shift: bool = True
    by_position: bool = False
    dims: int = 1
    groups: int = 1

    @property
    def has_channels(self) -> bool:
        """Whether inputs are (N, C, ...) with a scale per channel."""
        return self.kind in ("batch", "group")

    def width(self, shape: Sequence[int]) -> int:
        """The number of entries of the scale, from the shape of an input."""
        return math.prod(shape[1:2] if self.has_channels else shape[len(shape) - self.dims :])

    def counts(self, shape: Sequence[int]) -> tuple[int, int]:
        """Examples, and positions of each, of an input of this shape.

        The first dimension is that of examples; if all dimensions are normalized, there is one example with one position.
        """
        outer = [shape[0], *shape[2:]] if self.has_channels else shape[: len(shape) - self.dims]
        return (outer[0], math.prod(outer[1:])) if outer else (1, 1)


def flatten(norms: Sequence[Norm]) -> tuple[list[int], list[float]]:
    """Integers and epsilons, as the operator takes them; the default epsilon is -1."""
    numbers = [n for x in norms for n in (KINDS.index(x.kind), x.has_shift, x.by_position, x.dims, x.groups)]
    return numbers, [-1.0 if x.eps is None else x.eps for x in norms]


@functools.lru_cache(maxsize=64)
def unflatten(numbers: tuple[int, ...], epsilons: tuple[float, ...]) -> tuple[Norm, ...]:
    """The norms from what `flatten` returned."""
    norms = []
    for i, eps in enumerate(epsilons):
        kind, has_shift, by_position, dims, groups = numbers[i * _NUMBERS : (i + 1) * _NUMBERS]
        norms.append(Norm(KINDS[kind], None if eps < 0 else eps, bool(has_shift), bool(by_position), dims, groups))
    return tuple(norms)
