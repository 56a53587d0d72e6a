"""The curvature of a model as it is stored: factors, their inverses or eigenbases, and the gradients that they precondition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..capture.ekfac_moments import Moments, MomentTile
from ..layers.partition import FactorSpec, Partition, factor_dtype
from ..settings import Settings
from .damping import SplitDamping, pi_split
from .eigenbasis import EigenStack
from .factor_bank import FactorBank
from .factor_stack import newest_weight
from .factor_update import Accepted
from .inverse import InverseStack
from .preconditioning import GradientStack
from .solvers import EigenSolve, InverseSolve, Spectrum


class Curvature:
    """Kronecker factors of all blocks, in one of three forms.

    K-FAC with split damping needs an inverse of each factor; K-FAC with exact damping, and EKFAC, need its eigenbasis.

    Args:
        partition: of the covered layers.
        settings: hyperparameters.
        host_looks: whether the host may look at what the device computed.

    Attributes:
        bank: the factors.
        inverses: one a stack of dense factors.
        inverse_at: per slot what holds the inverse (the store itself where factors are diagonal), and its place there.
        gradients: one a group of tiles.
        moments: EKFAC's sums, one a layer.
        split: damping of each block's A and G, after the first refresh.
    """

    def __init__(self, partition: Partition, settings: Settings, host_looks: bool) -> None:
        self.partition = partition
        self.is_ekfac = settings.curvature == "ekfac"
        self.has_basis = self.is_ekfac or settings.exact_damping
        self.split: SplitDamping | None = None
        specs = []
        for part in partition.parts:
            weight = partition.blocks[part.block].layer.weight
            specs.append(FactorSpec(part.size, factor_dtype(weight), weight.device, part.diagonal))
        tiles = [(tile.a, tile.g) for tile in partition.tiles]
        self.bank = FactorBank(specs, tiles, is_compact=settings.factor_dtype == "bfloat16")
        backend = settings.backend
        self.inverses: list[InverseStack | EigenStack] = [
            EigenStack(stack.sums, stack.sizes)
            if self.has_basis
            else InverseStack(stack.sums, settings.inverse, settings.inverse_tolerance, backend, wait=host_looks)
            for stack in self.bank.stacks
        ]
        stores = self._stores = [*self.inverses, *self.bank.diagonals]
        self._eigen_solves: list[EigenSolve] = []
        self.gradients = []
        for group in self.bank.groups:
            left, right = stores[group.g.store], stores[group.a.store]
            solve: EigenSolve | InverseSolve
            if self.has_basis:
                assert not isinstance(left, InverseStack)
                assert not isinstance(right, InverseStack)
                solve = EigenSolve(group, left, right, None)
                self._eigen_solves.append(solve)
            else:
                assert not isinstance(left, EigenStack)
                assert not isinstance(right, EigenStack)
                solve = InverseSolve(group, left, right, backend)
            self.gradients.append(GradientStack(group, partition, self.bank, solve, backend, host_looks))
        self.inverse_at = [(x, i) for x, store in zip(stores, self.bank.stores, strict=True) for i in range(len(store))]
        self._map_slots()
        self.moments: list[Moments | None] = [None] * len(partition.layers)
        self._moments_of_tile: dict[int, Tensor] = {}
        if self.is_ekfac:
            self._make_moments()

    def _map_slots(self) -> None:
        """What turns a vector over slots into one over blocks, and back."""
        home = self.bank.home
        block_of, is_input = [0] * len(self.bank.slots), [False] * len(self.bank.slots)
        for part, slot in zip(self.partition.parts, self.bank.slots, strict=True):
            block_of[slot], is_input[slot] = part.block, part.is_input
        self._side_of_slot = torch.tensor([2 * b + i for b, i in zip(block_of, is_input, strict=True)], device=home)
        self._side_sizes = self._per_side(self.bank.sizes.double())
        constant = [block.layer.constant_input for block in self.partition.blocks]
        self._constant = torch.tensor(constant, device=home) if any(constant) else None

    def _per_side(self, over_slots: Tensor) -> Tensor:
        """Sums over the parts of each side, (blocks, 2): G, then A."""
        blocks = len(self.partition.blocks)
        return over_slots.new_zeros(2 * blocks).index_add_(0, self._side_of_slot, over_slots).view(blocks, 2)

    def _make_moments(self) -> None:
        tiles: list[list[MomentTile]] = [[] for _ in self.partition.layers]
        for group, solve, stack in zip(self.bank.groups, self._eigen_solves, self.gradients, strict=True):
            left, right = (self._stores[x.store] for x in (group.g, group.a))
            if not (isinstance(left, EigenStack) and isinstance(right, EigenStack)):
                continue  # with a diagonal side the Kronecker eigenvalues stay
            spectrum = solve.spectrum = Spectrum(torch.zeros_like(stack.gradient), torch.zeros_like(stack.gradient))
            for k, number in enumerate(group.tiles):
                self._moments_of_tile[number] = spectrum.values[k]
                layer = self.partition.blocks[self.partition.tiles[number].block].layer_number
                a_vectors, g_vectors = right.vectors[group.a.places[k]], left.vectors[group.g.places[k]]
                tiles[layer].append(MomentTile(number, a_vectors, g_vectors, spectrum.sums[k]))
        self.moments = [Moments(self.partition, own) if own else None for own in tiles]
        self._moment_updates = torch.zeros(len(self.partition.tiles), device=self.bank.home)
        self._layer_of_tile = torch.tensor(
            [self.partition.blocks[tile.block].layer_number for tile in self.partition.tiles], device=self.bank.home
        )

    def refresh(self, damping: float, restart: bool) -> None:
        """Inverses, or eigenbases, of all factors with this damping.

        Args:
            damping: of the Fisher matrix of the mean loss.
            restart: whether what is certified now is an inverse of something else.
        """
        traces = self._per_side(self.bank.traces().double())
        g_trace, a_trace = traces.unbind(1)
        g_size, a_size = self._side_sizes.unbind(1)
        self.split = pi_split(a_trace, a_size, g_trace, g_size, damping, self._constant)
        over_slots = torch.stack([self.split.g, self.split.a], 1).flatten()[self._side_of_slot]
        runs = self.bank.runs()
        old_bases = [solve.basis() for solve in self._eigen_solves if solve.spectrum is not None]
        for stack, inverse, run in zip(self.bank.stacks, self.inverses, runs[: len(self.bank.stacks)], strict=True):
            if restart:
                inverse.restart()
            inverse.refresh(stack.factors, over_slots[run])
        for store, run in zip(self.bank.diagonals, runs[len(self.bank.stacks) :], strict=True):
            store.refresh(over_slots[run].to(store.damping))
        self._turn_moments(old_bases)

    @property
    def kind(self) -> str:
        """What the curvature is stored as: "basis" (eigenvectors), "root" (T with inverse T^T T) or "inverse"."""
        if self.has_basis:
            return "basis"
        return "root" if any(isinstance(x, InverseStack) and x.factored for x in self.inverses) else "inverse"

    @property
    def starts_anew(self) -> bool:
        """Whether a refresh depends on nothing but the factors and the damping: the inverses before it do not matter."""
        return not any(isinstance(x, EigenStack) or x.factored for x in self.inverses)

    def moments_of(self, layer_number: int) -> list[list[Tensor]]:
        """EKFAC's moments of a layer, those of the tiles of each group: views, none where the Kronecker eigenvalues stay."""
        tiles_of = self.partition.tiles_of
        return [
            [self._moments_of_tile[i] for i in tiles_of[block] if i in self._moments_of_tile]
            for block in self.partition.blocks_of(layer_number)
        ]

    def moment_updates_of(self, layer_number: int) -> Tensor:
        """How many updates EKFAC's moments have had, one number a group: a copy."""
        first = [self.partition.tiles_of[block][0] for block in self.partition.blocks_of(layer_number)]
        return self._moment_updates[first]

    def count_moments(self, layer_number: int, updates: Tensor) -> None:
        """Says how many updates the moments have had that were written from outside, with their basis."""
        for block, count in zip(self.partition.blocks_of(layer_number), updates, strict=True):
            self._moment_updates[list(self.partition.tiles_of[block])] = count.to(self._moment_updates)
        moments = self.moments[layer_number]
        if moments is not None:
            moments.ready = bool((updates > 0).all())

    def forget_moments(self, layer_number: int) -> None:
        """EKFAC: those of a layer are of other factors now, and begin anew with the Kronecker eigenvalues."""
        if self.is_ekfac:
            self._moment_updates[self._layer_of_tile == layer_number] = 0
            moments = self.moments[layer_number]
            if moments is not None:
                moments.ready = False  # the basis, too, until there is one of the factors

    def _turn_moments(self, old_bases: Sequence[tuple[Tensor, Tensor]]) -> None:
        """EKFAC: the moments in the new basis; the Kronecker eigenvalues where there are none yet."""
        solves = [(i, solve) for i, solve in enumerate(self._eigen_solves) if solve.spectrum is not None]
        for (i, solve), (left, right) in zip(solves, old_bases, strict=True):
            assert solve.spectrum is not None
            tiles = list(self.bank.groups[i].tiles)
            solve.rotate(left, right)
            unknown = (self._moment_updates[tiles] == 0).to(left.device)
            solve.spectrum.values.copy_(torch.where(unknown[:, None, None], solve.kronecker(), solve.spectrum.values))
            self._moment_updates[tiles] = self._moment_updates[tiles].clamp_min(1)
        for moments in self.moments:
            if moments is not None:
                moments.ready = True

    def blend_moments(self, outcome: Accepted, ema_decay: float) -> None:
        """EKFAC: the moving average of the second moments, with the factors' weights (see `newest_weight`)."""
        if not self.is_ekfac:
            return
        fresh = torch.tensor(outcome.moments, device=self.bank.home)
        for i, solve in enumerate(self._eigen_solves):
            spectrum, tiles = solve.spectrum, list(self.bank.groups[i].tiles)
            if spectrum is None:
                continue
            layers = self._layer_of_tile[tiles]
            finite = torch.isfinite(spectrum.sums.sum((-2, -1)).to(self.bank.home))
            accept = (outcome.accept & fresh)[layers] & finite
            self._moment_updates[tiles] += accept
            rate = newest_weight(self._moment_updates[tiles], ema_decay)
            new = spectrum.sums * (outcome.moment_scale[layers]).to(spectrum.sums)[:, None, None]
            blended = torch.lerp(spectrum.values, new, rate.to(spectrum.values)[:, None, None])
            spectrum.values.copy_(torch.where(accept.to(new.device)[:, None, None], blended, spectrum.values))

    def precondition(self, usable: Sequence[bool], damping: float) -> Tensor:
        """V in every gradient stack, for the blocks that are usable; returns <V, W> in the order of the stacks' tiles.

        Args:
            usable: one flag a block.
            damping: the current one; only a solve in an eigenbasis takes it from here, an inverse has its own.
        """
        for solve in self._eigen_solves:
            solve.damping = damping
        for stack in self.gradients:
            stack.precondition(usable)
        return torch.cat([stack.product.to(self.bank.home) for stack in self.gradients])

    def memory(self) -> dict[str, int]:
        """Bytes by kind: "factors", "sums", "inverses" (or eigenbases), "gradients" (and updates), "moments"."""

        def of(*tensors: Tensor) -> int:
            return sum(x.numel() * x.element_size() for x in tensors)

        stores = self.bank.stores
        spectra = [s.spectrum for s in self._eigen_solves if s.spectrum is not None]
        return {
            "factors": sum(s.nbytes for s in stores),
            "sums": of(*(s.sums for s in stores)),
            "inverses": of(*(i.values for i in self.inverses), *(s.values for s in self.bank.diagonals)),
            "gradients": of(*(t for g in self.gradients for t in (g.gradient, g.update))),
            "moments": of(*(t for s in spectra for t in (s.values, s.sums))),
        }
