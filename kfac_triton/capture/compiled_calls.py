"""Calls of the model in which compiled layers run, whose backward passes read no Python objects."""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

# Calls that may be between their forward and their backward pass at the same time.
IN_FLIGHT = 1 << 10


_HANDLES = itertools.count()
_CALLS: weakref.WeakValueDictionary[int, CompiledCalls] = weakref.WeakValueDictionary()


@torch.compiler.assume_constant_result
def note_compiled_tap(handle: int) -> bool:
    """Notes that torch.compile traces a tap of a model. It really runs then; in the graph it is a constant.

    (The graph itself may not change a Python object where it is a part of checkpointing.)
    """
    _CALLS[handle].has_taps = True
    return True


@torch.library.custom_op("kfac_triton::copied", mutates_args=())
def copied(number: Tensor) -> Tensor:
    """A copy that torch.compile saves for the backward pass. It would compute a clone again there, of the changed number."""
    return number.clone()


@copied.register_fake
def _(number: Tensor) -> Tensor:
    return torch.empty_like(number)


@torch.library.custom_op("kfac_triton::in_backward", mutates_args=())
def in_backward(value: Tensor, gradient: Tensor) -> Tensor:
    """A value as it is in the backward pass. What depends on no gradient, torch.compile may compute in the forward pass."""
    return value.clone()


@in_backward.register_fake
def _(value: Tensor, gradient: Tensor) -> Tensor:
    return torch.empty_like(value)


class CompiledCalls:
    """Numbers of calls, and the loss terms of each, on a device.

    A compiled tap saves the number of its call in the forward pass, when the terms need not be known yet, and looks them up in
    the backward pass. Nothing is counted until a tap has been compiled (`note_compiled_tap`).

    Attributes:
        number: of the last call, ().
        running: the number of the call that runs; 0 outside of any.
        terms: (IN_FLIGHT,), by number modulo IN_FLIGHT: loss terms of the call, -1 where only the shape of a layer's input
            tells.
        out: likewise, 1 where some rows have no loss term.
        handle: by which a graph finds this.
        has_taps: whether a tap of the model has been compiled.
        known: terms of the call that runs, and whether some rows have none.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.number = torch.ones((), dtype=torch.long, device=device)
        self._nothing, self._first = torch.zeros_like(self.number), torch.ones_like(self.number)
        self.running = self._nothing
        self.terms = torch.full((IN_FLIGHT,), -1.0, device=device)
        self.out = torch.zeros(IN_FLIGHT, device=device)
        self._marks_rows = self.has_taps = False
        self.handle = next(_HANDLES)
        _CALLS[self.handle] = self
        self.known: tuple[float | Tensor | None, Tensor | None] = None, None

    def begin(self, terms: float | Tensor | None = None) -> None:
        """A call begins, with these terms, if they are known already."""
        if torch.compiler.is_compiling():
            self.number.add_(1)
            self.running = copied(self.number)
        elif self.has_taps:
            self.number.add_(1)
            self.running = self.number.clone()
        else:
            self.running = self._first
        self.known = terms, None

    def resume(self, number: Tensor | None) -> None:
        """A backward pass runs the layers of the call with this number again (checkpointing); None: it has run them."""
        self.running = self._nothing if number is None else number

    def end(self, terms: float | Tensor | None = None, left_out: Tensor | None = None) -> None:
        """The call has ended; its terms are known now, if they are known at all."""
        if terms is None:
            terms, left_out = self.known
        number, self.running, self.known = self.running, self._nothing, (None, None)
        if not torch.compiler.is_compiling() and not self.has_taps:
            return
        place = self.place(number)
        self._marks_rows |= left_out is not None
        values = (-1.0 if terms is None else terms, 0.0 if left_out is None else left_out)
        for row, value in zip((self.terms, self.out), values if self._marks_rows else values[:1], strict=False):
            if isinstance(value, Tensor):
                row.index_copy_(0, place, value.to(row).reshape(1))
            else:
                row.index_fill_(0, place, value)

    def place(self, number: Tensor) -> Tensor:
        """Where the call with this number is in the tables."""
        return (number % IN_FLIGHT).reshape(1)  # one entry: a tensor () as an index would make the host wait

    def terms_of(self, number: Tensor, own: float | Tensor, gradient: Tensor, are_of_last: bool) -> Tensor:
        """Loss terms of the call with this number, in its backward pass.

        Args:
            number: of the call.
            own: a layer's own count, where they are not known.
            gradient: anything that only the backward pass has.
            are_of_last: whether this is that of the layer that ran last in the forward pass, the first one to ask.
        """
        if not isinstance(own, Tensor):
            own = torch.full((), own, dtype=torch.float32, device=number.device)
        return _terms_of(number, own.to(self.terms.dtype), gradient, self.handle, are_of_last)

    def left_out(self, number: Tensor, gradient: Tensor) -> Tensor:
        """Whether some rows of this call have no loss term."""
        return _left_out(number, gradient, self.handle)


# A graph that read these tables itself would save them in the forward pass, and the next call changes them.
@torch.library.custom_op("kfac_triton::terms_of_call", mutates_args=())
def _terms_of(number: Tensor, own: Tensor, gradient: Tensor, handle: int, are_of_last: bool) -> Tensor:
    calls = _CALLS.get(handle)
    if calls is None:
        return own.clone()
    place = calls.place(number)
    known = calls.terms.index_select(0, place)
    terms = torch.where((known >= 0) & (number > 0), known, own)
    if are_of_last:
        calls.terms.index_copy_(0, place, terms)
    return terms[0]


@_terms_of.register_fake
def _(number: Tensor, own: Tensor, gradient: Tensor, handle: int, are_of_last: bool) -> Tensor:
    return torch.empty_like(own)


@torch.library.custom_op("kfac_triton::left_out_of_call", mutates_args=())
def _left_out(number: Tensor, gradient: Tensor, handle: int) -> Tensor:
    calls = _CALLS.get(handle)
    if calls is None:
        return torch.zeros_like(number, dtype=torch.bool)
    return (calls.out.index_select(0, calls.place(number))[0] > 0) & (number > 0)


@_left_out.register_fake
def _(number: Tensor, gradient: Tensor, handle: int) -> Tensor:
    return torch.empty_like(number, dtype=torch.bool)
