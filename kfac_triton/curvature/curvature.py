"""The curvature of a model: its Kronecker factors, their inverses or eigenbases, and the gradients to precondition."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..capture.ekfac_moments import Moments, MomentTile
from ..layers.partition import FactorSpec, Partition, factor_dtype
from ..settings import Settings
from .damping import SplitDamping, pi_split
from .diagonal import DiagonalBasis, DiagonalInverse
from .eigen_adam import EigenAdam
from .eigenbasis import EigenStack
from .eigenvectors import EigenvectorStack, IdentityBasis
from .factor_bank import FactorBank
from .factor_stack import newest_weight
from .factor_update import Accepted
from .groups import TileGroup
from .inverse import Inverse, InverseGroup, InverseStack
from .preconditioning import GradientStack, Solve
from .solvers import Basis, EigenSolve, EkfacSolve, InverseSolve


class Curvature:
    """Kronecker factors of all blocks, and what is computed from them.

    K-FAC with split damping needs the inverse of each factor. K-FAC with exact damping, and EKFAC, need its eigenbasis; Adam in
    the eigenbasis needs its eigenvectors alone.

    Args:
        partition: the covered layers, divided into blocks, parts and tiles.
        settings: hyperparameters.
        host_looks: whether the host reads what the device computed.

    Attributes:
        bank: the factors.
        inverses: one for each store of factors, in the order of the stores.
        inverse_groups: the dense inverses among them, by device and dtype.
        inverse_at: for each slot, the `Inverse` that holds its inverse, and the place in it.
        gradients: one for each tile group.
        moments: one for each layer, None where EKFAC has nothing to sum.
        split: the damping of each block's A and G; None before the first refresh, and with curvature="adam".
        adam: with curvature="adam", Adam's averages in the eigenbasis; else None.
    """

    def __init__(self, partition: Partition, settings: Settings, host_looks: bool) -> None:
        self.partition = partition
        self.is_ekfac = settings.curvature == "ekfac"
        self.has_basis = self.is_ekfac or settings.exact_damping
        self.adam: EigenAdam | None = None
        self.split: SplitDamping | None = None
        specs = []
        for part in partition.parts:
            weight = partition.blocks[part.block].layer.weight
            specs.append(FactorSpec(part.size, factor_dtype(weight), weight.device, part.diagonal))
        tiles = [(tile.a, tile.g) for tile in partition.tiles]
        self.bank = FactorBank(specs, tiles, settings.factor_dtype == "bfloat16", settings.backend)
        method = (settings.inverse, settings.inverse_tolerance, settings.backend, host_looks)
        stacks, diagonals = self.bank.stacks, self.bank.diagonals
        self.inverses: Sequence[Inverse]
        self._eigen_solves: list[EigenSolve] = []
        solves: Sequence[Solve | None]
        if settings.curvature == "adam":
            how = settings.refresh, settings.backend
            eigenvectors: list[EigenvectorStack | IdentityBasis] = [EigenvectorStack(x.sums, x.sizes, *how) for x in stacks]
            eigenvectors += map(IdentityBasis, diagonals)
            self.inverses = eigenvectors
            self.adam = EigenAdam(partition, self.bank, eigenvectors, settings.noise_damping, settings.backend)
            solves = [None for _ in self.bank.groups]
        elif self.has_basis:
            bases: list[Basis] = [*(EigenStack(x.sums, x.sizes) for x in stacks), *map(DiagonalBasis, diagonals)]
            solves = self._eigen_solves = [self._eigen_solve(x, bases[x.g.store], bases[x.a.store]) for x in self.bank.groups]
            self.inverses = bases
        else:
            inverses = self.inverses = [*(InverseStack(x.sums, *method) for x in stacks), *map(DiagonalInverse, diagonals)]
            solves = [InverseSolve(x, inverses[x.g.store], inverses[x.a.store], settings.backend) for x in self.bank.groups]
        self.gradients = [
            GradientStack(group, partition, self.bank, solve, host_looks)
            for group, solve in zip(self.bank.groups, solves, strict=True)
        ]
        self.inverse_groups = InverseGroup.all_of(self.inverses, self.bank.runs())
        self.inverse_at = [(self.inverses[store], i) for store, i in self.bank.places]
        # These convert vectors over slots to vectors over the sides of blocks, and back.
        parts = [partition.parts[i] for i in self.bank.order]
        self._side_of_slot = torch.tensor([2 * part.block + part.is_input for part in parts], device=self.bank.home)
        self._side_sizes = self._per_side(self.bank.sizes.double())
        constant = [block.layer.constant_input for block in partition.blocks]
        self._constant = torch.tensor(constant, device=self.bank.home) if any(constant) else None
        self._ekfac_solves = [solve for solve in self._eigen_solves if isinstance(solve, EkfacSolve)]
        self._make_moments()

    def _per_side(self, over_slots: Tensor) -> Tensor:
        """Sums of a vector over slots, for each side of each block, (blocks, 2): G first, then A."""
        blocks = len(self.partition.blocks)
        return over_slots.new_zeros(2 * blocks).index_add_(0, self._side_of_slot, over_slots).view(blocks, 2)

    def _eigen_solve(self, group: TileGroup, left: Basis, right: Basis) -> EigenSolve:
        """EKFAC corrects the eigenvalues of groups with two dense sides; the others keep the Kronecker eigenvalues."""
        if self.is_ekfac and isinstance(left, EigenStack) and isinstance(right, EigenStack):
            return EkfacSolve(group, left, right)
        return EigenSolve(group, left, right)

    def _make_moments(self) -> None:
        layer_of_tile = [self.partition.blocks[tile.block].layer_number for tile in self.partition.tiles]
        self._moments_of_tile: dict[int, Tensor] = {}
        tiles: list[list[MomentTile]] = [[] for _ in self.partition.layers]
        for solve in self._ekfac_solves:
            self._moments_of_tile.update(zip(solve.group.tiles, solve.values, strict=True))
            for tile in solve.moment_tiles():
                tiles[layer_of_tile[tile.tile]].append(tile)
        self.moments: list[Moments | None] = [Moments(self.partition, own) if own else None for own in tiles]
        self._moment_updates = torch.zeros(len(self.partition.tiles), device=self.bank.home)
        self._layer_of_tile = torch.tensor(layer_of_tile, device=self.bank.home)

    def refresh(self, damping: float, restart: bool) -> None:
        """Computes the inverses, or eigenbases, of all factors.

        Args:
            damping: to add to the Fisher matrix of the mean loss.
            restart: whether factors were replaced, so that the last inverses are no start for the new ones.
        """
        if self.adam is not None:
            self.adam.refresh(restart)
            return
        g_mean, a_mean = (self._per_side(self.bank.traces().double()) / self._side_sizes).unbind(1)
        self.split = pi_split(a_mean, g_mean, damping, self._constant)
        over_slots = torch.stack([self.split.g, self.split.a], 1).flatten()[self._side_of_slot]
        old_bases = [solve.basis() for solve in self._ekfac_solves]
        for store, inverse, run in zip(self.bank.stores, self.inverses, self.bank.runs(), strict=True):
            if restart:
                inverse.restart()
            if not isinstance(inverse, InverseStack):
                inverse.refresh(store.factors, over_slots[run])
        for group in self.inverse_groups:
            group.refresh([self.bank.stacks[i] for i in group.stores], over_slots)
        self._turn_moments(old_bases)

    def was_refused(self) -> bool:
        """Whether the host has been told that an inverse was refused; a step that is not a replay then computes it anew."""
        if self.adam is not None:
            return self.adam.was_refused()
        return any(group.refused is not None and group.refused.is_any_set() for group in self.inverse_groups)

    @property
    def kind(self) -> str:
        """The form of the inverses: "basis", "root" (T, where the inverse is T^T T), "inverse", or "eigenvectors" alone."""
        if self.adam is not None:
            return "eigenvectors"
        if self.has_basis:
            return "basis"
        return "root" if any(x.kind == "root" for x in self.inverses) else "inverse"

    @property
    def starts_anew(self) -> bool:
        """Whether a refresh depends only on the factors and the damping, and not on the last inverses."""
        return all(x.kind == "inverse" for x in self.inverses)

    def tiles_of(self, layer_number: int) -> list[int]:
        """Numbers of a layer's tiles."""
        return [tile for block in self.partition.blocks_of(layer_number) for tile in self.partition.tiles_of[block]]

    def moments_of(self, layer_number: int) -> list[list[Tensor]]:
        """Views of second moments of a layer, EKFAC's or Adam's: for each channel group those of its tiles that have any."""
        tiles_of = self.partition.tiles_of
        if self.adam is not None:
            return [[self.adam.views(i)[1] for i in tiles_of[block]] for block in self.partition.blocks_of(layer_number)]
        return [
            [self._moments_of_tile[i] for i in tiles_of[block] if i in self._moments_of_tile]
            for block in self.partition.blocks_of(layer_number)
        ]

    def means_of(self, layer_number: int) -> list[list[Tensor]]:
        """Views of Adam's means of a layer: for each channel group those of its tiles; none without curvature="adam"."""
        if self.adam is None:
            return []
        tiles_of = self.partition.tiles_of
        return [[self.adam.views(i)[0] for i in tiles_of[block]] for block in self.partition.blocks_of(layer_number)]

    def moment_updates_of(self, layer_number: int) -> Tensor:
        """How many updates the second moments have had, one number for each channel group: a copy."""
        first = [self.partition.tiles_of[block][0] for block in self.partition.blocks_of(layer_number)]
        if self.adam is not None:
            return torch.stack([self.adam.views(tile)[2] for tile in first])
        return self._moment_updates[first]

    def count_moments(self, layer_number: int, updates: Tensor) -> None:
        """Sets the number of updates of moments; a checkpoint has just overwritten the moments and their basis."""
        for block, count in zip(self.partition.blocks_of(layer_number), updates, strict=True):
            if self.adam is not None:
                for tile in self.partition.tiles_of[block]:
                    self.adam.views(tile)[2].copy_(count)
                continue
            self._moment_updates[list(self.partition.tiles_of[block])] = count.to(self._moment_updates)
        moments = self.moments[layer_number]
        if moments is not None:
            moments.ready = bool((updates > 0).all())

    def forget_moments(self, layer_number: int) -> None:
        """Restarts the moments of a layer (EKFAC's from the Kronecker eigenvalues), because its factors were replaced."""
        if self.adam is not None:
            self.adam.forget(self.tiles_of(layer_number))
        if self.is_ekfac:  # without EKFAC nothing is allocated, because a step that ran out of memory comes here, too
            self._moment_updates[self._layer_of_tile == layer_number] = 0
        moments = self.moments[layer_number]
        if moments is not None:
            moments.ready = False  # until the new factors have a basis

    def _turn_moments(self, old_bases: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Rotates EKFAC's moments into the new basis; tiles without moments take the Kronecker eigenvalues."""
        for solve, (left, right) in zip(self._ekfac_solves, old_bases, strict=True):
            tiles = list(solve.group.tiles)
            solve.rotate(left, right)
            unknown = (self._moment_updates[tiles] == 0).to(left.device)
            solve.values.copy_(torch.where(unknown[:, None, None], solve.kronecker(), solve.values))
            self._moment_updates[tiles] = self._moment_updates[tiles].clamp_min(1)
        for moments in self.moments:
            if moments is not None:
                moments.ready = True

    def blend_moments(self, outcome: Accepted, ema_decay: float) -> None:
        """Updates EKFAC's moving average of second moments, with the same weights as the factors (see `newest_weight`)."""
        if not self.is_ekfac:
            return
        fresh = torch.tensor(outcome.moments, device=self.bank.home)
        for solve in self._ekfac_solves:
            tiles = list(solve.group.tiles)
            layers = self._layer_of_tile[tiles]
            finite = torch.isfinite(solve.sums.sum((-2, -1)).to(self.bank.home))
            accept = (outcome.accept & fresh)[layers] & finite
            self._moment_updates[tiles] += accept
            rate = newest_weight(self._moment_updates[tiles], ema_decay)
            new = solve.sums * (outcome.moment_scale[layers]).to(solve.sums)[:, None, None]
            blended = torch.lerp(solve.values, new, rate.to(solve.values)[:, None, None])
            solve.values.copy_(torch.where(accept.to(new.device)[:, None, None], blended, solve.values))

    def precondition(self, usable: Sequence[bool], damping: float, options: Tensor | None = None) -> Tensor:
        """Computes V in every gradient stack and returns <V, W> in the order of the stacks' tiles.

        Args:
            usable: a flag for each block; the tiles of the others get V = 0.
            damping: the current damping; only eigenbases use it, since inverses already contain theirs.
            options: with curvature="adam", those of each tile, see `EigenAdam.options`.
        """
        for stack in self.gradients:
            stack.read(usable)
        self._solve(damping, options, multiply=True)
        return torch.cat([stack.product.to(self.bank.home) for stack in self.gradients])

    def solve(self, damping: float, options: Tensor | None = None) -> None:
        """Computes V of what is in the gradient stacks; see `precondition`."""
        self._solve(damping, options, multiply=False)

    def _solve(self, damping: float, options: Tensor | None, multiply: bool) -> None:
        if self.adam is not None:
            assert options is not None
            self.adam.direct(self.gradients, options)
            if multiply:
                for stack in self.gradients:
                    stack.multiply()
            return
        self._set_damping(damping)
        for stack in self.gradients:
            stack.solve(stack.product if multiply else None)

    def _set_damping(self, damping: float) -> None:
        for solve in self._eigen_solves:
            solve.damping = damping

    def memory(self) -> dict[str, int]:
        """Bytes by kind: "factors", "sums", "inverses" (or eigenbases), "gradients" (and updates), "moments"."""

        def of(*tensors: Tensor) -> int:
            return sum(x.nbytes for x in tensors)

        stores = self.bank.stores
        return {
            "factors": sum(s.nbytes for s in stores),
            "sums": of(*(s.sums for s in stores)),
            "inverses": of(*(i.values for i in self.inverses)),
            "gradients": of(*(t for g in self.gradients for t in (g.gradient, g.update))),
            "moments": of(*(t for s in self._ekfac_solves for t in (s.values, s.sums)))
            + (self.adam.nbytes() if self.adam is not None else 0),
        }
