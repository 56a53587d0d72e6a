"""FactorBank: all factors of one padded size live in one (B, n, n) stack, so that one launch serves many layers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .diagonal import DiagonalStore
from .kernels import ops
from .rounding import Rounding

ALIGNMENT = 16  # sides are padded to a multiple: an odd bias column would cost aligned loads and tensor cores


def padded(size: int) -> int:
    """The side that a factor of this size is stored with."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Single precision for every weight up to it: moving averages in 16 bits stop moving."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def newest_weight(updates: Tensor, ema_decay: float) -> Tensor:
    """Weight r of the t-th update in a moving average, given t.

    The average with bias correction (Kingma and Ba 2015, section 3) is average <- (1 - r) average + r new with
    r = (1 - decay) / (1 - decay^t): the average that starts at zero, divided by the sum of its weights. What is kept is
    always the corrected one.
    """
    return (1 - ema_decay) / (1 - ema_decay ** updates.double().clamp_min(1))


@dataclass(frozen=True)
class FactorSpec:
    """A factor to store: its side, whether only its diagonal is kept, in what precision and where."""

    size: int
    dtype: torch.dtype
    device: torch.device
    diagonal: bool = False


@dataclass(frozen=True)
class SideGroup:
    """One side of a `TileGroup`: the store of its factors, and their places in it.

    Attributes:
        store: number in `FactorBank.stores`.
        places: one a tile.
        run: the same as a slice where they are contiguous: then a stack needs no copy.
    """

    store: int
    places: tuple[int, ...]

    @property
    def run(self) -> slice | None:
        """The places as a slice of a stack, a view; None where factors are shared between tiles."""
        first = self.places[0]
        return slice(first, first + len(self.places)) if self.places == tuple(range(first, first + len(self.places))) else None


@dataclass(frozen=True)
class TileGroup:
    """Tiles whose gradients have one padded shape and whose factors are of one kind: one launch for all."""

    tiles: tuple[int, ...]
    a: SideGroup
    g: SideGroup


class FactorStack:
    """Factors of one padded size, and as many sums of the current step.

    The pad is zero, so that damping alone fills it and no spectrum is widened. Once the sums are in the factors, their buffer
    keeps the old factors until the step is over.

    Args:
        sizes: of the factors.
        side: padded.
        dtype: that sums and inverses have.
        device: where they are.
        is_compact: whether factors are kept in 16 bits between steps.
    """

    def __init__(self, sizes: list[int], side: int, dtype: torch.dtype, device: torch.device, is_compact: bool = False) -> None:
        self.sizes = sizes
        self.sums = torch.zeros(len(sizes), side, side, dtype=dtype, device=device)
        self._stored = torch.zeros_like(self.sums, dtype=torch.bfloat16 if is_compact else dtype)
        self._rounding = Rounding(device) if is_compact else None
        self.old: Tensor | None = None  # flags (B,): of which factors sums holds the old ones
        self._before: Tensor | None = None  # the old factors, while they are on their way there

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def factors(self) -> Tensor:
        """The stack itself; of one kept in 16 bits a copy in full precision, to be given to `store`."""
        return self._stored if self._rounding is None else self._stored.to(self.sums.dtype)

    @property
    def nbytes(self) -> int:
        """Memory of the factors."""
        return self._stored.nbytes

    def store(self, factors: Tensor, step: int = 0) -> None:
        """Keeps what was `factors` and has been written to; what is rounded at random is so by numbers of this step."""
        if self._rounding is not None:
            self._stored.copy_(self._rounding(factors, step))

    def back_up(self, places: Tensor) -> None:
        """Copies the factors with these flags (B,) into the buffers of their sums, which hold nothing of use."""
        torch.where(places[:, None, None], self.factors, self.sums, out=self.sums)
        self.old = places

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, step: int, backend: str) -> None:
        """Factor <- keep factor + gain sum where accepted; vectors (B,). What was not backed up before is so now."""
        factors, everywhere = self.factors, torch.ones_like(accept)
        if self._rounding is None:  # else `_stored` has them until `store`
            self._before = factors.clone()
        before = self._stored if self._before is None else self._before
        ops.blend(factors, self.sums, keep, gain, accept, backend=backend)
        if self.old is None:
            self.sums.copy_(before)
        else:
            torch.where(self.old[:, None, None], self.sums, before.to(self.sums.dtype), out=self.sums)
        self.old, self._before = everywhere, None
        self.store(factors, step)

    def roll_back(self) -> None:
        """Puts the old factors back."""
        factors = self.factors
        if self._before is not None:  # stopped in the middle of `blend`
            factors.copy_(self._before)
        if self.old is not None:
            torch.where(self.old[:, None, None], self.sums, factors, out=factors)
        self._before = None
        self.store(factors)  # numbers that need no rounding


class FactorBank:
    """Storage and moving average of all factors.

    Every factor has a slot, numbered through all stores; vectors over slots (`updates`, traces, dampings) use that number.

    Args:
        specs: the factors.
        tiles: per tile the numbers of its factors A and G in specs; tiles may share factors.
        is_compact: whether dense factors are kept in 16 bits between steps.

    Attributes:
        stacks: dense factors, one stack per padded size, dtype and device.
        diagonals: diagonal ones, one store per dtype and device.
        stores: stacks, then diagonals.
        groups: tiles by shape of their gradient.
        slots: slot of each factor of specs.
        updates: number of accepted updates a slot, (slots,).
    """

    def __init__(self, specs: Sequence[FactorSpec], tiles: Sequence[tuple[int, int]], is_compact: bool = False) -> None:
        keys = [self._key(spec) for spec in specs]
        by_shape: dict[tuple[object, ...], list[int]] = defaultdict(list)
        for index, (a, g) in enumerate(tiles):
            by_shape[(keys[g], keys[a], *(specs[i].size for i in (g, a) if specs[i].diagonal))].append(index)
        members: dict[tuple[object, ...], dict[int, None]] = defaultdict(dict)
        for indices in by_shape.values():  # tile by tile, so that the factors of a group are contiguous
            for side in (0, 1):
                for number in (tiles[i][side] for i in indices):
                    members[keys[number]][number] = None
        order = sorted(members, key=lambda key: bool(key[0]))  # dense ones first
        self.stacks: list[FactorStack] = []
        self.diagonals: list[DiagonalStore] = []
        for key in order:
            held = [specs[i] for i in members[key]]
            if held[0].diagonal:
                self.diagonals.append(DiagonalStore([x.size for x in held], held[0].dtype, held[0].device))
            else:
                side = padded(held[0].size)
                self.stacks.append(FactorStack([x.size for x in held], side, held[0].dtype, held[0].device, is_compact))
        self._slots = [(store, i) for store in self.stores for i in range(len(store))]
        where = {number: (k, i) for k, key in enumerate(order) for i, number in enumerate(members[key])}
        starts = [run.start for run in self.runs()]
        self.slots = [starts[where[i][0]] + where[i][1] for i in range(len(specs))]

        def side_group(indices: list[int], side: int) -> SideGroup:
            places = [where[tiles[i][side]] for i in indices]
            return SideGroup(places[0][0], tuple(place for _, place in places))

        self.groups = [TileGroup(tuple(i), side_group(i, 0), side_group(i, 1)) for i in by_shape.values()]
        self.home = specs[0].device
        self.sizes = torch.tensor([size for store in self.stores for size in store.sizes], device=self.home)
        self.updates = torch.zeros(len(specs), device=self.home)

    @staticmethod
    def _key(spec: FactorSpec) -> tuple[object, ...]:
        return spec.diagonal, 0 if spec.diagonal else padded(spec.size), spec.dtype, spec.device

    @property
    def stores(self) -> list[FactorStack | DiagonalStore]:
        """All stores, in the order of slots."""
        return [*self.stacks, *self.diagonals]

    def view(self, slot: int) -> Tensor:
        """The factor in a slot without its pad, (n, n) or its diagonal (n,): a view, but of one kept in 16 bits a copy."""
        store, index = self._slots[slot]
        if isinstance(store, DiagonalStore):
            return store.piece(store.factors, index)
        size = store.sizes[index]
        return store.factors[index, :size, :size]

    def write(self, slot: int, value: Tensor) -> None:
        """Overwrites the factor in a slot."""
        store, index = self._slots[slot]
        if isinstance(store, DiagonalStore):
            store.piece(store.factors, index).copy_(value)
            return
        size, factors = store.sizes[index], store.factors
        factors[index, :size, :size] = value.to(factors).view(size, size)
        store.store(factors)

    def padded_view(self, slot: int) -> Tensor:
        """The dense factor in a slot with its pad: a view."""
        store, index = self._slots[slot]
        return store.factors[index]

    def sum_of(self, slot: int) -> Tensor:
        """Where backward passes sum what goes into a factor, in the stored size: a view."""
        store, index = self._slots[slot]
        return store.piece(store.sums, index) if isinstance(store, DiagonalStore) else store.sums[index]

    def runs(self) -> list[slice]:
        """Per store, the slots that it holds."""
        starts = [0]
        for store in self.stores:
            starts.append(starts[-1] + len(store))
        return [slice(start, stop) for start, stop in itertools.pairwise(starts)]

    def traces(self) -> Tensor:
        """Trace of every factor, (slots,)."""
        return self._traces("factors")

    def sum_traces(self) -> Tensor:
        """Trace of every sum, (slots,): finite exactly when the sum is."""
        return self._traces("sums")

    def _traces(self, name: str) -> Tensor:
        dense = [getattr(s, name).diagonal(dim1=-2, dim2=-1).sum(-1).to(self.home) for s in self.stacks]
        return torch.cat(dense + [s.traces(getattr(s, name)).to(self.home) for s in self.diagonals])

    def weights(self, accept: Tensor, ema_decay: float) -> Tensor:
        """Weight of the new statistics in every slot, (slots,), counting the update where it is accepted; see `newest_weight`.

        Args:
            accept: (slots,) flags; a slot that is not accepted keeps its count.
            ema_decay: weight of the past, in [0, 1).
        """
        self.updates += accept
        return newest_weight(self.updates, ema_decay)

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, step: int = 0, backend: str = "auto") -> None:
        """Factor <- keep factor + gain sum for every slot that is accepted; vectors over slots. `roll_back` can undo it."""
        for store, run in zip(self.stores, self.runs(), strict=True):
            device = store.sums.device
            old, new, accepted = (vector[run].to(device) for vector in (keep, gain, accept))
            if isinstance(store, DiagonalStore):
                store.blend(old, new, accepted)
            else:
                store.blend(old, new, accepted, step, backend)

    def back_up(self, slots: Tensor) -> None:
        """Makes `roll_back` able to undo what is done to dense factors with these flags (slots,), whose sums are not used."""
        for stack, run in zip(self.stacks, self.runs(), strict=False):
            stack.back_up(slots[run].to(stack.sums.device))

    def roll_back(self) -> None:
        """Puts the factors back that the step had changed so far."""
        for store in self.stores:
            store.roll_back()
        self.commit()

    def commit(self) -> None:
        """Says that the step is over: there is no way back, and the sums may be overwritten."""
        for store in self.stores:
            store.old = None
