"""Updates the factors from the statistics of backward passes, without waiting for the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..capture.ekfac_moments import Moments
from ..capture.gate import Gate
from ..capture.statistics import Counts, FactorSum, SharedCounts, Statistics, merged
from ..capture.tied import TiedStatistics
from ..fisher import scales
from ..kernels import ops
from ..kernels.device_tables import device_vector
from ..kernels.multi_tensor.launch import is_dense
from ..layers import Layer, Rows
from ..layers.partition import Partition, factor_dtype
from ..layers.tied import TiedLayer
from ..settings import Settings
from .factor_bank import FactorBank


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


def _shared(layers: list[Layer], entries: list[list[FactorSum]]) -> tuple[dict[int, SharedCounts], list[Tensor]]:
    """Counters of each layer by its number, and the tensors (two for each dtype and device) that they are views of."""
    parts: dict[int, SharedCounts] = {}
    whole = []
    kinds = [(layer.weight.device, factor_dtype(layer.weight)) for layer in layers]
    for device, dtype in dict.fromkeys(kinds):
        members = [i for i, kind in enumerate(kinds) if kind == (device, dtype)]
        counts = torch.zeros(len(members), 4, device=device)
        lengths = [len(entries[i]) for i in members]
        betas = torch.zeros(sum(lengths), dtype=dtype, device=device)
        for k, (i, beta) in enumerate(zip(members, betas.split(lengths), strict=True)):
            parts[i] = SharedCounts(counts[k], beta)
        whole += [counts, betas]
    return parts, whole


class FactorUpdate:
    """Statistics of all layers since the last step.

    Args:
        partition: the covered layers, divided into blocks, parts and tiles.
        bank: their factors.
        gate: opens and closes the hooks.
        backend: backend of the kernels.
        can_defer: whether small batches of rows are kept until the step, then added in one launch for all layers.
        moments: EKFAC's moments for each layer.
    """

    def __init__(
        self,
        partition: Partition,
        bank: FactorBank,
        gate: Gate,
        backend: str,
        can_defer: bool,
        moments: Sequence[Moments | None],
    ) -> None:
        self.bank = bank
        layers = partition.layers
        entries: list[list[FactorSum]] = [[] for _ in layers]
        for part, slot in zip(partition.parts, bank.slots, strict=True):
            entries[partition.blocks[part.block].layer_number].append(FactorSum(part, slot, bank.sum_of(slot)))
        shared, self._whole = _shared(layers, entries)
        self.statistics = [
            Statistics(layer, gate, entries[i], shared[i], backend, can_defer, moments[i]) for i, layer in enumerate(layers)
        ]
        self._second_uses: dict[int, TiedStatistics] = {}
        for i, layer in enumerate(layers):
            if isinstance(layer, TiedLayer):
                use = self._second_uses[i] = TiedStatistics(layer, gate, entries[i], backend)
                self.statistics[i].tied = use.statistics
                self._whole.extend(use.shared)
        self.gate = gate
        self._backend = backend
        parts = [partition.parts[i] for i in bank.order]
        self.layer_of_slot = torch.tensor([partition.blocks[part.block].layer_number for part in parts], device=bank.home)
        self._is_input = torch.tensor([part.is_input for part in parts], device=bank.home)

    def update(self, settings: Settings) -> Accepted:
        """Adds the statistics to the factors and clears them; those of a layer with a NaN or Inf are dropped."""
        home, layers = self.bank.home, len(self.statistics)
        table = merged([*self.statistics, *(use.statistics for use in self._second_uses.values())], home)
        for k, (i, use) in enumerate(self._second_uses.items(), layers):
            table[i] = use.join(table[i], table[k])
        table = table[:layers]
        counted = Counts(*table.unbind(1))
        fresh, summed = counted.terms > 0, counted.passes > 0
        finite = self._finite_sums(summed) & self._finite_passes(layers)
        accepted = fresh & finite
        if self.gate.scale is not None:
            # A skipped step can leave statistics of another loss scale. Compared on the device, so that the host does not wait.
            now = torch.as_tensor(settings.current_loss_scale(), device=home)
            accepted &= self.gate.scale.to(home) == now

        # Avoids 0 / 0 where there are no statistics. Not clamped to 1, as a weighted loss may have less than one term.
        counts = Counts(*torch.where(table > 0, table, 1.0).unbind(1))
        reduction = settings.loss_reduction if settings.fisher == "empirical" else "sum"
        moment_scale = scales.gradient_scale(counts.terms, reduction, settings.current_loss_scale())
        g_scale = moment_scale * counts.terms / counts.taken
        scale = torch.where(self._is_input, scales.input_scale(counts.rows)[self.layer_of_slot], g_scale[self.layer_of_slot])
        accept = accepted[self.layer_of_slot]
        rate = self.bank.weights(accept, settings.ema_decay)
        keep, gain = 1 - rate, rate * scale
        flags = device_vector((bool(s.deferred) for s in self.statistics), home)
        waited = (flags > 0)[self.layer_of_slot]
        if any(s.deferred for s in self.statistics):
            self.bank.back_up(waited & ~summed[self.layer_of_slot])
            self._blend_passes(keep, gain, accept)
        if not all(s.deferred for s in self.statistics) or any(s.on_host.passes for s in self.statistics):
            keep = torch.where(waited, 1.0, keep)  # `_blend_passes` has applied it already
            self.bank.blend(keep, gain, accept & summed[self.layer_of_slot], self.gate.step, self._backend)
        moments = [s.moments is not None and s.moments.fresh for s in self.statistics]
        self.forget()
        return Accepted(fresh, accepted, moments, moment_scale)

    def forget(self) -> None:
        """Drops all statistics since the last step."""
        self.gate.forget()
        for statistics in self.statistics:
            statistics.clear()
        for use in self._second_uses.values():
            use.statistics.clear()
        torch._foreach_zero_(self._whole)

    def _finite_sums(self, summed: Tensor) -> Tensor:
        """Flags (layers,) of finite sums: the diagonal of a sum of squares shows a NaN or Inf anywhere in the rows."""
        broken = ~torch.isfinite(self.bank.sum_traces())
        per_layer = torch.zeros(len(summed), dtype=torch.long, device=broken.device)
        return ~summed | (per_layer.index_add(0, self.layer_of_slot, broken.long()) == 0)

    def _finite_passes(self, layers: int) -> Tensor:
        """Flags (layers,) of finite deferred rows."""
        rows = [(i, source) for i, s in enumerate(self.statistics) for r in s.deferred for source in r.inputs + r.gradients]
        broken = torch.zeros(layers, dtype=torch.long, device=self.bank.home)
        for device in {source.device for _, source in rows}:
            members = [(i, source) for i, source in rows if source.device == device]
            squares = torch.empty(len(members), device=device)
            # Copying strided or expanded rows (channel groups, the gradient of a sum) is cheap: only small ones are deferred.
            dense = [source if is_dense(source) else source.contiguous() for _, source in members]
            ops.squares(dense, squares, backend=self._backend)
            places = device_vector((i for i, _ in members), self.bank.home)
            broken = broken.index_add(0, places, (~torch.isfinite(squares)).long().to(self.bank.home))
        return broken == 0

    def _blend_passes(self, keep: Tensor, gain: Tensor, accept: Tensor) -> None:
        """Adds the deferred rows to the factors, with one launch for each pass rather than for each layer."""
        for number in range(max(len(s.deferred) for s in self.statistics)):
            members = [(s, s.deferred[number]) for s in self.statistics if len(s.deferred) > number]
            for device in {s.dense[0].total.device for s, _ in members}:
                here = [(s, rows) for s, rows in members if s.dense[0].total.device == device]
                self._blend_rows(here, torch.ones_like(keep) if number else keep, gain, accept, device)

    def _blend_rows(
        self, members: list[tuple[Statistics, Rows]], keep: Tensor, gain: Tensor, accept: Tensor, device: torch.device
    ) -> None:
        slots = [entry.slot for statistics, _ in members for entry in statistics.dense]
        read = [statistics.read(statistics.dense, rows) for statistics, rows in members]
        sources, windows, ones = (list(itertools.chain.from_iterable(lists)) for lists in zip(*read, strict=True))
        places = device_vector(slots, self.bank.home)
        factors = [self.bank.padded_view(slot) for slot in slots]
        alpha, beta, flags = (vector[places].to(device) for vector in (gain, keep, accept))
        ops.covariance_ema(factors, sources, alpha, beta, ones, windows, flags, backend=self._backend)
