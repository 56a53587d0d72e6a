"""Gradients of the tiles of one group: stacked, preconditioned, clipped and returned to the layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from ..kernels.device_tables import device_vector
from ..kernels.gradients.reference import clip_scale
from ..layers import Layer
from ..layers.partition import Partition
from .factor_bank import FactorBank
from .finite_flags import FiniteFlags
from .groups import TileGroup


class Solve(Protocol):
    """Preconditions a stack of gradients."""

    def __call__(self, gradient: Tensor, update: Tensor, product: Tensor | None) -> None:
        """Writes V (B, m, n) to update and <V, W> (B,) to product, unless it is None; W (B, m, n) is the gradient."""


class GradientStack:
    """Persistent buffers (B, m, n) of one `TileGroup`, padded with zeros.

    Attributes:
        tiles: numbers of the tiles, in order.
        gradient: W = [weight.grad | bias.grad], or the tile's part of it.
        update: V = G^-1 W A^-1.
        product: <V, W>, (B,).
    """

    def __init__(self, group: TileGroup, partition: Partition, bank: FactorBank, solve: Solve | None, host_looks: bool) -> None:
        self.tiles = group.tiles
        self.places = torch.tensor(group.tiles, device=bank.home)
        self._solve = solve
        self._host_looks = host_looks
        self._partition = partition
        tile = partition.tiles[group.tiles[0]]
        g, a = (bank.sum_of(bank.slots[part]) for part in (tile.g, tile.a))
        self.gradient = g.new_zeros(len(group.tiles), g.shape[-1], a.shape[-1])
        self.update = torch.zeros_like(self.gradient)
        self.product = self.gradient.new_zeros(len(group.tiles))

    def read(self, usable: Sequence[bool]) -> None:
        """Copies the gradients of the tiles of usable blocks; those of the others become zero."""
        for block, number in zip(self.gradient, self.tiles, strict=True):
            fill(block, *self._read(number, usable))

    def solve(self, product: Tensor | None = None) -> None:
        """Computes V of what is in `gradient`, and `<V, W>` (B,) unless it is None."""
        assert self._solve is not None, "Adam's directions are computed for all stacks together"
        self._solve(self.gradient, self.update, product)

    def multiply(self) -> None:
        """Computes `<V, W>` of what is in `gradient` and `update`."""
        self.product.copy_(torch.linalg.vecdot(self.update.flatten(1), self.gradient.flatten(1)))

    def _read(self, number: int, usable: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """The parts of the weight's and the bias's gradient in a tile; None without one."""
        tile = self._partition.tiles[number]
        if not usable[tile.block]:
            return None, None
        block = self._partition.blocks[tile.block]
        weight, bias = block.layer.gradient(block.group)
        a, g = self._partition.parts[tile.a], self._partition.parts[tile.g]
        if weight is None or (a.whole and g.whole):
            return weight, bias
        weight = weight.flatten(1)[g.start : g.stop, a.start : a.stop - a.has_bias_column]
        return weight, bias[g.start : g.stop] if bias is not None and a.has_bias_column else None

    def finish(self, scale: Tensor, stays: Tensor) -> None:
        """Scales V by nu, and sets it to zero for tiles that are not to be updated, flags (B,)."""
        self.update.mul_(scale.to(self.update))
        if not self._host_looks or bool(stays.any()):
            self.update.masked_fill_(stays.to(self.update.device)[:, None, None], 0.0)


def fill(block: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """[weight | bias] into the leading part of a block, which is zero elsewhere; all of it becomes zero without a weight."""
    if weight is None:
        block.zero_()
        return
    rows, columns = weight.shape[0], weight[0].numel()
    block[:rows, :columns].copy_(weight.reshape(rows, columns))
    if columns < block.shape[1]:
        block[:rows, columns].copy_(bias) if bias is not None else block[:rows, columns].zero_()


def unmoved(broken: Tensor, weights: Sequence[nn.Parameter]) -> tuple[Tensor, dict[nn.Parameter, Tensor]]:
    """A weight is not updated if the gradient of any of its tiles is not finite. Decided without waiting for the device.

    Args:
        broken: whether the gradient of a tile is not finite, (tiles,).
        weights: the weight that each tile belongs to.

    Returns:
        Flags (tiles,) of those that are not to be updated, and for each weight whether its gradient is finite.
    """
    numbers = {weight: i for i, weight in enumerate(dict.fromkeys(weights))}
    owners = device_vector((numbers[weight] for weight in weights), broken.device)
    stays = torch.zeros(len(numbers), dtype=torch.long, device=broken.device).index_add_(0, owners, broken.long()) > 0
    return stays[owners], dict(zip(numbers, (~stays).unbind(), strict=True))


def assemble(partition: Partition, block: int, updates: dict[int, Tensor]) -> Tensor:
    """Joins the tiles of a block into V, (m, n) or padded; a single tile is returned as it is."""
    tiles = partition.tiles_of[block]
    if len(tiles) == 1:
        return updates[tiles[0]]
    a_parts, g_parts = partition.parts_of[block]
    columns = [partition.parts[i].size for i in a_parts]
    rows = [partition.parts[i].size for i in g_parts]
    pieces = iter(tiles)
    return torch.cat([torch.cat([updates[next(pieces)][:m, :n] for n in columns], 1) for m in rows])


def kl_clip_scale(products: Tensor, learning_rates: Tensor, kl_clip: float | None) -> Tensor:
    """Scale nu = min(1, sqrt(kl_clip / sum_l lr_l^2 <V_l, grad_l>)) (Ba et al. 2017, section 5; Osawa et al. 2019).

    For a step lr V the sum estimates V^T F V lr^2, twice the Kullback-Leibler divergence between the predictions before and
    after it. Layers whose product is not finite are left out of the sum, so that they do not stop the others.

    Args:
        products: <V_l, grad_l>, (layers,).
        learning_rates: lr_l, (layers,).
        kl_clip: the bound, or None for no clipping.

    Returns:
        nu, a scalar tensor.
    """
    return products.new_ones(()) if kl_clip is None else clip_scale(products, learning_rates, kl_clip)


def rate_vector(rates: list[float | Tensor], like: Tensor) -> Tensor:
    """Learning rates as a vector on the device, made without waiting: tensors are not read by the host."""
    if any(isinstance(rate, Tensor) for rate in rates):
        numbers = [rate if isinstance(rate, Tensor) else like.new_full((), rate) for rate in rates]
        return torch.stack([number.to(like, non_blocking=True).reshape(()) for number in numbers])
    return device_vector(map(float, rates), like.device, like.dtype)


def add_updates(layer: Layer, blocks: list[Tensor], result: dict[nn.Parameter, Tensor | None]) -> list[nn.Parameter]:
    """Adds the updates of a layer, given V of each group, to the result; returns the parameters that have one."""
    found = []
    for parameter, update in layer.read_update(blocks):
        if parameter.grad is None:
            continue
        found.append(parameter)
        part = layer.part_of(parameter)
        if part is None:
            result[parameter] = update
        else:
            # Rows of the parameter that belong to a layer without an update keep their gradient.
            whole = result.get(parameter)
            whole = parameter.grad.to(update.dtype, copy=True) if whole is None else whole
            whole[part] = update
            result[parameter] = whole
    return found


def updates_of_layers(
    partition: Partition,
    layers: Sequence[Layer],
    usable: Sequence[bool],
    tiles: dict[int, Tensor],
    are_finite: dict[nn.Parameter, Tensor],
    host_looks: bool,
) -> tuple[dict[nn.Parameter, Tensor | None], FiniteFlags | None]:
    """The preconditioned gradient of each parameter, and flags of whether its gradient is finite.

    Args:
        partition: the layers, divided into blocks and tiles.
        layers: all covered layers.
        usable: a flag for each layer; the result does not contain the parameters of the others.
        tiles: number of each tile -> V.
        are_finite: weight -> a flag on the device.
        host_looks: whether the host reads the flags. Then parameters of a layer with a bad gradient get None, and no flags are
            returned.
    """
    result: dict[nn.Parameter, Tensor | None] = {}
    finite: dict[nn.Parameter, Tensor] = {}
    starts = itertools.accumulate((layer.groups for layer in layers), initial=0)
    for layer, start, is_usable in zip(layers, starts, usable, strict=False):
        if not is_usable:
            continue
        blocks = [assemble(partition, start + group, tiles) for group in range(layer.groups)]
        is_finite = are_finite[layer.weight]
        for parameter in add_updates(layer, blocks, result):
            # A parameter that layers share needs all their flags.
            finite[parameter] = finite[parameter] & is_finite if parameter in finite else is_finite
    if not host_looks:
        return result, FiniteFlags.of(finite)
    flags = torch.stack([is_finite.cpu() for is_finite in finite.values()]).tolist() if finite else []
    result.update((parameter, None) for parameter, is_finite in zip(finite, flags, strict=True) if not is_finite)
    return result, None
