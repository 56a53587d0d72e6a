"""From what backward passes left behind to the factors, without a word from the device on the way."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from . import fisher
from .capture import Gate, Shared, Statistics
from .factors import FactorBank, factor_dtype
from .kernels import ops
from .kernels.addresses import device_table
from .kernels.lists import is_dense
from .layers import Layer, Rows
from .settings import Settings


@dataclass(frozen=True)
class Outcome:
    """What became of the layers' statistics, flags (layers,): `fresh` where some came, `accept` where they were finite too."""

    fresh: Tensor
    accept: Tensor


@dataclass(frozen=True)
class _Pool:
    """What layers share: their parts, and the tensors, a pair a device, that these are views of."""

    parts: list[Shared]
    whole: list[Tensor]


def _shared(layers: list[Layer]) -> _Pool:
    parts: dict[int, Shared] = {}
    whole = []
    kinds = dict.fromkeys((layer.weight.device, factor_dtype(layer.weight)) for layer in layers)
    for device, dtype in kinds:
        members = [i for i, x in enumerate(layers) if (x.weight.device, factor_dtype(x.weight)) == (device, dtype)]
        counts = torch.zeros(len(members), 2, device=device)
        betas = torch.zeros(sum(2 * layers[i].groups for i in members), dtype=dtype, device=device)
        pieces = betas.split([2 * layers[i].groups for i in members])
        parts.update((i, Shared(counts[k], pieces[k])) for k, i in enumerate(members))
        whole += [counts, betas]
    return _Pool([parts[i] for i in range(len(layers))], whole)


class Collector:
    """Statistics of all layers since the last step.

    Args:
        layers: the covered layers.
        bank: their factors.
        gate: switch of the hooks.
        backend: of the kernels.
        may_wait: whether small passes wait for the step, to go into the factors in one launch for all layers.
    """

    def __init__(self, layers: list[Layer], bank: FactorBank, gate: Gate, backend: str, may_wait: bool) -> None:
        self.bank = bank
        self.statistics: list[Statistics] = []
        self._blocks: list[range] = []
        self._shared = _shared(layers)
        first = 0
        for number, layer in enumerate(layers):
            blocks = range(first, first + layer.groups)
            first += layer.groups
            sums = [bank.sums_of(block) for block in blocks]
            flat = [a for a, _ in sums] + [g for _, g in sums]
            self.statistics.append(Statistics(layer, gate, flat, self._shared.parts[number], backend, may_wait))
            self._blocks.append(blocks)
        self._backend = backend
        self._layer_of_block = torch.tensor(
            [i for i, blocks in enumerate(self._blocks) for _ in blocks], device=bank.home, dtype=torch.long
        )

    def update(self, settings: Settings) -> Outcome:
        """Blends the statistics into the factors and forgets them; those of a layer with a NaN or Inf are dropped."""
        home, layers = self.bank.home, len(self.statistics)
        eager = device_table(tuple((s.eager_counts[0], s.eager_counts[1], int(s.summed)) for s in self.statistics), home)
        compiled = torch.stack([s.compiled_counts.to(home) for s in self.statistics])
        counts = compiled + eager[:, :2]
        fresh = counts[:, 1] > 0
        summed = (compiled[:, 1] > 0) | (eager[:, 2] > 0)
        finite = self._finite_sums(summed) & self._finite_passes(layers)
        outcome = Outcome(fresh, fresh & finite)

        counts = counts.clamp_min(1).double()[self._layer_of_block]
        g_scale = fisher.gradient_scale(counts[:, 1], settings.loss_reduction, settings.current_loss_scale())
        scale = self.bank.scatter(fisher.input_scale(counts[:, 0]), g_scale)
        accept = self._over_slots(outcome.accept)
        rate = self.bank.weights(accept, settings.ema_decay)
        keep, gain = 1 - rate, rate * scale
        waited = self._blend_passes(keep, gain, accept)
        if not all(s.passes for s in self.statistics) or any(s.summed for s in self.statistics):
            keep = torch.where(self._over_slots(waited), 1.0, keep)  # it has been weighted already
            self.bank.blend(keep, gain, accept & self._over_slots(summed), self._backend)
        for statistics in self.statistics:
            statistics.clear()
        torch._foreach_zero_(self._shared.whole)
        return outcome

    def _over_slots(self, per_layer: Tensor) -> Tensor:
        blocks = per_layer[self._layer_of_block]
        return self.bank.scatter(blocks, blocks)

    def _finite_sums(self, summed: Tensor) -> Tensor:
        """Flags (layers,). A NaN or Inf anywhere in the rows is in the diagonal of the sum of their squares."""
        traces = self.bank.sum_traces()
        finite = torch.isfinite(traces)
        broken = ~(finite[self.bank.a_slots] & finite[self.bank.g_slots])
        per_layer = torch.zeros(len(summed), dtype=torch.long, device=broken.device)
        return ~summed | (per_layer.index_add(0, self._layer_of_block, broken.long()) == 0)

    def _finite_passes(self, layers: int) -> Tensor:
        """Flags (layers,) of what waited."""
        rows = [(i, source) for i, s in enumerate(self.statistics) for r in s.passes for source in r.inputs + r.gradients]
        broken = torch.zeros(layers, dtype=torch.long, device=self.bank.home)
        for device in {source.device for _, source in rows}:
            members = [(i, source) for i, source in rows if source.device == device]
            squares = torch.empty(len(members), device=device)
            # What has gaps (a channel group) or repeats (the gradient of a sum) is small here, or it would not have waited.
            dense = [source if is_dense(source) else source.contiguous() for _, source in members]
            ops.squares(dense, squares, backend=self._backend)
            places = device_table(tuple((i,) for i, _ in members), self.bank.home).flatten()
            broken = broken.index_add(0, places, (~torch.isfinite(squares)).long().to(self.bank.home))
        return broken == 0

    def _blend_passes(self, keep: Tensor, gain: Tensor, accept: Tensor) -> Tensor:
        """The rows that waited, straight into the factors: one launch per pass, not per layer. Flags (layers,) of these."""
        for number in itertools.count():
            members = [(i, s.passes[number]) for i, s in enumerate(self.statistics) if len(s.passes) > number]
            if not members:
                break
            for device in {self.statistics[i].sums[0].device for i, _ in members}:
                here = [(i, rows) for i, rows in members if self.statistics[i].sums[0].device == device]
                self._blend_rows(here, torch.ones_like(keep) if number else keep, gain, accept, device)
        flags = tuple((int(bool(s.passes)),) for s in self.statistics)
        return device_table(flags, self.bank.home).flatten() > 0

    def _blend_rows(
        self, members: list[tuple[int, Rows]], keep: Tensor, gain: Tensor, accept: Tensor, device: torch.device
    ) -> None:
        slots: list[int] = []
        sources: list[Tensor] = []
        ones: list[bool] = []
        windows: list[int] = []
        for i, rows in members:
            pairs = [self.bank.slots_of(block) for block in self._blocks[i]]
            slots += [a for a, _ in pairs] + [g for _, g in pairs]
            sources += rows.inputs + rows.gradients
            ones += self.statistics[i].ones_column
            windows += rows.windows
        places = device_table(tuple((slot,) for slot in slots), self.bank.home).flatten()
        factors = [self.bank.padded_view(slot) for slot in slots]
        alpha, beta, flags = (vector[places].to(device) for vector in (gain, keep, accept))
        ops.covariance_ema(factors, sources, alpha, beta, ones, windows, flags, backend=self._backend)
