"""The loss terms of the passes through one layer, and the weights of passes whose calls have means of their own.

With N_bk the loss terms of call k in backward pass b, and T_b = sum_k N_bk, a layer's factor is

    G = (sum_b T_b) sum_b sum_k (N_bk / T_b) sum g g^T.

So in one backward pass the losses of several calls are means of their own, which are added: G = sum_k N_k sum g g^T, the sum of
the G of each. Several backward passes accumulate the parts of one mean: with one call in each, G = N sum g g^T, N = sum_b N_b.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calls import Call, Number

_Operation = Callable[[Any, Any], Number]


class Weight(NamedTuple):
    """What the squares of a pass are multiplied by, and before they are added the sum of its group of calls so far."""

    new: Number = 1.0
    old: Number = 1.0


ONE = Weight()


def is_one(number: Number) -> bool:
    """Whether the host knows that it is 1."""
    return not isinstance(number, Tensor) and number == 1


class Arithmetic:
    """Sums, products and quotients of loss terms; of those that are on the device, each is computed once for all layers."""

    def __init__(self) -> None:
        self._known: dict[tuple[_Operation, int, int], tuple[Number, Number, Number]] = {}

    def add(self, a: Number, b: Number) -> Number:
        """A + b."""
        return self._once(operator.add, a, b)

    def multiply(self, a: Number, b: Number) -> Number:
        """A b."""
        return self._once(operator.mul, a, b)

    def share(self, part: Number, whole: Number) -> Number:
        """Part / whole; 1 if the whole is 0, where both belong to calls without loss terms."""
        return self._once(_quotient, part, whole)

    def clear(self) -> None:
        """Forgets all results."""
        self._known.clear()

    def _once(self, operation: _Operation, a: Number, b: Number) -> Number:
        if not isinstance(a, Tensor) and not isinstance(b, Tensor):
            return operation(a, b)
        key = operation, id(a), id(b)
        if key not in self._known:
            # The operands are kept, so that their numbers are not given to others.
            # In double precision, because quotients of integers would be in single.
            self._known[key] = a, b, operation(*(x.double() if isinstance(x, Tensor) else x for x in (a, b)))
        return self._known[key][2]


def _quotient(a: Number, b: Number) -> Number:
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return a / b if b else 1.0
    return torch.where(torch.as_tensor(b) > 0, a / b, 1.0)


class LossTerms:
    """Loss terms of the passes through one layer since the last step.

    Attributes:
        on_host: their sum, of numbers that the host knows.
        on_device: the others.
        group: the group of calls that the last pass belongs to.
    """

    def __init__(self, arithmetic: Arithmetic) -> None:
        self._arithmetic = arithmetic
        self.clear()

    def clear(self) -> None:
        """Forgets all passes."""
        self.on_host: float = 0
        self.on_device: list[Tensor] = []
        self.group = -1
        self._calls: dict[int, Number] = {}  # by number: a call that is referred to would seem to be in use
        self._total: Number = 0

    def add(self, call: Call, group: int, own: int) -> Weight:
        """Counts a pass through a call, which is counted once in its group.

        Args:
            call: the call.
            group: the number of the group; if it is another one than before, it begins.
            own: the terms that the layer itself counts, for a call that does not know.
        """
        if group != self.group:
            self.group, self._calls = group, {}
        elif (known := self._calls.get(call.number)) is not None:
            return ONE if len(self._calls) == 1 else Weight(self._arithmetic.share(known, self._total))
        terms = own if call.terms is None else call.terms
        if isinstance(terms, Tensor):
            self.on_device.append(terms)
        else:
            self.on_host += terms
        self._calls[call.number] = terms
        if len(self._calls) == 1:
            self._total = terms
            return ONE
        before, self._total = self._total, self._arithmetic.add(self._total, terms)
        return Weight(self._arithmetic.share(terms, self._total), self._arithmetic.share(before, self._total))
