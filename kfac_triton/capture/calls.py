"""Calls of the model: each has one number of loss terms N, which all layers in it share.

A call is that of the outermost module that the optimizer was given: of the model, or of a submodule that is called without it.
N is counted there, because only there it is known: the rows of a layer may be windows, pixels or routed tokens. What a backward
pass runs again (checkpointing) is no call of its own: it belongs to the call that it recomputes.

Hooks (`call_hooks.py`) tell where calls begin and end. The taps in a call carry it to the backward pass.
"""

from __future__ import annotations

import collections
import itertools
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Layer, Rows, hf_labels
from .call_arguments import checked_terms, first_tensor, own_batch_dim
from .compiled_calls import CompiledCalls

Number = float | Tensor

_NUMBERS = itertools.count()
_NOWHERE = -2
_RECOMPUTABLE = 4096  # calls that reentrant checkpointing may still run again

# How loss terms were counted, for the report.
BY_LAYER = "guessed from the shape of each layer's input, because the model's call has no tensor argument"
BY_LAYER_OF_VECTOR = "guessed from the shape of each layer's input, because the model's first argument is a vector"
BY_EXAMPLES = "examples: the first dimension of the first tensor argument of the model's call"
BY_TOKENS = "tokens: the rows of the layer that ran last in the model's call"
BY_LABELS = "labels that the Hugging Face model's own loss counts"
BY_LIKELIHOOD = "terms of the likelihood, from accumulate_fisher"
BY_USER = "loss_terms, as a number or a function"


class Call:
    """One call of the outermost module.

    Attributes:
        terms: number of its loss terms; None where only the shape of each layer's input tells.
        source: how it was counted.
        left_out: a flag on the device: some of its rows have no loss term. None if nothing says so.
        out_examples: flags of the examples without one, if there is one label for each.
        joined: the call that stands for this one and others, if a likelihood has counted the terms of all of them.
        was_used: whether a backward pass has gone through it since the last step.
        was_dropped: whether the statistics of such a pass were thrown away with the gradients.
        shape: of the first tensor argument.
        last: the layer that ran last, and the shape of its output.
        watches_first: whether the first layer tells if the argument has a batch dimension.
        watches_last: whether `last` has to be noted.
        compiled: its number on the device.
        counted_in: the backward pass whose first layer has counted the rows with a gradient.
        number: its own.
        start, stop: the numbers of the autograd nodes that it has made.
    """

    __slots__ = (
        "__weakref__", "compiled", "counted_in", "joined", "last", "left_out", "number", "out_examples", "shape", "source",
        "start", "stop", "terms", "was_dropped", "was_used", "watches_first", "watches_last",
    )  # fmt: skip

    def __init__(self, terms: Number | None = None, source: str = BY_LAYER) -> None:
        self.number = next(_NUMBERS)
        self.source_from(terms, source)
        self.left_out: Tensor | None = None
        self.out_examples: Tensor | None = None
        self.counted_in = _NOWHERE
        self.joined: Call | None = None
        self.compiled: Tensor | None = None
        self.was_used = self.was_dropped = False
        self.shape: torch.Size | None = None
        self.last: tuple[Layer, torch.Size] | None = None
        self.start = self.stop = -1

    def source_from(self, terms: Number | None, source: str) -> None:
        """Sets N, and how it is counted."""
        self.terms, self.source = terms, source
        self.watches_first, self.watches_last = source is BY_EXAMPLES, source is BY_TOKENS

    def enter(self, layer: Layer, x: Tensor) -> None:
        """The first layer runs."""
        self.watches_first = False
        if x.dim() == layer.unbatched_dim:
            self.enter_unbatched(x)

    def count_rows(self, rows: Rows, task: int, are_tokens: bool) -> None:
        """Takes the rows with a gradient for the loss terms, of the first layer that the backward pass comes through."""
        if self.counted_in != task and (self.source is BY_EXAMPLES or self.source is BY_TOKENS):
            self.counted_in = task
            self.terms = rows.carrying(are_tokens)

    def enter_unbatched(self, x: Tensor) -> None:
        """A layer has taken x for a single example without a batch dimension. If x is the call's argument, it has one."""
        if self.source is BY_EXAMPLES and x.shape == self.shape:
            self.terms = 1


class Calls:
    """Finds the calls of one model and counts their loss terms.

    Args:
        loss_terms: see `KFAC`.
        are_tokens: whether each token has a loss term, where nothing else says how many there are.
        batch_dim: the dimension of the examples in the arguments of a module.
        device: of the counts of compiled passes.

    Attributes:
        current: the call that runs, if any.
        outermost: the module that began it.
        alive: the calls through which a backward pass may still go.
        root: the number of a backward pass that recomputes layers, which reentrant checkpointing does in passes inside of it.
        compiled: the calls in which compiled layers run.
        marks_rows: whether labels that do not count leave out rows: rows="auto".
        counts_rows: whether the rows with a gradient are counted instead of all: rows="nonzero".
        sources: how loss terms were counted since the last step.
        reported: the same for the last step that had any.
    """

    def __init__(
        self,
        loss_terms: Any = "auto",
        are_tokens: bool = False,
        batch_dim: Callable[[nn.Module], int] = lambda module: 0,
        device: torch.device | None = None,
    ) -> None:
        self._asked, self.are_tokens, self._batch_dim = loss_terms, are_tokens, batch_dim
        self.current: Call | None = None
        self.outermost: nn.Module | None = None
        self._depth = 0
        self.alive: weakref.WeakSet[Call] = weakref.WeakSet()
        self._recomputable: collections.deque[Call] = collections.deque(maxlen=_RECOMPUTABLE)
        self.root: int | None = None
        self._in_backward: dict[int, Call] = {}  # by the number of the autograd node that recomputes them
        self._frame: types.FrameType | None = None
        self.compiled = CompiledCalls(device)
        self.marks_rows = self.counts_rows = False
        self.sources: set[str] = set()
        self.reported: tuple[str, ...] = ()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The forward of a module begins."""
        if self.outermost is not None:
            return
        self.outermost, self._depth = module, 0
        if torch.compiler.is_compiling():
            terms, source = self._from_arguments(module, args, kwargs)
            self.compiled.begin(None if self.counts_rows and source is not BY_USER else terms)
            return
        self._frame = sys._getframe(2)  # of the module's __call__, which calls the hook
        if (call := self._recomputed()) is not None and call.start >= 0:
            self.current = call
            self.compiled.resume(call.compiled)
            return
        self.current = call = call or Call()
        call.source_from(*self._from_arguments(module, args, kwargs))
        x = first_tensor((*args, *kwargs.values()))
        call.shape = None if x is None else x.shape
        call.start = torch.autograd._get_sequence_nr()
        self.alive.add(call)
        self.compiled.begin()
        call.compiled = self.compiled.running

    def begin_again(self) -> None:
        """The outermost module's forward begins inside of its own forward, as of a recursive model."""
        if torch.compiler.is_compiling() or _is_running(self._frame):
            self._depth += 1
        else:  # the call before was interrupted (Ctrl-C), and this is a new one
            self.outermost = None

    def end(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The forward of the outermost module has ended. The output is None if it has raised an exception."""
        if self._depth:
            self._depth -= 1
            return
        call, self.current, self.outermost, self._frame = self.current, None, None, None
        if torch.compiler.is_compiling():
            self.compiled.end(self._from_result(args, kwargs, output, None))
        elif call is not None and call.stop >= 0:
            self.compiled.resume(None)
        elif call is not None:
            call.stop = torch.autograd._get_sequence_nr()
            if callable(self._asked) or call.source is BY_TOKENS:
                call.terms = self._from_result(args, kwargs, output, call)
            # Of compiled passes the first one in the backward pass counts rows.
            counts_rows = self.counts_rows and call.source in (BY_EXAMPLES, BY_TOKENS)
            self.compiled.end(None if counts_rows else call.terms, call.left_out)

    def read_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Counts the labels of a Hugging Face model, which is outermost or a part of it, unless the user says N."""
        if self._asked != "auto" or self.outermost is None:
            return
        counted = hf_labels.count(model, args, kwargs)
        if counted is None:
            return
        terms, left_out, out_examples = counted
        if not self.marks_rows:
            left_out = out_examples = None
        if torch.compiler.is_compiling():
            self.compiled.known = terms, left_out
        elif (call := self.current) is not None and call.source is not BY_LABELS:
            call.terms, call.left_out, call.out_examples, call.source = terms, left_out, out_examples, BY_LABELS

    def alone(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        """The call that a layer runs in. Outside of any, it is one by itself; unless the user says N, its input tells it."""
        call = self.current if self.current is not None else self._recomputed()
        if call is None or (call.start < 0 and call.source is BY_LAYER):
            call = call or Call()
            if callable(self._asked):
                call.source_from(self._from_result(args, kwargs, output, None), BY_USER)
            elif not isinstance(self._asked, str):
                call.source_from(self._asked, BY_USER)
            self.alive.add(call)
        return call

    def enter_unbatched(self, x: Tensor) -> None:
        """A layer takes x for a single example without a batch dimension."""
        if self.current is not None:
            self.current.enter_unbatched(x)

    def note_ungraded(self) -> None:
        """A layer runs without gradients in a call that has them: reentrant checkpointing may run it again in backward."""
        if self.current is not None and (not self._recomputable or self._recomputable[-1] is not self.current):
            self._recomputable.append(self.current)

    def join(self, whole: Call, outputs: Tensor) -> None:
        """Lets one call stand for all that the outputs come from: a likelihood has counted their terms.

        Compiled taps are not found in the graph; `CompiledCalls` keeps its own count.
        """
        for call in _calls_in_graph(outputs):
            call.joined = whole

    def drop(self) -> None:
        """Statistics are thrown away with the gradients."""
        for call in list(self.alive):
            call.was_dropped |= call.was_used

    def end_step(self) -> None:
        """A step has taken the statistics: the backward passes of its calls are over."""
        self._recomputable.clear()

    def forget(self) -> None:
        """Forgets what belongs to the last step, and a call that was interrupted (Ctrl-C)."""
        for call in list(self.alive):
            call.was_used = False
        self.current = self.outermost = self.root = self._frame = None
        self._in_backward.clear()
        if self.sources:
            self.reported = tuple(sorted(self.sources))
            self.sources.clear()

    def _recomputed(self) -> Call | None:
        """The call that a running backward pass recomputes; None outside of backward passes."""
        task = torch._C._current_graph_task_id()
        node = torch._C._current_autograd_node() if task >= 0 else None
        if node is None:
            return None
        if self.root is None:
            self.root = task
            torch.autograd.Variable._execution_engine.queue_callback(self._end_root)
        number = node._sequence_nr()
        for call in (*reversed(self._recomputable), *self.alive):
            if call.start <= number < call.stop:
                return call
        # What is checkpointed outside of any call is one itself.
        return self._in_backward.setdefault(number, Call())

    def _end_root(self) -> None:
        self.root = None
        self._in_backward.clear()

    def _from_result(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, call: Call | None) -> Number | None:
        """N, if it is known when the call has ended, but not before."""
        if output is None:
            return None
        if callable(self._asked):
            with torch.no_grad():
                return checked_terms(self._asked(args, kwargs, output))
        if self.are_tokens and call is not None and call.last is not None:
            layer, shape = call.last
            return layer.positions(shape)
        return None

    def _from_arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Number | None, str]:
        """N, if it is known when the call begins, and how it is counted."""
        if callable(self._asked):
            return None, BY_USER
        if not isinstance(self._asked, str):
            return self._asked, BY_USER
        if self.are_tokens:
            return None, BY_TOKENS
        x = first_tensor((*args, *kwargs.values()))
        if x is None:
            return None, BY_LAYER
        # The last dimension of floating point numbers is that of the features. A vector may be one example, or one of each.
        batch_dim = max(self._batch_dim(module), own_batch_dim(module))
        free = x.dim() - x.is_floating_point()
        if not free:
            return None, BY_LAYER_OF_VECTOR
        return x.shape[batch_dim if batch_dim < free else 0], BY_EXAMPLES


def _is_running(frame: types.FrameType | None) -> bool:
    """Whether a function has not returned yet. Python refuses to clear the frame of one that runs."""
    if frame is None:
        return False
    try:
        frame.clear()
    except RuntimeError:
        return True
    return False


def _calls_in_graph(outputs: Tensor) -> set[Call]:
    """The calls whose taps are in the graph of outputs."""
    found: set[Call] = set()
    seen: set[Any] = set()
    waiting = [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        use = getattr(node, "use", None)
        if isinstance(use, tuple) and isinstance(use[0], Call):
            found.add(use[0])
        waiting += [other for other, _ in node.next_functions]
    return found
