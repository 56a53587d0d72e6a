"""Updates the factors from the statistics of backward passes, without waiting for the device."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..capture.counts import Counts, counted
from ..capture.ekfac_moments import Moments
from ..capture.gate import Gate
from ..capture.loss_terms import ONE
from ..capture.row_queue import Pass, RowQueue, divided, vector_of
from ..capture.statistics import FactorSum, SharedCounts, Statistics
from ..capture.tied import TiedStatistics, mirrored
from ..fisher import scales
from ..kernels import ops
from ..kernels.device_tables import device_table, device_vector
from ..kernels.strides import is_dense
from ..layers.partition import Part, Partition
from ..layers.tied import TiedLayer
from ..settings import Settings
from .factor_bank import FactorBank

_KEPT = 16  # sets of layers with deferred rows; usually there is one


@dataclass(frozen=True)
class Accepted:
    """Which layers had statistics in an update.

    Attributes:
        fresh: flags (layers,): there were statistics.
        accept: flags (layers,): there were statistics, and they were finite.
        moments: a flag for each layer: there were moments for EKFAC.
        moment_scale: (layers,), turns sums of squared per-example gradients into their expectation over loss terms.
    """

    fresh: Tensor
    accept: Tensor
    moments: list[bool]
    moment_scale: Tensor


@dataclass(frozen=True)
class _Shared:
    """What the statistics of all layers and second uses share.

    Attributes:
        of: the part of each of them.
        counts: the counts on each device, (members, 4), and the numbers of the members.
        betas: one vector for each device and dtype.
        queues: one for each of these vectors.
    """

    of: list[SharedCounts]
    counts: list[tuple[Tensor, list[int]]]
    betas: list[Tensor]
    queues: list[RowQueue]


class _Arranged(NamedTuple):
    """The dense factors of some layers, which are the same in every step.

    In the order of slots: if all dense factors are among them, as usual, their weights need not be gathered.

    Attributes:
        parts: the place of each factor's layer in the list of layers, and the part of the layer.
        slots: of the factors.
        factors: views of them.
        has_bias_column: whether a factor has a column of ones.
    """

    parts: list[tuple[int, Part]]
    slots: list[int]
    factors: list[Tensor]
    has_bias_column: list[bool]

    @classmethod
    def of(cls, layers: Sequence[Statistics], bank: FactorBank) -> _Arranged:
        """The factors of these layers. Factors that are kept in 16 bits have no views."""
        entries = [(entry.slot, k, entry.part) for k, statistics in enumerate(layers) for entry in statistics.dense]
        entries.sort(key=lambda entry: entry[0])
        slots = [slot for slot, _, _ in entries]
        ones = [part.has_bias_column for _, _, part in entries]
        return cls([(k, part) for _, k, part in entries], slots, [bank.padded_view(slot) for slot in slots], ones)


def _by_device(rows: list[tuple[int, Tensor]]) -> list[tuple[torch.device, list[tuple[int, Tensor]]]]:
    devices = dict.fromkeys([x.device for _, x in rows])
    if len(devices) == 1:
        return [(device, rows) for device in devices]
    return [(device, [(i, x) for i, x in rows if x.device == device]) for device in devices]


def _shared(sums: list[list[FactorSum]], gate: Gate, backend: str, can_wait: bool) -> _Shared:
    """Counters for the sums of each layer or second use."""
    kinds = [(entries[0].total.device, entries[0].total.dtype) for entries in sums]
    counts: list[tuple[Tensor, list[int]]] = []
    count_of: dict[int, tuple[Tensor, Tensor]] = {}
    for device in dict.fromkeys(device for device, _ in kinds):
        members = [i for i, kind in enumerate(kinds) if kind[0] == device]
        whole = torch.zeros(len(members), 4, device=device)
        counts.append((whole, members))
        last_calls = torch.zeros(len(members), dtype=torch.long, device=device)
        count_of.update({i: (whole[k], last_calls[k]) for k, i in enumerate(members)})
    betas, queues, found = [], [], {}
    for kind in dict.fromkeys(kinds):
        members = [i for i, other in enumerate(kinds) if other == kind]
        starts = [*itertools.accumulate((len(sums[i]) for i in members), initial=0)]
        vector = torch.zeros(starts[-1], dtype=kind[1], device=kind[0])
        queue = RowQueue(vector, gate, backend, can_wait)
        for i, (start, stop) in zip(members, itertools.pairwise(starts), strict=True):
            found[i] = SharedCounts(*count_of[i], vector[start:stop], start, queue)
        betas.append(vector)
        queues.append(queue)
    return _Shared([found[i] for i in range(len(sums))], counts, betas, queues)


class FactorUpdate:
    """Statistics of all layers since the last step.

    Args:
        partition: the covered layers, divided into blocks, parts and tiles.
        bank: their factors.
        gate: opens and closes the hooks.
        backend: backend of the kernels.
        can_wait: whether the kernels sum many layers in one launch.
        can_defer: whether small batches of rows are kept until the step, then added in one launch for all layers.
        moments: EKFAC's moments for each layer.
    """

    def __init__(
        self,
        partition: Partition,
        bank: FactorBank,
        gate: Gate,
        backend: str,
        can_wait: bool,
        can_defer: bool,
        moments: Sequence[Moments | None],
    ) -> None:
        self.bank = bank
        layers = partition.layers
        entries: list[list[FactorSum]] = [[] for _ in layers]
        for part, slot in zip(partition.parts, bank.slots, strict=True):
            entries[partition.blocks[part.block].layer_number].append(FactorSum(part, slot, bank.sum_of(slot)))
        tied = {i: layer for i, layer in enumerate(layers) if isinstance(layer, TiedLayer)}
        second = {i: mirrored(entries[i]) for i in tied}
        self._shared = _shared([*entries, *second.values()], gate, backend, can_wait)
        shared = self._shared.of
        self.statistics = [
            Statistics(layer, gate, entries[i], shared[i], backend, can_defer, moments[i]) for i, layer in enumerate(layers)
        ]
        self._second_uses: dict[int, TiedStatistics] = {}
        for k, (i, layer) in enumerate(tied.items(), len(layers)):
            use = self._second_uses[i] = TiedStatistics(layer, gate, entries[i], second[i], shared[k], backend)
            self.statistics[i].tied = use.statistics
        self._everything = [*self.statistics, *(use.statistics for use in self._second_uses.values())]
        self.gate = gate
        self._backend = backend
        self._arranged: dict[tuple[int, ...], _Arranged] = {}
        parts = [partition.parts[i] for i in bank.order]
        self.layer_of_slot = torch.tensor([partition.blocks[part.block].layer_number for part in parts], device=bank.home)
        # Of the layers' scales of A, followed by those of G.
        self._scale_of_slot = self.layer_of_slot + torch.tensor(
            [0 if part.is_input else len(layers) for part in parts], device=bank.home
        )

    def update(self, settings: Settings) -> Accepted:
        """Adds the statistics to the factors and clears them; those of a layer with a NaN or Inf are dropped."""
        home, layers = self.bank.home, len(self.statistics)
        for queue in self._shared.queues:  # not empty if a backward pass has failed
            queue.flush()
        for statistics in self._everything:
            statistics.restore()
        table = self._counts()
        reduction = settings.loss_reduction if settings.fisher == "empirical" else "sum"
        for k, (i, use) in enumerate(self._second_uses.items(), layers):
            table[i] = use.join(table[i], table[k], reduction)
        table = table[:layers]
        present = table > 0
        has_rows, has_terms, _, summed = present.unbind(1)
        fresh = has_rows & has_terms  # no rows are left where no row of a layer carries a loss: like an expert without tokens
        accepted = fresh & self._finite(summed)
        if self.gate.scale is not None:
            # A skipped step can leave statistics of another loss scale. Compared on the device, so that the host does not wait.
            now = torch.as_tensor(settings.current_loss_scale(), device=home)
            accepted &= self.gate.scale.to(home) == now

        # Avoids 0 / 0 where there are no statistics. Not clamped to 1, as a weighted loss may have less than one term.
        counts = Counts(*torch.where(present, table, 1.0).unbind(1))
        moment_scale = scales.gradient_scale(counts.terms, reduction, settings.current_loss_scale())
        scale = torch.cat([scales.input_scale(counts.rows), moment_scale])[self._scale_of_slot]
        accept = accepted[self.layer_of_slot]
        rate = self.bank.weights(accept, settings.ema_decay)
        if settings.curvature == "adam":  # whose noise damping depends on them
            self.bank.count_rows(rate, counts.taken[self.layer_of_slot], accept)
        keep, gain = 1 - rate, rate * scale
        has_sum = summed[self.layer_of_slot]
        self.bank.blend(keep, gain, accept, has_sum, self.gate.step)
        if any(s.deferred for s in self.statistics):
            self._blend_passes(torch.where(has_sum, 1.0, keep), gain, accept)  # where there is a sum, it is applied already
        moments = [s.moments is not None and s.moments.fresh for s in self.statistics]
        self.gate.calls.end_step()
        self.forget()
        return Accepted(fresh, accepted, moments, moment_scale)

    def forget(self) -> None:
        """Drops all statistics since the last step."""
        self.gate.forget()
        for queue in self._shared.queues:
            queue.clear()
        for statistics in self._everything:
            statistics.clear()
        torch._foreach_zero_([*(counts for counts, _ in self._shared.counts), *self._shared.betas])

    def _counts(self) -> Tensor:
        """Counts of host and device for each layer and second use, (layers, 4), in the order of `Counts`."""
        home = self.bank.home
        on_host = device_table(tuple([s.host_counts() for s in self._everything]), home, torch.float64)
        terms = [(i, x) for i, s in enumerate(self._everything) for x in s.terms.on_device]
        if terms:
            places = device_vector([i for i, _ in terms], home)
            added = torch.stack([x.to(home, torch.float64) for _, x in terms])
            on_host = on_host.index_put((places, torch.ones_like(places)), added, accumulate=True)
        masked = [(i, one) for i, s in enumerate(self._everything) for one in s.masked]
        for device in dict.fromkeys(one.left_out.device for _, one in masked):
            here = [(i, one) for i, one in masked if one.left_out.device == device]
            added = counted([one for _, one in here]).to(home)
            on_host = on_host.index_add(0, device_vector([i for i, _ in here], home), added)
        if len(self._shared.counts) == 1:
            return on_host + self._shared.counts[0][0]
        order = [i for _, members in self._shared.counts for i in members]
        on_device = torch.cat([counts.to(home) for counts, _ in self._shared.counts])
        return on_host.index_add(0, device_vector(order, home), on_device.double())

    def _finite(self, summed: Tensor) -> Tensor:
        """Flags (layers,): a layer's sums are finite, if `summed` says that they are of this step, and its deferred rows are.

        The trace of a sum of squares shows a NaN or Inf anywhere in the rows, and so does the sum of the squares of rows. None
        of these numbers is negative, so they can be added up for each layer: in double precision, where finite ones in single
        precision do not overflow.
        """
        home, layers = self.bank.home, len(summed)
        rows = [(i, x) for i, s in enumerate(self.statistics) for p in s.deferred for x in (*p.rows.inputs, *p.rows.gradients)]
        values, places = [self.bank.sum_traces()], [self.layer_of_slot]
        for device, members in _by_device(rows):
            squares = torch.empty(len(members), device=device)
            # Copying strided or expanded rows (channel groups, the gradient of a sum) is cheap: only small ones are deferred.
            dense = [x if x.is_contiguous() or is_dense(x) else x.contiguous() for _, x in members]
            ops.squares(dense, squares, backend=self._backend)
            values.append(squares.to(home))
            places.append(device_vector([layers + i for i, _ in members], home))
        totals = torch.zeros(2 * layers, dtype=torch.float64, device=home)
        finite = totals.index_add_(0, torch.cat(places), torch.cat(values).double()) < math.inf
        return (~summed | finite[:layers]) & finite[layers:]

    def _blend_passes(self, keep: Tensor, gain: Tensor, accept: Tensor) -> None:
        """Adds the deferred rows to the factors, with one launch for each pass rather than for each layer."""
        for number in range(max([len(s.deferred) for s in self.statistics])):
            passes = [(i, s.deferred[number]) for i, s in enumerate(self.statistics) if len(s.deferred) > number]
            for device in dict.fromkeys(self.statistics[i].dense[0].total.device for i, _ in passes):
                here = [(i, one) for i, one in passes if self.statistics[i].dense[0].total.device == device]
                self._blend_rows(here, torch.ones_like(keep) if number else keep, gain, accept, device)

    def _blend_rows(
        self, passes: list[tuple[int, Pass]], keep: Tensor, gain: Tensor, accept: Tensor, device: torch.device
    ) -> None:
        """Adds a pass of each of these layers."""
        which = tuple([i for i, _ in passes])
        if which not in self._arranged:
            if len(self._arranged) >= _KEPT:
                self._arranged.clear()
            self._arranged[which] = _Arranged.of([self.statistics[i] for i in which], self.bank)
        chosen = self._arranged[which]
        read = [part.sources(passes[k][1].rows) for k, part in chosen.parts]
        sources, windows = [source for source, _ in read], [window for _, window in read]
        slots = chosen.slots
        has_neighbours = slots[-1] - slots[0] == len(slots) - 1
        places = slice(slots[0], slots[-1] + 1) if has_neighbours else device_vector(slots, self.bank.home)
        alpha, beta, flags = (vector[places].to(device) for vector in (gain, keep, accept))
        if any(one.rows.share != 1 or one.weight is not ONE for _, one in passes):
            weights = [(1.0 if part.is_input else passes[k][1].weight.new, passes[k][1].rows.share) for k, part in chosen.parts]
            alpha = alpha * vector_of([divided(*pair) for pair in weights], alpha)
        ones = chosen.has_bias_column
        ops.covariance_ema(chosen.factors, sources, alpha, beta, ones, windows, flags, backend=self._backend)
