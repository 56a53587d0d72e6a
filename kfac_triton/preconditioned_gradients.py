"""The preconditioned gradients of an engine, by a few launches for all layers, or layer by layer in PyTorch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .curvature.curvature import Curvature
from .curvature.finite_flags import FiniteFlags
from .curvature.gradient_plan import GradientPlan, LearningRate
from .curvature.preconditioning import kl_clip_scale, rate_vector, unmoved, updates_of_layers
from .kernels.device_tables import device_vector
from .layers import Layer
from .layers.partition import Partition
from .progress import Progress
from .settings import Settings


class PreconditionedGradients:
    """The part of `Engine` that computes them.

    Attributes:
        kl_clip_scale: nu of the last step, on the device.
        dropped_gradients: how often the gradient of each tile was not finite, (tiles,).
        finite: of the last step, a flag on the device for each parameter whether its gradient was finite; None where the host
            looks.
        mixed: of the last step, the parameters of which some rows take the plain gradient, as their layer has no statistics
            yet.
        plan: where gradients and updates are, on the path of the kernels.
    """

    settings: Settings
    layers: list[Layer]
    partition: Partition
    curvature: Curvature
    progress: Progress
    host_looks: bool
    uses_kernels: bool

    def __init__(self, home: torch.device, tiles: int) -> None:
        self.kl_clip_scale = torch.ones((), dtype=torch.float32, device=home)
        self.dropped_gradients = torch.zeros(tiles, dtype=torch.long, device=home)
        self.finite: FiniteFlags | None = None
        self.mixed: set[nn.Parameter] = set()
        self.plan: GradientPlan | None = None
        self._accept: Tensor | None = None  # with curvature="adam", tiles whose averages take the gradient of this step

    def commit(self) -> None:
        """Takes the gradients of this step into Adam's averages, right before parameters move; nothing without them."""
        if self.curvature.adam is not None and self._accept is not None:
            self.curvature.adam.commit(self._accept)
            self._accept = None

    def moved_by_averages(self) -> list[nn.Parameter]:
        """The parameters whose first-order averages are in the engine, with curvature="adam"."""
        if self.curvature.adam is None:
            return []
        return list(dict.fromkeys(p for layer in self.layers for p in self.moved_with(layer)))

    def moved_with(self, layer: Layer) -> list[nn.Parameter]:
        """The parameters of a layer that move along the preconditioned gradient: with separate biases, the weight alone."""
        return [layer.weight] if self.settings.bias == "separate" else layer.parameters()

    def _preconditioned_gradients(
        self, learning_rate: LearningRate, options: Tensor | None
    ) -> dict[nn.Parameter, Tensor | None]:
        # Without a basis Adam's is the identity: then it is plain Adam.
        missing = frozenset() if self.curvature.adam is not None else self.progress.without_statistics
        usable = [layer.weight.grad is not None and i not in missing for i, layer in enumerate(self.layers)]
        raw = [layer for layer, is_usable in zip(self.layers, usable, strict=True) if not is_usable]
        if self.uses_kernels and len({stack.gradient.device for stack in self.curvature.gradients}) == 1:
            result, self.finite = self._by_plan(usable, learning_rate, options)
        else:
            result = self._one_by_one(usable, learning_rate, options)
        if self.settings.bias == "separate":
            moved = set(map(id, self.moved_by_averages()))
            result = {p: update for p, update in result.items() if id(p) in moved}
        self.mixed = {p for layer in raw for p in (layer.weight, layer.bias) if p in result}
        return result

    def _by_plan(
        self, usable: list[bool], learning_rate: LearningRate, options: Tensor | None
    ) -> tuple[dict[nn.Parameter, Tensor | None], FiniteFlags]:
        """In a few launches for all layers, where kernels are used."""
        if self.plan is None or not self.plan.fits(usable):
            self.plan = GradientPlan(self.partition, self.curvature.gradients, usable, self.settings.backend)
        solve = functools.partial(self.curvature.solve, self.progress.damping, options)
        result = self.plan.step(solve, learning_rate, self.settings.kl_clip, self.kl_clip_scale, self.dropped_gradients)
        self._accept_unless(self.plan.zeros, usable)
        return result

    def _accept_unless(self, stays: Tensor, usable: list[bool]) -> None:
        """Notes for `commit` which tiles have a finite gradient; stays: flags of those that are not to be updated."""
        if self.curvature.adam is not None:
            known = [usable[number] for number in self.curvature.adam.layers]
            self._accept = device_vector(known, stays.device, torch.bool) & ~stays

    def _one_by_one(
        self, usable: list[bool], learning_rate: LearningRate, options: Tensor | None
    ) -> dict[nn.Parameter, Tensor | None]:
        """Layer by layer in PyTorch: in any precision, and on several devices."""
        blocks, stacks = self.partition.blocks, self.curvature.gradients
        of_blocks = [usable[block.layer_number] for block in blocks]
        products = self.curvature.precondition(of_blocks, self.progress.damping, options)
        order = [number for stack in stacks for number in stack.tiles]
        weights = [blocks[self.partition.tiles[number].block].layer.weight for number in order]
        broken = ~torch.isfinite(products)
        stays, are_finite = unmoved(broken, weights)
        self._accept_unless(stays, usable)
        rates = rate_vector([learning_rate(weight) for weight in weights], products)
        self.kl_clip_scale = kl_clip_scale(products.masked_fill(stays, 0.0), rates, self.settings.kl_clip)
        self.dropped_gradients.index_add_(0, torch.cat([stack.places for stack in stacks]), broken.long())
        updates: dict[int, Tensor] = {}
        for stack, flags in zip(stacks, stays.split([len(stack.tiles) for stack in stacks]), strict=True):
            stack.finish(self.kl_clip_scale, flags)
            updates.update(zip(stack.tiles, stack.update, strict=True))
        result, self.finite = updates_of_layers(self.partition, self.layers, usable, updates, are_finite, self.host_looks)
        return result
