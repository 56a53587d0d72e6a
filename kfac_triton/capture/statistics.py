"""Sums and counts of the statistics of one layer, which backward passes add to between two steps."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layers import Layer, Rows
from ..layers.partition import Part
from .ekfac_moments import Moments
from .gate import LEAST_ROWS, Gate
from .row_queue import Pass, RowQueue
from .sums import Item, Kind, kind_of


@dataclass
class Counts:
    """Counts for one layer: numbers on the host, or tensors on the device, which may have an entry for each layer.

    Attributes:
        rows: rows of A.
        terms: loss terms.
        taken: rows of A that were kept, if rows are sampled; nothing depends on it.
        passes: passes that were summed.
    """

    rows: Any = 0
    terms: Any = 0
    taken: Any = 0
    passes: Any = 0

    def values(self) -> tuple[float, float, float, float]:
        """Those on the host, as a row of a table."""
        return float(self.rows), float(self.terms), float(self.taken), float(self.passes)


class SharedCounts(NamedTuple):
    """One layer's views of tensors that all layers share, so that one operation clears them for all layers.

    Attributes:
        counts: `Counts` on the device, (4,), because a compiled pass cannot change Python numbers.
        beta: for each sum, the weight of its contents when a pass is added. Zero overwrites them, so sums are never cleared.
        first: the place of the first beta in the vector that layers share.
        queue: passes that are not summed yet, of the layers that share the vector.
    """

    counts: Tensor
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
        deferred: rows of the passes that are deferred until the step.
        on_host: the counts on the host.
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
        self.deferred: list[Rows] = []
        self.tied: Statistics | None = None
        self.on_host = Counts()
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
        self._last_backward = -1

    @property
    def counts(self) -> Tensor:
        """Rows of A and loss terms of all passes, (2,)."""
        return (self.on_device + torch.tensor(self.on_host.values(), dtype=torch.float64, device=self.on_device.device))[:2]

    @property
    def rows_taken(self) -> float:
        """Rows of A that the sums have: fewer, if they are sampled."""
        return float(self.on_host.taken + self.on_device[2])

    def add(self, x: Tensor, gradient: Tensor, owned_by_autograd: bool = False) -> None:
        """Adds one backward pass through the layer.

        Args:
            x: input of the module.
            gradient: with respect to its output.
            owned_by_autograd: whether x is a result of the model. An input that the user may overwrite before the step is not
                deferred until then.
        """
        if torch.compiler.is_compiling():
            self._add_compiled(x, gradient)
            return
        gate, task = self.gate, torch._C._current_graph_task_id()
        gate.notice(task)
        if not gate.records:
            return
        rows = self.layer.rows(x, gradient)
        if self.moments is not None:
            self.moments.add(rows)
        every = gate.stride_for(rows.input_count, self._least(rows))
        if every > 1:
            rows = rows.sample(every, gate.step)
        if gate.counts_terms:
            self._count(rows, task)
        self._last_backward = task
        if owned_by_autograd and gate.counts_terms and self._defer(rows):
            return
        passes = [Pass(rows, gate.counts_terms)]
        if self.deferred:
            # Either all passes are deferred or none: a step that fails needs the old factor, which the buffers then hold.
            passes = [*(Pass(deferred, True) for deferred in self.deferred), *passes]
            self._undefer()
        self.on_host.passes += 1
        self._queue.put(self, passes)

    def _least(self, rows: Rows) -> int:
        """See `Gate.stride_for`. A diagonal is of a vocabulary, or as large as one; of rare words each occurrence counts."""
        can_choose = self.layer.samples_tokens and not self.diagonal and rows.input_count > rows.examples
        return self._least_rows if can_choose else 0

    def clear(self) -> None:
        """Clears everything except what layers share."""
        self.on_host = Counts()
        self._undefer()
        if self.moments is not None:
            self.moments.fresh = False

    def targets(self, one: Pass) -> list[tuple[Kind, Item, int]]:
        """See `row_queue.Summed`."""
        layer, rows, with_inputs = self.layer, one.rows, one.with_inputs
        return [
            (kind, Item(layer, entry.part, rows, entry.total), place)
            for kind, entries, places in self._runs
            for place, entry in enumerate(entries, self._first + places.start)
            if with_inputs or not entry.part.is_input
        ]

    def _defer(self, rows: Rows) -> bool:
        """Keeps rows until the step, unless something is summed already, or they take too much memory."""
        if not self._may_wait or self.on_host.passes:
            return False
        size = self._deferred_bytes
        for source in (*rows.inputs, *rows.gradients):
            size += source.nbytes
        if size > self._most_deferred:
            return False
        self.deferred.append(rows)
        self._deferred_bytes = size
        return True

    def _undefer(self) -> None:
        self.deferred, self._deferred_bytes = [], 0

    def _count(self, rows: Rows, task: int) -> None:
        """Counts rows and loss terms of a pass of the backward pass with this number."""
        counts = self.on_host
        counts.rows += rows.input_count
        counts.taken += rows.input_count * rows.share
        if task == self._last_backward:  # a second call of the module in one backward pass has the same loss terms
            return
        terms = rows.terms if self.gate.terms is None else self.gate.terms
        if isinstance(terms, Tensor):
            self._count_on_device(0, terms, 0, 0)
        else:
            counts.terms += terms

    def _add_compiled(self, x: Tensor, gradient: Tensor) -> None:
        """Adds a pass inside a graph of torch.compile, where a second call in one backward pass cannot be recognized."""
        gate = self.gate
        rows = self.layer.rows(x, gradient)
        every = gate.stride_for(rows.input_count, self._least(rows))
        if every > 1:
            rows = rows.sample_compiled(every)
        alpha, beta = self._alpha * gate.weight / rows.share, self._beta
        # No number that differs between equal layers (a place, a slot) may be read here: they would not share a graph.
        for kind, entries, places in self._runs:
            items = [Item(self.layer, entry.part, rows, entry.total) for entry in entries]
            kind(items, alpha[places], beta[places], self._backend)
        beta.fill_(1.0)
        terms = rows.terms if gate.empirical else gate.compiled_terms
        counted = rows.input_count * gate.weight
        self._count_on_device(counted, terms, counted * rows.share, gate.weight)

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
