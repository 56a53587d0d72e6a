"""Sums and counts of the statistics of one layer, which backward passes add to between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.device_tables import device_table
from ..layers import Layer, Rows
from ..layers.partition import Part
from .diagonal_sums import squared_rows
from .ekfac_moments import Moments
from .gate import Gate


@dataclass
class Counts:
    """Counts for one layer: numbers on the host, or tensors on the device, which may have an entry for each layer.

    Attributes:
        rows: rows of A.
        terms: loss terms.
        taken: loss terms whose rows were kept, if rows are sampled.
        passes: passes that were summed.
    """

    rows: Any = 0
    terms: Any = 0
    taken: Any = 0
    passes: Any = 0


class SharedCounts(NamedTuple):
    """One layer's views of tensors that all layers share, so that one operation clears them for all layers.

    Attributes:
        counts: `Counts` on the device, (4,), because a compiled pass cannot change Python numbers.
        beta: for each sum, the weight of its contents when a pass is added. Zero overwrites them, so sums are never cleared.
    """

    counts: Tensor
    beta: Tensor


class FactorSum(NamedTuple):
    """A factor of the layer, and the buffer in which passes are summed."""

    part: Part
    slot: int
    total: Tensor


class Statistics:
    """Sums and counts of one layer since the last step.

    A pass is summed at once, in buffers of the size of the factors. If the kernels process many layers in one launch, a pass
    whose rows need no more memory than those buffers is deferred until the step, and then added directly to the factors.

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
        self._alpha = torch.ones_like(shared.beta)
        self._beta = shared.beta
        self._last_backward = -1

    @property
    def counts(self) -> Tensor:
        """Rows of A and loss terms of all passes, (2,)."""
        return merged([self], self.on_device.device)[0, :2]

    def add(self, x: Tensor, gradient: Tensor, owned_by_autograd: bool = False) -> None:
        """Adds one backward pass through the layer.

        Args:
            x: input of the module.
            gradient: with respect to its output.
            owned_by_autograd: whether x is a result of the model. An input that the user may overwrite before the step must be
                summed at once.
        """
        gate, is_compiling = self.gate, torch.compiler.is_compiling()
        if not is_compiling:
            gate.notice()
            if not gate.records:
                return
        rows = self.layer.rows(x, gradient)
        if self.moments is not None and not is_compiling:
            self.moments.add(rows)
        every = gate.stride_for(rows.input_count)
        if every > 1:
            rows = rows.sample(every, 0 if is_compiling else gate.step % every)
        if is_compiling:  # a second call in one backward pass cannot be recognized, so every call is counted
            self._sum(rows, gate.counts_terms, gate.weight)
            terms = rows.terms if gate.empirical else gate.compiled_terms
            self._count_on_device(rows.input_count * gate.weight, terms, rows.share, gate.weight)
            return
        if owned_by_autograd and self._may_wait and gate.counts_terms and not self.on_host.passes and self._is_small(rows):
            self.deferred.append(rows)
        else:
            # Either all passes are deferred or none: a step that fails needs the old factor, which the buffers then hold.
            for deferred in self.deferred:
                self._sum(deferred, with_inputs=True)
            self.deferred = []
            self._sum(rows, with_inputs=gate.counts_terms)
            self.on_host.passes += 1
        last, self._last_backward = self._last_backward, torch._C._current_graph_task_id()
        if not gate.counts_terms:
            return
        self.on_host.rows += rows.input_count
        if self._last_backward == last:  # a second call of the module in one backward pass has the same loss terms
            return
        terms = rows.terms if gate.terms is None else gate.terms
        if isinstance(terms, Tensor):
            self._count_on_device(0, terms, rows.share, 0)
        else:
            self.on_host.terms += terms
            self.on_host.taken += terms * rows.share

    def clear(self) -> None:
        """Clears everything except the shared tensors."""
        self.on_host = Counts()
        self.deferred = []
        if self.moments is not None:
            self.moments.fresh = False

    def _count_on_device(self, rows: Tensor | float, terms: Tensor | float, share: float, passes: Tensor | float) -> None:
        for place, added in enumerate((rows, terms, terms * share, passes)):
            self.on_device[place].add_(added)  # without unbind, whose views a compiled forward pass would save

    def _is_small(self, rows: Rows) -> bool:
        return sum(x.nbytes for x in rows.inputs + rows.gradients) <= sum(e.total.nbytes for e in self.dense)

    def read(self, entries: list[FactorSum], rows: Rows) -> tuple[list[Tensor], list[ops.Window], list[bool]]:
        """(sources, windows, ones column) of some dense factors, as `kernels.ops.covariance_ema` takes them."""
        found = [e.part.sources(rows) for e in entries]
        return [x for x, _ in found], [window for _, window in found], [e.part.has_bias_column for e in entries]

    def _sum(self, rows: Rows, with_inputs: bool, weight: Tensor | None = None) -> None:
        """Adds one pass to the sums: to all of them, or only to those of G."""
        first = 0 if with_inputs else sum(e.part.is_input for e in self.dense)
        entries = self.dense[first:]
        alpha = self._alpha if weight is None else self._alpha * weight
        if entries:
            sources, windows, ones = self.read(entries, rows)
            places = slice(first, len(self.dense))
            totals = [e.total for e in entries]
            ops.covariance_ema(totals, sources, alpha[places], self._beta[places], ones, windows, backend=self._backend)
            self._beta[places].fill_(1.0)
        for number, entry in enumerate(self.diagonal, len(self.dense)):
            if with_inputs or not entry.part.is_input:
                added = self._squares(entry.part, rows, entry.total) * alpha[number]
                # An old sum that does not count may contain a NaN, so it is not multiplied by zero.
                entry.total.copy_(torch.where(self._beta[number] > 0, entry.total + added, added))
                self._beta[number].fill_(1.0)

    def _squares(self, part: Part, rows: Rows, total: Tensor) -> Tensor:
        if part.is_input and self.layer.constant_input:
            return torch.full_like(total, rows.input_count)
        source, window = part.sources(rows)
        squares = squared_rows(source, window, part.size - part.has_bias_column, total.dtype)
        if not part.has_bias_column:
            return squares
        return torch.cat([squares, squares.new_full((1,), rows.input_count)])


def merged(statistics: Sequence[Statistics], device: torch.device) -> Tensor:
    """The counts of host and device for each layer, (layers, 4), in the order of `Counts`; the host does not wait."""
    on_host = device_table(tuple(tuple(map(float, astuple(s.on_host))) for s in statistics), device, torch.float64)
    return torch.stack([s.on_device.to(device) for s in statistics]) + on_host
