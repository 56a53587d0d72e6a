r"""Adam in the eigenbasis of the factors.

For a tile W (m, n) of a weight, with the eigenvectors Q_A and Q_G of its factors and the gradient dW:

    R = Q_G^T dW Q_A
    M <- b1 M + (1 - b1) R                      mean, bias-corrected by 1 - b1^t
    V <- b2 V + (1 - b2) R^2                    square, bias-corrected by 1 - b2^t
    N = b1 M / (1 - b1^t) + (1 - b1) R          with Nesterov's momentum (Dozat 2016), else M / (1 - b1^t)
    D = V / (1 - b2^t),  then  D += min(1, c n / rows) mean of each row of D,  and likewise  min(1, c m / rows)  for columns
    U = Q_G [N / (sqrt D + eps)] Q_A^T

U is what the parameters move along. This is Adam (Kingma and Ba 2015) as SOAP runs it in Shampoo's eigenbasis (Vyas et al.
2024), but in the basis of K-FAC's factors, which are averages over all rows of a batch instead of one gradient matrix. The
scales of the factors and of the loss drop out.

The second line of D is the noise damping: the eigenvalues of a covariance of `rows` samples of n features are off by about
n / rows of their mean, so what a direction's own average says is that uncertain.

A mean is kept in the eigenbasis, and turned when the basis is: exactly, as the rotation is linear. A square stays as it is.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..kernels import ops, precision, runtime
from ..kernels.device_tables import device_table, device_vector
from ..layers.partition import Partition
from .eigenvectors import Eigenvectors, EigenvectorStack, IdentityBasis
from .factor_bank import FactorBank
from .groups import TileGroup
from .preconditioning import GradientStack

Basis = EigenvectorStack | IdentityBasis


class AdamOptions(NamedTuple):
    """Options of the parameter group that a weight is in."""

    beta1: float
    beta2: float
    eps: float
    nesterov: bool


class _Kind(NamedTuple):
    """The tile groups of one device and precision, and their tiles in vectors over all tiles."""

    groups: list[int]
    tiles: list[int]


class _Before(NamedTuple):
    """What a refresh overwrites, as it was before the step.

    Attributes:
        tensors: copies of `EigenAdam._state`.
        known: see `Eigenvectors`.
    """

    tensors: list[Tensor]
    known: list[list[bool]]


class EigenAdam:
    """Means and squares of all tiles, in the eigenbases of their factors.

    Vectors over tiles are in the order of the tile groups.

    Args:
        partition: the covered layers, divided into blocks, parts and tiles.
        bank: their factors.
        bases: one for each store of factors.
        noise_damping: c.
        backend: of the kernels.

    Attributes:
        means: M, (B, m, n) for each tile group.
        squares: V, likewise.
        steps: t, (tiles,).
        layers: the number of each tile's layer.
    """

    def __init__(
        self, partition: Partition, bank: FactorBank, bases: Sequence[Basis], noise_damping: float, backend: str
    ) -> None:
        self._bank, self._bases, self._backend = bank, bases, backend
        self._groups: list[TileGroup] = bank.groups
        self._eigenvectors = Eigenvectors([basis for basis in bases if isinstance(basis, EigenvectorStack)])
        order = [number for group in self._groups for number in group.tiles]
        tiles = [partition.tiles[number] for number in order]
        self._blocks = [partition.blocks[tile.block] for tile in tiles]
        self.layers = [block.layer_number for block in self._blocks]
        self._place_of = {number: place for place, number in enumerate(order)}
        self._sizes = [(partition.parts[tile.g].size, partition.parts[tile.a].size) for tile in tiles]
        self._slots = [(bank.slots[tile.g], bank.slots[tile.a]) for tile in tiles]
        self.means, self.squares, starts = [], [], [0]
        for group in self._groups:
            first = partition.tiles[group.tiles[0]]
            g, a = (bank.sum_of(bank.slots[part]) for part in (first.g, first.a))
            self.means.append(g.new_zeros(len(group.tiles), g.shape[-1], a.shape[-1]))
            self.squares.append(torch.zeros_like(self.means[-1]))
            starts.append(starts[-1] + len(group.tiles))
        home = bank.home
        self.steps = torch.zeros(len(order), dtype=torch.float32, device=home)
        self._runs = [slice(*pair) for pair in itertools.pairwise(starts)]
        kinds: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for i, mean in enumerate(self.means):
            kinds[mean.device, mean.dtype].append(i)
        self._kinds = [
            _Kind(some, [t for i in some for t in range(*self._runs[i].indices(len(order)))]) for some in kinds.values()
        ]
        # What a vector over slots is multiplied by to give n c / rows of the columns, or m c / rows of the rows, of a tile.
        # A diagonal side has no eigenvectors whose uncertainty could matter.
        dense = [isinstance(bases[bank.places[slot][0]], EigenvectorStack) for slot in range(len(bank.slots))]
        weights = [
            [noise_damping * size * dense[slot] for size, slot in ((n, a), (m, g))]
            for (m, n), (g, a) in zip(self._sizes, self._slots, strict=True)
        ]
        self._noise_weights = torch.tensor(weights, dtype=torch.float64, device=home)
        self._noise_slots = torch.tensor([[a, g] for g, a in self._slots], device=home)
        self._rotated: list[Tensor] = []
        self._means_of_weights: list[Tensor] = []  # the means, in the coordinates of W, while the bases change
        self._before: _Before | None = None

    def options(self, of_weight: Callable[[nn.Parameter], AdamOptions]) -> Tensor:
        """The options of each tile, (tiles, 4) in double precision, on the device."""
        rows = tuple([tuple(map(float, of_weight(block.layer.weight))) for block in self._blocks])
        return device_table(rows, self.steps.device, torch.float64)

    def refresh(self, restart: bool) -> None:
        """Refreshes the eigenvectors; those that products did not make orthonormal the last time by QR, too.

        Args:
            restart: whether some layers have new factors, whose eigenvectors eigh computes. Their averages start again.
        """
        stores = self._bank.stacks
        new: list[list[int]] = [[] for _ in stores]
        if restart:
            has_statistics = (self._bank.updates > 0).tolist()
            for slot, (store, place) in enumerate(self._bank.places):
                basis = self._bases[store]
                if isinstance(basis, EigenvectorStack) and has_statistics[slot] and not basis.is_known[place]:
                    new[store].append(place)
        overdue = self._eigenvectors.overdue()
        with self._turning(changes_squares=any(new)):
            # By QR first: products that fail again keep the result.
            self._eigenvectors.rescue(stores, overdue)
            self._eigenvectors.refresh(stores, new)
            self._start_again({(store, place) for store, places in enumerate(new) for place in places})

    def rescue(self) -> None:
        """Refreshes by QR what products did not make orthonormal, as soon as the host knows."""
        overdue = self._eigenvectors.overdue()
        if overdue:
            with self._turning():
                self._eigenvectors.rescue(self._bank.stacks, overdue)

    def was_refused(self) -> bool:
        """See `Eigenvectors.was_refused`."""
        return self._eigenvectors.was_refused()

    def direct(self, gradients: Sequence[GradientStack], options: Tensor) -> None:
        """Writes U of what is in the gradient stacks to their updates. Averages do not change before `commit`."""
        self._options = options
        rotated = [self._rotate(i, stack.gradient) for i, stack in enumerate(gradients)]
        # Between two diagonals nothing turns, and kernels write what parameters move along into the stacks of the gradients.
        self._rotated = [x.clone() if x is own.gradient else x for x, own in zip(rotated, gradients, strict=True)]
        noise, updates = self._noise(), [stack.update for stack in gradients]
        for kind, (steps, chosen, some) in self._each_kind(self.steps, options, noise):
            rotated, means, squares, out = (
                [x[i] for i in kind.groups] for x in (self._rotated, self.means, self.squares, updates)
            )
            sizes = [self._sizes[i] for i in kind.tiles]
            ops.adam_direction(rotated, means, squares, out, steps, some, chosen, sizes, backend=self._backend)
        for i, update in enumerate(updates):
            update.copy_(self._rotate(i, update, back=True))

    def commit(self, accept: Tensor) -> None:
        """Takes the gradients of the last `direct` into the averages of accepted tiles, flags (tiles,)."""
        for kind, (steps, flags, options) in self._each_kind(self.steps, accept, self._options):
            rotated, means, squares = ([x[i] for i in kind.groups] for x in (self._rotated, self.means, self.squares))
            ops.adam_moments(rotated, means, squares, steps, flags, options, backend=self._backend)
            if steps is not self.steps:
                self.steps[device_vector(kind.tiles, self.steps.device)] = steps.to(self.steps)
        self._rotated, self._before = [], None
        self._eigenvectors.settle()

    def roll_back(self) -> None:
        """Restores what a step has changed that fails before its `commit`."""
        if self._before is not None:
            for tensor, old in zip(self._state(changes_squares=True), self._before.tensors, strict=False):
                tensor.copy_(old)
            self._eigenvectors.known = self._before.known
        self._rotated, self._before, self._means_of_weights = [], None, []

    def views(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of mean and square of a tile, given its number in the partition, and of its counter."""
        place = self._place_of[number]
        group, index = self._where(place)
        return self.means[group][index], self.squares[group][index], self.steps[place]

    def forget(self, tiles: Sequence[int]) -> None:
        """The factors of these tiles were replaced: their averages start again, and so do their eigenvectors."""
        for number in tiles:
            mean, square, steps = self.views(number)
            for tensor in (mean, square, steps):
                tensor.zero_()
        self.forget_bases(tiles)

    def forget_bases(self, tiles: Sequence[int]) -> None:
        """The next refresh with a restart computes the eigenvectors of these tiles' factors by eigh."""
        for number in tiles:
            for slot in self._slots[self._place_of[number]]:
                store, place = self._bank.places[slot]
                basis = self._bases[store]
                if isinstance(basis, EigenvectorStack):
                    basis.forget(place)

    def nbytes(self) -> int:
        """Bytes of means and squares."""
        return sum(x.nbytes for x in (*self.means, *self.squares))

    def _start_again(self, changed: set[tuple[int, int]]) -> None:
        """Averages start again where eigh has computed the eigenvectors of a side for the first time."""
        if not changed:
            return
        places = self._bank.places
        for place, slots in enumerate(self._slots):
            if any(places[slot] in changed for slot in slots):
                group, index = self._where(place)
                self._means_of_weights[group][index].zero_()
                self.squares[group][index].zero_()
                self.steps[place] = 0

    def _where(self, place: int) -> tuple[int, int]:
        """The tile group of a tile, given its place in vectors over tiles, and its index there."""
        group = next(i for i, run in enumerate(self._runs) if run.start <= place < run.stop)
        return group, place - self._runs[group].start

    def _noise(self) -> Tensor:
        """The shares of row means and column means that are added to D, (tiles, 2)."""
        uncertainty = self._bank.sampling[self._noise_slots]
        return (uncertainty * self._noise_weights).clamp_(max=1).float()

    def _each_kind(self, *vectors: Tensor) -> list[tuple[_Kind, list[Tensor]]]:
        if len(self._kinds) == 1:
            return [(self._kinds[0], list(vectors))]
        result = []
        for kind in self._kinds:
            device = self.means[kind.groups[0]].device
            result.append((kind, [x[device_vector(kind.tiles, x.device)].to(device) for x in vectors]))
        return result

    def _rotate(self, number: int, x: Tensor, back: bool = False) -> Tensor:
        """Q_G^T x Q_A for a tile group, or back, Q_G x Q_A^T."""
        group = self._groups[number]
        left, right = self._bases[group.g.store], self._bases[group.a.store]
        with precision.library_for_gradients(x.device, self._backend):
            return right.right(group.a, left.left(group.g, x, back), back)

    @contextmanager
    def _turning(self, changes_squares: bool = False) -> Iterator[None]:
        """Context in which the bases change; the means are turned with them.

        What changes is copied before, for `roll_back`, except into a graph, whose replays do not fail half way.
        """
        if self._before is None and not runtime.is_recording():
            copies = [x.clone() for x in self._state(changes_squares)]
            self._before = _Before(copies, self._eigenvectors.known)
        self._means_of_weights = [self._rotate(i, mean, back=True) for i, mean in enumerate(self.means)]
        yield
        for i, mean in enumerate(self._means_of_weights):
            self.means[i].copy_(self._rotate(i, mean))
        self._means_of_weights = []

    def _state(self, changes_squares: bool) -> list[Tensor]:
        """What `refresh` changes."""
        bases = [x for basis in self._bases if isinstance(basis, EigenvectorStack) for x in (basis.vectors, basis.residual)]
        return [*bases, *self.means, self.steps, *(self.squares if changes_squares else [])]
