"""FactorBank: all factors of one padded size are in one (B, n, n) stack, so that one kernel launch updates many layers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import ops, runtime
from ..layers.partition import FactorSpec
from .diagonal import DiagonalFactors
from .factor_stack import FactorStack, blend_stores, newest_weight, padded
from .groups import SideGroup, TileGroup

_Kind = tuple[bool, int, torch.dtype, torch.device]  # diagonal, padded size, dtype and device: those of one store


class FactorBank:
    """Storage and moving averages of all factors.

    Every factor has a slot. Slots are numbered consecutively through all stores, and vectors over slots (`updates`, traces,
    dampings) are in that order.

    Args:
        specs: the factors.
        tiles: for each tile, the indices of its factors A and G in specs; tiles may share factors.
        is_compact: whether dense factors are kept in 16 bits between steps.
        backend: of the kernels.

    Attributes:
        stacks: dense factors, one stack for each padded size, dtype and device.
        diagonals: diagonal factors, one store for each dtype and device.
        stores: stacks, then diagonals.
        groups: the tile groups.
        slots: slot of each factor in specs.
        order: the factor in each slot, as an index of specs.
        places: for each slot, the index of its store in `stores`, and that of the factor in the store.
        updates: number of accepted updates of each factor, (slots,).
        sampling: for each factor, 1 over the number of rows that its moving average stands for, (slots,), in double precision:
            sum_t w_t^2 / rows_t with the weight w_t of each update; zero before the first one. See `count_rows`.
    """

    def __init__(
        self, specs: Sequence[FactorSpec], tiles: Sequence[tuple[int, int]], is_compact: bool = False, backend: str = "auto"
    ) -> None:
        kind_of = [self._kind(spec) for spec in specs]
        by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, (a, g) in enumerate(tiles):
            by_shape[(kind_of[g], kind_of[a], *(specs[i].size for i in (g, a) if specs[i].diagonal))].append(index)
        members: dict[_Kind, dict[int, None]] = defaultdict(dict)
        for indices in by_shape.values():  # in the order of tiles, so that the factors of a group are consecutive
            for side in (0, 1):
                for number in (tiles[i][side] for i in indices):
                    members[kind_of[number]][number] = None
        kinds = sorted(members, key=lambda kind: kind[0])  # dense ones first
        self.order = [number for kind in kinds for number in members[kind]]
        self.stacks: list[FactorStack] = []
        self.diagonals: list[DiagonalFactors] = []
        for kind in kinds:
            is_diagonal, _, dtype, device = kind
            sizes = [specs[i].size for i in members[kind]]
            if is_diagonal:
                self.diagonals.append(DiagonalFactors(sizes, dtype, device))
            else:
                self.stacks.append(FactorStack(sizes, dtype, device, is_compact))
        self.stores: list[FactorStack | DiagonalFactors] = [*self.stacks, *self.diagonals]
        self._diagonal_sizes = [size for store in self.diagonals for size in store.sizes]
        self.places = [(k, i) for k, store in enumerate(self.stores) for i in range(len(store))]
        self.slots = sorted(range(len(specs)), key=self.order.__getitem__)

        def side_group(indices: list[int], side: int) -> SideGroup:
            stores, places = zip(*(self.places[self.slots[tiles[i][side]]] for i in indices), strict=True)
            return SideGroup(stores[0], places)

        self.groups = [TileGroup(tuple(i), side_group(i, 0), side_group(i, 1)) for i in by_shape.values()]
        self.home = specs[0].device
        self.sizes = torch.tensor([size for store in self.stores for size in store.sizes], device=self.home)
        self.updates = torch.zeros(len(specs), device=self.home)
        self.sampling = torch.zeros(len(specs), dtype=torch.float64, device=self.home)
        self._backend, self._is_compact = backend, is_compact
        # The stores that one launch can process: those of one type and device.
        kinds_of_stores: dict[tuple[torch.dtype, torch.device], list[int]] = defaultdict(list)
        for number, store in enumerate(self.stores):
            kinds_of_stores[store.sums.dtype, store.sums.device].append(number)
        self._together = list(kinds_of_stores.values())
        self._have_kernel = [
            dtype == torch.float32 and runtime.choose("blend", backend, device, lambda: None)
            for dtype, device in kinds_of_stores
        ]

    @staticmethod
    def _kind(spec: FactorSpec) -> _Kind:
        return spec.diagonal, 0 if spec.diagonal else padded(spec.size), spec.dtype, spec.device

    def view(self, slot: int) -> Tensor:
        """The factor in a slot without padding, (n, n), or its diagonal, (n,): a view, or a copy if it is kept in 16 bits."""
        store, index = self.places[slot]
        return self.stores[store].view(index)

    def write(self, slot: int, value: Tensor) -> None:
        """Overwrites the factor in a slot."""
        store, index = self.places[slot]
        self.stores[store].write(index, value)

    def padded_view(self, slot: int) -> Tensor:
        """The dense factor in a slot with its padding: a view."""
        store, index = self.places[slot]
        return self.stacks[store].factors[index]

    def sum_of(self, slot: int) -> Tensor:
        """Where backward passes accumulate a factor, with its padding: a view."""
        store, index = self.places[slot]
        return self.stores[store].piece(self.stores[store].sums, index)

    def runs(self) -> list[slice]:
        """The slots of each store."""
        starts = itertools.accumulate(map(len, self.stores), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(starts)]

    def traces(self) -> Tensor:
        """Trace of every factor, (slots,)."""
        if self._is_compact:  # one unpacked stack at a time
            return torch.cat([store.traces(store.factors).to(self.home) for store in self.stores])
        return self._traces([store.factors for store in self.stores])

    def sum_traces(self) -> Tensor:
        """Trace of every sum, (slots,): it is finite exactly when the sum is."""
        return self._traces([store.sums for store in self.stores])

    def _traces(self, tensors: list[Tensor]) -> Tensor:
        if self._have_kernel != [True]:
            return torch.cat([store.traces(x).to(self.home) for store, x in zip(self.stores, tensors, strict=True)])
        out = self.updates.new_empty(len(self.updates), dtype=torch.float32)
        ops.traces(tensors, out, self._diagonal_sizes, backend=self._backend)
        return out

    def weights(self, accept: Tensor, ema_decay: float) -> Tensor:
        """Counts an update of the accepted slots and returns the weights of the new statistics, (slots,); see `newest_weight`.

        Args:
            accept: flags (slots,); the count of the others does not change.
            ema_decay: weight of the past, in [0, 1).
        """
        self.updates += accept
        return newest_weight(self.updates, ema_decay)

    def count_rows(self, rate: Tensor, rows: Tensor, accept: Tensor) -> None:
        """Notes of how many rows the accepted updates were.

        With the weight r of the newest update the average of independent rows has the variance of a mean of R rows, where
        1 / R <- (1 - r)^2 / R + r^2 / rows.

        Args:
            rate: r, as `weights` returns it, (slots,).
            rows: (slots,).
            accept: flags (slots,).
        """
        self.sampling.copy_(torch.where(accept, (1 - rate).square() * self.sampling + rate.square() / rows, self.sampling))

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, summed: Tensor, step: int = 0) -> None:
        """Sets accepted factors to keep * factor + gain * sum; `roll_back` can undo it. All vectors are over slots.

        Accepted factors without a sum, of which `summed` is false, change later in the step, by another operation. They are
        only copied, into their unused sums, so that `roll_back` can undo that, too.
        """
        runs = self.runs()
        for numbers, has_kernel in zip(self._together, self._have_kernel, strict=True):
            stores = [self.stores[i] for i in numbers]
            old, new, accepted, have_sums = keep, gain, accept, summed
            if len(self._together) > 1:
                device = stores[0].sums.device
                old, new, accepted, have_sums = (
                    torch.cat([vector[runs[i]] for i in numbers]).to(device) for vector in (old, new, accepted, have_sums)
                )
            together = has_kernel or stores[0].sums.device.type == "cpu"
            if together and not self._is_compact:  # else one unpacked stack at a time
                blend_stores(stores, old, new, accepted, have_sums, step, self._backend)
                continue
            sizes = [len(store) for store in stores]
            for store, *own in zip(stores, *(x.split(sizes) for x in (old, new, accepted & have_sums)), strict=True):
                store.blend(own[0], own[1], own[2], step, self._backend)

    def roll_back(self) -> None:
        """Restores all factors that the current step has changed."""
        for store in self.stores:
            store.roll_back()
        self.commit()

    def commit(self) -> None:
        """Ends the step: the factors can no longer be rolled back, and the sums may be overwritten."""
        for store in self.stores:
            store.old = None
