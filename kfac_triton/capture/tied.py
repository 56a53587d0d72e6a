"""The second use of a tied weight: summed separately, and joined with the first before the factors are updated."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..fisher.scales import gradient_scale
from ..layers.tied import TiedLayer
from .counts import Counts
from .gate import Gate
from .statistics import FactorSum, SharedCounts, Statistics


def mirrored(entries: list[FactorSum]) -> list[FactorSum]:
    """The sums of the second use: the embedding's A is added to the layer's G, and its G to the layer's A, without the bias."""
    result = []
    for entry in entries:
        part = entry.part
        stop = part.stop - part.has_bias_column
        other = replace(part, block=0, is_input=not part.is_input, stop=stop, has_bias_column=False)
        result.append(FactorSum(other, -1, entry.total.new_zeros((other.size,) * entry.total.dim())))
    return result


class TiedStatistics:
    """Sums for the embedding of one `TiedLayer`, of the sizes of the layer's own sums.

    Args:
        layer: the tied layer.
        gate: the state that the hooks share.
        entries: the layer's factors.
        own: those of the second use (see `mirrored`).
        shared: its counts.
        backend: backend of the kernels.

    Attributes:
        statistics: filled by the hooks of the embeddings.
    """

    def __init__(
        self,
        layer: TiedLayer,
        gate: Gate,
        entries: list[FactorSum],
        own: list[FactorSum],
        shared: SharedCounts,
        backend: str,
    ) -> None:
        self._pairs = list(zip(entries, own, strict=True))
        self.statistics = Statistics(layer.second(), gate, own, shared, backend, False)

    def join(self, first_counts: Tensor, second_counts: Tensor, loss_reduction: str) -> Tensor:
        """Adds the second use to the sums of the first; returns the layer's counts.

        With n rows, n_e of the embedding, and a scale s of squared gradients, that of the first use, the two have the Fisher
        matrices s / n S_gg (x) S_hh and s / n_e S_c (x) S_e, with sums S of squares and S_c of tokens. The joined sums are
        scaled by s / n, so they are S_gg + r S_c / u and S_hh + u S_e with r = n / n_e and

            u = sqrt(tr(r S_c) tr S_hh / (tr S_gg tr S_e)).

        If only one use has statistics, its sums stay as they are.

        Args:
            first_counts: `Counts` of the first use, (4,). If there was no pass, its sums are stale and not read.
            second_counts: `Counts` of the second use.
            loss_reduction: "mean" or "sum". The joined sums are scaled by the loss terms of the first use. Where a call has had
                only one use, those of the second are others.
        """
        home = first_counts.device
        n, e = Counts(*first_counts), Counts(*second_counts)
        # Without rows a use has no statistics: no row of it carried a loss.
        summed, came = (n.passes > 0) & (n.rows > 0), (e.passes > 0) & (e.rows > 0)
        here = self.statistics.device
        sums = [
            (torch.where(summed.to(here), first.total, 0.0), torch.where(came.to(here), second.total, 0.0))
            for first, second in self._pairs
        ]

        both = summed & came
        terms = gradient_scale(e.terms, loss_reduction, 1.0) / gradient_scale(n.terms, loss_reduction, 1.0)
        terms = torch.where(both, terms, 1.0)
        sums = [
            (old, new * terms.to(new) if first.part.is_input else new)
            for (first, _), (old, new) in zip(self._pairs, sums, strict=True)
        ]

        def trace(use: int, is_input: bool) -> Tensor:
            """Over the parts of one side, A or G of the first use."""
            pieces = [
                (x[use] if first.part.diagonal else x[use].diagonal()).double().sum()
                for (first, _), x in zip(self._pairs, sums, strict=True)
                if first.part.is_input == is_input
            ]
            return torch.stack(pieces).sum().to(home)

        ratio = torch.where(both, n.rows / e.rows, 1.0)
        root = ratio * trace(1, False) * trace(0, True) / (trace(0, False) * trace(1, True))
        u = torch.where(both & torch.isfinite(root) & (root > 0), root, 1.0).sqrt()
        for (first, second), (old, new) in zip(self._pairs, sums, strict=True):
            weight = (u if first.part.is_input else ratio / u).to(first.total)
            place = (slice(second.part.size),) * new.dim()
            first.total.copy_(old)
            first.total[place] += weight * new
        return torch.where(summed, first_counts, second_counts)
