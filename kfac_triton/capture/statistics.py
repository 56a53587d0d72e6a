"""Sums and counts of the statistics of one layer, which backward passes add to between two steps."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from ..layers import Layer, Rows
from ..layers.partition import Part
from .calls import Call
from .compiled_calls import in_backward
from .counts import Counts, MaskedCount, counted
from .ekfac_moments import Moments
from .gate import LEAST_ROWS, MOST_PASSES, Gate
from .loss_terms import ONE, LossTerms, is_one
from .row_queue import Pass, RowQueue
from .sums import Item, Kind, kind_of

# A layer's run in a forward pass: the call of the model that it was in, and the weight as it was used.
Use = tuple[Call, Tensor]


class SharedCounts(NamedTuple):
    """One layer's views of tensors that all layers share, so that one operation clears them for all layers.

    Attributes:
        counts: `Counts` on the device, (4,), because a compiled pass cannot change Python numbers.
        last_call: of the compiled passes, the last call whose terms were counted, ().
        beta: for each sum, the weight of its contents when a pass is added. Zero overwrites them, so sums are never cleared.
        first: the place of the first beta in the vector that layers share.
        queue: passes that are not summed yet, of the layers that share the vector.
    """

    counts: Tensor
    last_call: Tensor
    beta: Tensor
    first: int
    queue: RowQueue


class FactorSum(NamedTuple):
    """A factor of the layer, and the buffer in which passes are summed."""

    part: Part
    slot: int
    total: Tensor


class Statistics:
    """Sums and counts of one layer since the last step.

    A pass is summed at the end of the backward pass, together with those of other layers, in buffers of the size of the factors
    (see `RowQueue`). If the kernels process many layers in one launch, passes whose rows need no more memory than those buffers
    are deferred until the step, and then added directly to the factors.

    Attributes:
        dense: factors that are stored as matrices, those of A first.
        diagonal: factors that are stored as diagonals, those of A first.
        deferred: passes that are deferred until the step.
        terms: loss terms of the passes.
        on_host: the counts on the host.
        masked: counts of rows of passes with a mask.
        on_device: the counts on the device, (4,), in the order of `Counts`.
        tied: statistics of a second use of the weight, which is summed separately (see `capture.tied`).
    """

    def __init__(
        self,
        layer: Layer,
        gate: Gate,
        entries: list[FactorSum],
        shared: SharedCounts,
        backend: str,
        can_defer: bool,
        moments: Moments | None = None,
    ) -> None:
        self.layer = layer
        self.device = layer.weight.device  # a model that is moved has no statistics until the engine is rebuilt there
        self.gate = gate
        self.dense = sorted((e for e in entries if not e.part.diagonal), key=lambda e: not e.part.is_input)
        self.diagonal = sorted((e for e in entries if e.part.diagonal), key=lambda e: not e.part.is_input)
        self.moments = moments
        self.deferred: list[Pass] = []
        self.terms = LossTerms(gate.arithmetic)
        self.tied: Statistics | None = None
        self.on_host = Counts()
        self.masked: list[MaskedCount] = []
        self.on_device = shared.counts
        self._backend = backend
        self._may_wait = can_defer and not self.diagonal
        self._most_deferred = sum(e.total.nbytes for e in self.dense)
        self._deferred_bytes = 0
        self._alpha = torch.ones_like(shared.beta)
        self._beta = shared.beta
        self._queue = shared.queue
        self._first = shared.first
        self._least_rows = max([LEAST_ROWS, *(e.part.size for e in self.dense)])
        self._runs = _runs(layer, [*self.dense, *self.diagonal])
        self._last_call = shared.last_call
        self._weight: Tensor | None = None  # of the last pass
        self._set_aside: list[tuple[FactorSum, Tensor]] = []

    @property
    def counts(self) -> Tensor:
        """Rows of A and loss terms of all passes, (2,)."""
        return self._all_counts()[:2]

    @property
    def rows_taken(self) -> float:
        """Rows of A that the sums have: fewer, if they are sampled."""
        return float(self._all_counts()[2])

    def _all_counts(self) -> Tensor:
        device = self.on_device.device
        counts = self.on_device + torch.tensor(self.host_counts(), dtype=torch.float64, device=device)
        for terms in self.terms.on_device:
            counts[1] += terms.to(device)
        return counts + counted(self.masked).sum(0) if self.masked else counts

    def add(self, x: Tensor, gradient: Tensor, owned_by_autograd: bool = False, use: Use | None = None) -> None:
        """Adds one backward pass through the layer.

        Args:
            x: input of the module.
            gradient: with respect to its output.
            owned_by_autograd: whether x is a result of the model. An input that the user may overwrite before the step is not
                deferred until then.
            use: the run of the module that the pass belongs to; None for one that is its own call.
        """
        gate, task, layer = self.gate, torch._C._current_graph_task_id(), self.layer
        call, weight = (gate.calls.alone((x,), {}, gradient), layer.weight) if use is None else use
        if weight is not self._weight:
            # Another leaf in the place of the weight (torch.func.functional_call) gets a gradient of its own.
            if weight is not layer.weight and weight.is_leaf:
                return
            self._weight = weight if weight.is_leaf else None
        if (task != gate.counting or not call.was_used) and not gate.counts(task, weight, call):
            return
        rows = layer.rows_of_pass(x, gradient) if layer.batch_dim else layer.rows(x, gradient)
        call = gate.whole or call.joined or call
        weigh = ONE
        if gate.counts_terms:
            root = task if gate.calls.root is None else gate.calls.root
            group = 0 if gate.adds_calls == "separate" else root
            if group != self.terms.group and (self.on_host.passes or self.deferred):
                self._set_earlier_aside()
            if gate.calls.counts_rows:
                call.count_rows(rows, root, gate.calls.are_tokens)
            weigh = self.terms.add(call, group, rows.terms)
            if gate.adds_calls == "joint":
                weigh = ONE
        if self.moments is not None and gate.adds_gradients:
            self.moments.add(rows, weigh)
        every = gate.stride_for(rows.input_count, self._least(rows))
        if every > 1 or gate.masks or call.left_out is not None:
            rows = self._chosen(rows, every, call)
        if not gate.counts_terms:
            pass
        elif rows.left_out is not None:
            self.masked.append(MaskedCount(rows.left_out, rows.input_count, rows.taken))
        else:
            self.on_host.rows += rows.input_count
            self.on_host.taken += rows.input_count if rows.share == 1 else round(rows.input_count * rows.share)
        one = Pass(rows, gate.counts_terms, weigh, gate.adds_gradients)
        if self.deferred and not is_one(weigh.old):
            multiply = gate.arithmetic.multiply
            self.deferred = [p._replace(weight=p.weight._replace(new=multiply(p.weight.new, weigh.old))) for p in self.deferred]
            one = one._replace(weight=weigh._replace(old=1.0))
        if owned_by_autograd and gate.counts_terms and gate.adds_gradients and self._defer(one):
            return
        passes = [one]
        if self.deferred:
            # Either all passes are deferred or none: a step that fails needs the old factor, which the buffers then hold.
            passes = [*self.deferred, one]
            self._undefer()
        self.on_host.passes += 1
        self._queue.put(self, passes)

    def _chosen(self, rows: Rows, every: int, call: Call | None, number: Tensor | None = None) -> Rows:
        """One row in `every`, with a mask of those that carry a loss if others are to be left out."""
        gate = self.gate
        # A of a constant is 1 in any case.
        has_mask = gate.has_mask(call) and gate.counts_terms and not self.layer.constant_input
        by_example = call is None or call.out_examples is not None
        if has_mask and by_example:  # before rows of the examples are missing
            rows = gate.masked(rows, call, number)
        if every > 1:
            rows = rows.sample_compiled(every) if call is None else rows.sample(every, gate.step)
        if has_mask and not by_example:
            rows = gate.masked(rows, call, number)
        return rows.with_count()

    def _least(self, rows: Rows) -> int:
        """See `Gate.stride_for`. A diagonal is of a vocabulary, or as large as one; of rare words each occurrence counts."""
        can_choose = self.layer.samples_tokens and not self.diagonal and rows.input_count > rows.examples
        return self._least_rows if can_choose else 0

    def clear(self) -> None:
        """Clears everything except what layers share."""
        self.on_host, self.masked = Counts(), []
        self.terms.clear()
        self._undefer()
        self._set_aside = []
        if self.moments is not None:
            self.moments.clear()

    def targets(self, one: Pass) -> list[tuple[Kind, Item, int]]:
        """See `row_queue.Summed`."""
        layer, rows = self.layer, one.rows
        return [
            (kind, Item(layer, entry.part, rows, entry.total), place)
            for kind, entries, places in self._runs
            for place, entry in enumerate(entries, self._first + places.start)
            if (one.with_inputs if entry.part.is_input else one.with_gradients)
        ]

    def host_counts(self) -> tuple[float, float, float, float]:
        """What the host knows of the counts, in the order of `Counts`."""
        counts = self.on_host
        counts.terms = self.terms.on_host
        return counts.values()

    def restore(self) -> None:
        """Adds to the sums what was set aside. The queue has to be empty."""
        for entry, total in self._set_aside:
            entry.total.add_(total)
        self._set_aside = []
        if self.moments is not None:
            self.moments.restore()

    def _set_earlier_aside(self) -> None:
        """Sets aside the sums of earlier calls, if those of the calls that follow may have to be multiplied."""
        if self.gate.adds_calls != "accumulated" or self.gate.whole is not None:
            return
        calls = self.gate.calls
        if len(calls.alive) < 2 and calls.root is None:  # only one call can be in this backward pass
            return
        if self.deferred:
            self._queue.put(self, self.deferred)
            self._undefer()
            self.on_host.passes += 1
        self._queue.flush()
        gradients = [entry for entry in (*self.dense, *self.diagonal) if not entry.part.is_input]
        with torch.no_grad():
            earlier = [total for _, total in self._set_aside] or [torch.zeros_like(entry.total) for entry in gradients]
            self._set_aside = [(e, total.add_(e.total)) for e, total in zip(gradients, earlier, strict=True)]
            for entry in gradients:
                entry.total.zero_()
        if self.moments is not None:
            self.moments.set_aside()

    def _defer(self, one: Pass) -> bool:
        """Keeps rows until the step, unless something is summed already, or they take too much memory."""
        if not self._may_wait or self.on_host.passes or one.rows.mask is not None:  # a launch over rows knows no mask
            return False
        size = self._deferred_bytes
        for source in (*one.rows.inputs, *one.rows.gradients):
            size += source.nbytes
        if size > self._most_deferred:
            return False
        self.deferred.append(one)
        self._deferred_bytes = size
        return True

    def _undefer(self) -> None:
        self.deferred, self._deferred_bytes = [], 0

    def add_compiled(self, x: Tensor, gradient: Tensor, number: Tensor) -> None:
        """Adds a pass inside a graph of torch.compile.

        Such a pass cannot ask which gradients are made, nor which calls are in the same backward pass: all are accumulated.

        Args:
            x: input of the module.
            gradient: with respect to its output.
            number: of the call, see `CompiledCalls`.
        """
        gate = self.gate
        rows = self.layer.rows_of_pass(x, gradient)
        own = rows.terms if not gate.calls.counts_rows else rows.carrying(gate.calls.are_tokens)
        number, weight = in_backward(number, gradient), in_backward(gate.weight, gradient)
        rows = self._chosen(rows, gate.stride_for(rows.input_count, self._least(rows)), None, number)
        alpha, beta = self._alpha * weight / rows.share, self._beta
        # No number that differs between equal layers (a place, a slot) may be read here: they would not share a graph.
        for kind, entries, places in self._runs:
            items = [Item(self.layer, entry.part, rows, entry.total) for entry in entries]
            kind(items, alpha[places], beta[places], self._backend)
        beta.fill_(1.0)
        terms = in_backward(gate.compiled_terms, gradient)
        if gate.empirical:
            is_counted_here = gate.calls.are_tokens or gate.calls.counts_rows
            terms = gate.calls.compiled.terms_of(number, own, gradient, is_counted_here)
        # The layer may have run several times in the call, whose terms count once in each backward pass.
        this = number.to(self.device) * MOST_PASSES + in_backward(gate.compiled_pass, gradient) + 1
        is_other = ((self._last_call != this) | (this <= MOST_PASSES)) * (weight > 0)
        self._last_call.copy_(torch.where(weight > 0, this, self._last_call))
        taken = rows.input_count * rows.share if rows.left_out is None else rows.taken - rows.left_out
        # Of all rows if none is left out, to the last digit.
        count = rows.input_count if rows.left_out is None else taken * rows.input_count / max(1, rows.taken)
        self._count_on_device(count * weight, terms * is_other * weight, taken * weight, weight)

    def _count_on_device(self, *added: Tensor | float) -> None:
        for place, number in enumerate(added):
            self.on_device[place].add_(number)  # without unbind, whose views a compiled forward pass would save


def _runs(layer: Layer, entries: list[FactorSum]) -> list[tuple[Kind, list[FactorSum], slice]]:
    """Neighbours that are summed in the same way, and where they are among the sums of the layer."""
    runs, first = [], 0
    for kind, members in itertools.groupby(entries, key=lambda entry: kind_of(layer, entry.part)):
        neighbours = list(members)
        runs.append((kind, neighbours, slice(first, first + len(neighbours))))
        first += len(neighbours)
    return runs
