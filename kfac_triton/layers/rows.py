"""The rows of A and of G that one backward pass through a layer has."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops


class Rows(NamedTuple):
    """What one backward pass through a layer adds to its factors.

    Attributes:
        inputs: the rows of A for each channel group, as `kernels.ops.covariance_ema` takes them. A vector of integers stands
            for one-hot rows (the indices of an embedding), a matrix of integers for rows that are means of one-hot vectors.
            Empty if the input is constant.
        gradients: the rows of G for each channel group.
        input_window: how to read rows from each entry of inputs.
        gradient_window: the same for gradients.
        input_count: rows of A in this pass: examples times positions (expand) or examples (reduce).
        terms: loss terms in this pass, the number that a mean loss divides by.
        examples: number of examples; each has the same number of rows, which are adjacent if outer is 1.
        outer: number of parts, one after another, that each have the same number of adjacent rows of every example: those of a
            sequence-first input (T, B, n) have T parts of one row of each of B examples.
        share: the fraction of the rows that is kept, if the rows are sampled; their squares are weighted by its inverse.
        make: makes the rows, if inputs and gradients are still those of the module, because a kernel reads them as they are.
        mask: if rows of A are left out because they carry no loss, whether a row counts: (rows, 1) of a matrix; (N, positions)
            of images (N, C, *spatial), or (N, 1) where whole images are left out. The inputs themselves are not masked.
        left_out: how many of the (sampled) rows do not count, (), on the device.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    input_window: ops.Window
    gradient_window: ops.Window
    input_count: int
    terms: int
    examples: int = 0
    share: float = 1  # an integer, because torch.compile with dynamic shapes would make 1.0 an input of its graph
    outer: int = 1
    make: Callable[[], Rows] | None = None
    mask: Tensor | None = None
    left_out: Tensor | None = None

    def made(self) -> Rows:
        """The rows as matrices or images."""
        return self if self.make is None else self.make()

    @property
    def windows(self) -> list[ops.Window]:
        """Windows of inputs, then of gradients, as `kernels.ops.covariance_ema` takes them."""
        return [self.input_window] * len(self.inputs) + [self.gradient_window] * len(self.gradients)

    @property
    def taken(self) -> int:
        """Rows of A that inputs contain: all of them, unless they are sampled."""
        first = self.gradients[0]
        return len(first) * (first.shape[2:].numel() if first.dim() > 2 else 1)

    def with_mask(self, by_example: bool | Tensor = False, unless: Tensor | None = None) -> Rows:
        """The rows with a mask of those whose own gradient is exactly zero, in all channel groups: they carry no loss.

        G and EKFAC's moments need none, as such a row adds nothing to them.

        Args:
            by_example: leaves out only whole examples, whose rows all have a gradient of zero. A row of another example then
                stays, although its gradient may be zero as well (units that are not active, a token that is not pooled). May be
                a flag on the device for matrices.
            unless: a flag on the device, (): if it is true, no row is left out. With by_example may be one for each example.
        """
        rows = self.made()
        flags = rows._with_gradient()
        mask = flags.reshape(len(flags), flags.shape[1:].numel())  # the numel of no dimension is 1
        other = None if unless is None else unless.reshape(-1, 1)
        if by_example is not False and rows.examples:
            of_example = rows._by_example(flags)
            carries = of_example.any(2).any(0).reshape(-1, 1)
            carries = carries if other is None else carries | other
            if flags.dim() == 1:
                carries = carries.expand_as(of_example).reshape(-1, 1)
            mask = carries if by_example is True else mask | (carries & by_example)
        return rows._replace(mask=mask if other is None or by_example is True else mask | other)

    def carrying(self, are_tokens: bool) -> Tensor:
        """How many rows, or examples, have a gradient that is not exactly zero, () on the device."""
        rows = self.made()
        flags = rows._with_gradient()
        return (flags if are_tokens or not rows.examples else rows._by_example(flags).any(2).any(0)).sum()

    def _with_gradient(self) -> Tensor:
        """Which rows, or positions of images, have a gradient that is not exactly zero in all channel groups."""
        gradient = self.gradients[0] if len(self.gradients) == 1 else torch.cat(self.gradients, 1)
        return (gradient != 0).any(1)

    def _by_example(self, flags: Tensor) -> Tensor:
        """Flags of rows as (outer, examples, rows of an example in a part)."""
        return flags.reshape(self.outer, self.examples, flags.numel() // (self.outer * self.examples))

    def with_count(self) -> Rows:
        """The rows with the number of those that the mask leaves out."""
        if self.mask is None:
            return self
        return self._replace(left_out=(~self.mask).sum() * (self.taken // max(1, self.mask.numel())))

    def sample(self, every: int, step: int) -> Rows:
        """Every n-th row (of a matrix) or example (of a convolution), starting with number step modulo n, as views.

        n is `meeting_all(every, m)` with m adjacent rows of an example or, if there are several parts, m rows of a part.
        """
        if self.make is not None:
            return self.make().sample(every, step)
        rows = len(self.gradients[0])
        every = meeting_all(every, rows // (self.outer if self.outer > 1 else self.examples or rows or 1))
        first = min(step % every, max(0, rows - 1))
        return self._part(lambda x: x[first::every])

    def sample_compiled(self, every: int) -> Rows:
        """One of each `every` neighbouring rows, or examples: in all steps the same ones, as a copy.

        Which neighbour it is depends on a hash of their number, so that every position is seen as often as in a random choice.
        (The stride of `sample` depends on the number of rows of an example, for each of which the pass would be compiled anew.)
        """
        if self.make is not None:
            return self.make().sample_compiled(every)
        rows = len(self.gradients[0])
        first = torch.arange(0, rows, every, device=self.gradients[0].device)
        chosen = (first + _hash(first // every) * every // 2**32).clamp(max=rows - 1)
        return self._part(lambda x: x[chosen])

    def _part(self, take: Callable[[Tensor], Tensor]) -> Rows:
        inputs, gradients = [take(x) for x in self.inputs], [take(x) for x in self.gradients]
        share = max(1, len(gradients[0])) / max(1, len(self.gradients[0]))
        mask = None if self.mask is None else take(self.mask)
        return self._replace(inputs=inputs, gradients=gradients, share=share, examples=len(gradients[0]), outer=1, mask=mask)


def meeting_all(every: int, positions: int) -> int:
    """The smallest stride, from `every` on, that has no common divisor with the number of positions of an example.

    With another one, a step would see the same few positions of each example.
    """
    while math.gcd(every, max(1, positions)) > 1:
        every += 1
    return every


def _hash(numbers: Tensor) -> Tensor:
    """Numbers below 2^32, equally distributed: multiplicative hashing (Knuth, TAOCP 6.4), high bits mixed into low ones."""
    mixed = numbers * 2654435769 % 2**32
    mixed = (mixed ^ (mixed >> 16)) * 1812433253 % 2**32
    return mixed ^ (mixed >> 13)
