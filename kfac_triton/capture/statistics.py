"""Sums and counts that backward passes add for one layer between two steps."""

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
    """Numbers that the host counted of one layer, or tensors: of one layer, or with an entry for each.

    Attributes:
        rows: rows of A.
        terms: loss terms.
        taken: loss terms whose rows were taken.
        passes: passes that were summed.
    """

    rows: Any = 0
    terms: Any = 0
    taken: Any = 0
    passes: Any = 0


class SharedCounts(NamedTuple):
    """One layer's part of what all layers share, so that one operation clears it for all.

    Attributes:
        counts: `Counts` of the device, (4,): a compiled pass may not touch Python numbers.
        beta: for each sum, the weight of its contents when a pass is added. With zero they are overwritten, never cleared.
    """

    counts: Tensor
    beta: Tensor


class FactorSum(NamedTuple):
    """A factor of the layer, and where its passes are summed."""

    part: Part
    slot: int
    total: Tensor


class Statistics:
    """Sums and counts of one layer since the last step.

    A pass is summed at once, in buffers of the factors' size. If the kernels take many layers in one launch, a pass whose rows
    need no more memory than those buffers waits for the step instead, and is then added directly to the factors.

    Attributes:
        dense: factors that are matrices, those of A first.
        diagonal: factors of which the diagonal is kept, those of A first.
        deferred: rows of the passes that wait for the step.
        on_host: what the host counted.
        on_device: what the device counted, (4,), in the order of `Counts`.
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
            owned_by_autograd: whether nobody but autograd holds x; a batch that the user may overwrite before the step must be
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
        if is_compiling:  # cannot tell a second call in one backward pass, and counts every one
            self._sum(rows, gate.counts_terms, gate.weight)
            terms = rows.terms if gate.empirical else gate.compiled_terms
            self._count_on_device(rows.input_count * gate.weight, terms, rows.share, gate.weight)
            return
        if owned_by_autograd and self._may_wait and gate.counts_terms and not self.on_host.passes and self._is_small(rows):
            self.deferred.append(rows)
        else:
            for waiting in self.deferred:  # all or none: a step that fails has to find the old factor in the sums' buffers
                self._sum(waiting, with_inputs=True)
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
        """Forgets everything except what it shares."""
        self.on_host = Counts()
        self.deferred = []
        if self.moments is not None:
            self.moments.fresh = False

    def _count_on_device(self, rows: Tensor | float, terms: Tensor | float, share: float, passes: Tensor | float) -> None:
        for place, added in enumerate((rows, terms, terms * share, passes)):
            self.on_device[place].add_(added)  # not unbound: a compiled forward pass would save the views

    def _is_small(self, rows: Rows) -> bool:
        return sum(x.nbytes for x in rows.inputs + rows.gradients) <= sum(e.total.nbytes for e in self.dense)

    def read(self, entries: list[FactorSum], rows: Rows) -> tuple[list[Tensor], list[ops.Window], list[bool]]:
        """(sources, windows, ones column) of some dense factors, as `kernels.ops.covariance_ema` takes them."""
        found = [e.part.sources(rows) for e in entries]
        return [x for x, _ in found], [window for _, window in found], [e.part.has_bias_column for e in entries]

    def _sum(self, rows: Rows, with_inputs: bool, weight: Tensor | None = None) -> None:
        """Adds to the sums. All of them in a pass that counts, those of G alone in another."""
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
                # The old sum is not read where it does not count: it may hold a NaN.
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
    """What host and device counted of each layer, (layers, 4), in the order of `Counts`; the host does not wait."""
    on_host = device_table(tuple(tuple(map(float, astuple(s.on_host))) for s in statistics), device, torch.float64)
    return torch.stack([s.on_device.to(device) for s in statistics]) + on_host
