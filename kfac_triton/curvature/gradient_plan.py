"""Gradients of all layers into stacks and updates out of them, in one launch each, from tables that are made once."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops, runtime
from ..kernels.gradients.layout import Layout, Piece
from ..kernels.strides import is_dense, span
from ..layers import Layer
from ..layers.partition import Partition
from .finite_flags import FiniteFlags
from .preconditioning import GradientStack, add_updates, assemble, rate_vector

_ALIGNMENT = 16  # bytes between which updates begin, where there is room
LearningRate = Callable[[nn.Parameter], float | Tensor]


class GradientPlan:
    """Where gradients and updates are, as long as layers have the same parameters with gradients of the same strides.

    Updates are dense and of the type of their parameters, because rules that process many parameters at a time need that. They
    are in the buffers of the gradient stacks, which nothing reads after V and <V, W> are computed.

    The methods of an adapter may copy, when they arrange a gradient as a matrix or read an update from V. Then they are called
    in every step.

    Args:
        partition: the layers, divided into blocks and tiles.
        stacks: the gradient stacks; they are of one type and on one device.
        usable: a flag for each layer; the others get no update.
        backend: of the kernels.

    Attributes:
        zeros: flags (tiles,), in the order of the stacks: those that the last step gave no update.
    """

    def __init__(self, partition: Partition, stacks: Sequence[GradientStack], usable: Sequence[bool], backend: str) -> None:
        self._partition, self._usable, self._backend = partition, list(usable), backend
        self._gradients, self._updates = [x.gradient for x in stacks], [x.update for x in stacks]
        self._parameters = [p for layer in partition.layers for p in layer.parameters()]
        self._kinds = _kinds(self._parameters)
        order = [number for stack in stacks for number in stack.tiles]
        self._place = {number: (s, i) for s, stack in enumerate(stacks) for i, number in enumerate(stack.tiles)}
        self._flag = {number: flag for flag, number in enumerate(order)}
        self._sources: list[nn.Parameter] = []  # their gradients are read where they are
        self._copied: list[tuple[Layer, int]] = []  # layers and groups whose gradients are copied before
        self._gather = Layout(self._pieces_of_gradients())
        self._dense: dict[nn.Parameter, Tensor | None] = {}
        self._outputs: list[Tensor] = []
        self._read: list[int] = []  # numbers of layers whose updates are read from V in every step
        self._scatter = Layout(self._pieces_of_updates())
        self._number_weights([partition.blocks[partition.tiles[number].block].layer.weight for number in order])
        self._places = torch.tensor(order, dtype=torch.int64, device=self._gradients[0].device)

    def fits(self, usable: Sequence[bool]) -> bool:
        """Whether nothing has changed that the plan depends on."""
        parameters = [p for layer in self._partition.layers for p in layer.parameters()]
        return (
            self._usable == usable
            and len(parameters) == len(self._parameters)
            and all(map(operator.is_, parameters, self._parameters))
            and _kinds(parameters) == self._kinds
        )

    def step(
        self,
        solve: Callable[[], None],
        learning_rate: LearningRate,
        kl_clip: float | None,
        scale: Tensor,
        dropped: Tensor,
    ) -> tuple[dict[nn.Parameter, Tensor | None], FiniteFlags]:
        """Preconditioned gradients, clipped; zero for parameters whose gradient is not finite, and flags that say so.

        Args:
            solve: computes V from the gradient stacks.
            learning_rate: of a weight.
            kl_clip: see `kernels.ops.clip`.
            scale: output, nu.
            dropped: counts gradients that are not finite, (tiles,).
        """
        gradients = [p.grad for p in self._sources]
        for layer, group in self._copied:
            gradients += [x.contiguous() for x, _, _ in layer.gradient_parts(group)]
        ops.gather(self._gradients, gradients, self._gather, backend=self._backend)  # type: ignore[arg-type]
        solve()
        ops.inner(self._gradients, self._updates, self._inner, backend=self._backend)
        rates = rate_vector([learning_rate(weight) for weight in self.weights], self._inner)
        flags = self._finite, self.zeros
        ops.clip(self._products, rates, self._members, self._places, kl_clip, scale, *flags, dropped, backend=self._backend)
        ops.scatter(self._updates, self._outputs, scale, self.zeros, self._scatter, backend=self._backend)
        result, flags_of = dict(self._dense), dict(self._flags_of)
        for number in self._read:
            layer = self._partition.layers[number]
            for p in add_updates(layer, self._blocks(number), result):
                flags_of[p] = (*flags_of.get(p, ()), self._number[layer.weight])
        return result, FiniteFlags(self._finite, flags_of)

    def tile_sums(self, scale: Tensor) -> dict[int, tuple[float, ...]]:
        """Tile -> squared norms of W and V, and <V, W> before and after the KL clip, of the last step; scale is its nu."""
        product, gradient, update = self._inner.double()
        moved = (update * scale.double().square()).masked_fill(self.zeros, 0.0)
        rows = torch.stack([gradient, moved, product, (product * scale).masked_fill(self.zeros, 0.0)], 1).tolist()
        return dict(zip(self._place, map(tuple, rows), strict=True))

    def _number_weights(self, owners: list[nn.Parameter]) -> None:
        """Tables that say which tiles belong to which weight."""
        self.weights = list(dict.fromkeys(owners))
        self._number = {weight: i for i, weight in enumerate(self.weights)}
        members: dict[nn.Parameter, list[int]] = defaultdict(list)
        for flag, weight in enumerate(owners):
            members[weight].append(flag)
        most, device = max(map(len, members.values())), self._gradients[0].device
        rows = [members[weight] + [-1] * (most - len(members[weight])) for weight in self.weights]
        self._members = torch.tensor(rows, dtype=torch.int32, device=device)
        self._flags_of = {p: (self._number[weight],) for p, weight in self._owner.items()}
        self._inner = torch.zeros(3, len(owners), dtype=torch.float32, device=device)  # <V, W>, <W, W> and <V, V>
        self._products = self._inner[0]
        self.zeros = torch.zeros(len(owners), dtype=torch.bool, device=device)
        self._finite = torch.zeros(len(self.weights), dtype=torch.bool, device=device)

    def _pieces_of_gradients(self) -> list[Piece]:
        partition = self._partition
        numbers: dict[nn.Parameter, int] = {}
        copied: list[Piece] = []
        pieces: list[Piece] = []
        count = 0  # of matrices that are copied
        for number, block in enumerate(partition.blocks):
            if not self._usable[block.layer_number]:
                continue
            parts = block.layer.gradient_parts(block.group)
            found = [_owner_of(part, block.layer.parameters()) for part, _, _ in parts]
            if None in found:
                self._copied.append((block.layer, block.group))
            for (part, row, column), owner in zip(parts, found, strict=True):
                if None in found or owner is None or owner.grad is None:
                    strides, offset, tensor, into = (part.shape[1], 1), 0, count, copied
                    count += 1
                else:
                    rows, columns = part.stride()
                    strides, offset = (rows, columns), int(part.storage_offset() - owner.grad.storage_offset())
                    tensor, into = numbers.setdefault(owner, len(numbers)), pieces
                for tile in partition.tiles_of[number]:
                    into += self._cut(tile, tuple(part.shape), tuple(strides), offset, tensor, row, column)
        self._sources = list(numbers)
        moved = [Piece(x.tensor + len(numbers), x.offset, x.strides, x.shape, x.stack, x.matrix, x.corner) for x in copied]
        return pieces + moved

    def _cut(self, tile: int, shape: Any, strides: Any, offset: int, tensor: int, row: int, column: int) -> list[Piece]:
        """The piece of a matrix, which begins at this row and column of W, that is in a tile; none if it is outside."""
        a, g = (self._partition.parts[part] for part in (self._partition.tiles[tile].a, self._partition.tiles[tile].g))
        top, left = max(row, g.start), max(column, a.start)
        height, width = min(row + shape[0], g.stop) - top, min(column + shape[1], a.stop) - left
        if height <= 0 or width <= 0:
            return []
        offset += (top - row) * strides[0] + (left - column) * strides[1]
        return [Piece(tensor, offset, strides, (height, width), *self._place[tile], (top - g.start, left - a.start))]

    def _blocks(self, layer_number: int) -> list[Tensor]:
        """V of each group of a layer."""
        tiles = {
            tile: self._updates[s][i]
            for block in self._partition.blocks_of(layer_number)
            for tile in self._partition.tiles_of[block]
            for s, i in [self._place[tile]]
        }
        return [assemble(self._partition, block, tiles) for block in self._partition.blocks_of(layer_number)]

    def _pieces_of_updates(self) -> list[Piece]:
        self._owner: dict[nn.Parameter, nn.Parameter] = {}
        pieces = []
        for number, layer in enumerate(self._partition.layers):
            if not self._usable[number]:
                continue
            tiles = [tile for block in self._partition.blocks_of(number) for tile in self._partition.tiles_of[block]]
            dense = self._densely(layer, tiles[0], self._blocks(number)) if len(tiles) == 1 else None
            if dense is not None:
                pieces += dense
                continue
            self._read.append(number)
            for tile in tiles:  # scaled where they are
                s, i = self._place[tile]
                stack = self._updates[s]
                (m, n), offset = stack.shape[1:], i * stack.stride(0)
                pieces.append(Piece(len(self._outputs), offset, (n, 1), (m, n), s, i, (0, 0), self._flag[tile]))
                self._outputs.append(stack)
        return pieces

    def _densely(self, layer: Layer, tile: int, blocks: list[Tensor]) -> list[Piece] | None:
        """The pieces of a layer with one tile, whose updates are views of V and get room in the tile's gradient; else None."""
        s, i = self._place[tile]
        stack, room, start = self._updates[s], self._gradients[s][i].flatten().view(torch.uint8), 0
        pieces: list[Piece] = []
        outputs: dict[nn.Parameter, Tensor] = {}
        for p, update in layer.read_update(blocks):
            form = _as_matrix(update, stack)
            if form is None or layer.part_of(p) is not None or not any(p is known for known in layer.parameters()):
                return None
            if p.grad is None:
                continue
            dtype = p.dtype if p.dtype in runtime.TYPES else torch.float32
            size = p.numel() * dtype.itemsize
            wide = _up(start, _ALIGNMENT)
            start = wide if wide + size <= len(room) else _up(start, dtype.itemsize)
            if start + size > len(room):
                return None
            output = room[start : start + size].view(dtype)
            start += size
            corner, (height, width), is_turned = form
            keeps_strides = p.dim() == 2 and is_dense(p)
            output = output.as_strided(p.shape, p.stride()) if keeps_strides else output.view(p.shape)
            rows, columns = p.stride() if keeps_strides else (width, 1)
            where = (columns, rows), (width, height)
            if not is_turned:
                where = (rows, columns), (height, width)
            pieces.append(Piece(len(self._outputs) + len(outputs), 0, *where, s, i, corner, self._flag[tile]))
            outputs[p] = output
        self._dense.update(outputs)
        self._owner.update(dict.fromkeys(outputs, layer.weight))
        self._outputs += outputs.values()
        return pieces


def _up(number: int, unit: int) -> int:
    """The next multiple of a unit."""
    return -(-number // unit) * unit


def _kinds(parameters: list[nn.Parameter]) -> list[list[Any]]:
    """What a plan depends on, beside the parameters themselves: one list for each property, which is made fastest."""
    gradients = [p.grad for p in parameters]
    has_gradient = [gradient is not None for gradient in gradients]
    both = [*parameters, *(gradient for gradient in gradients if gradient is not None)]
    return [has_gradient, [x.dtype for x in both], list(map(Tensor.stride, both))]


def _owner_of(part: Tensor, parameters: list[nn.Parameter]) -> nn.Parameter | None:
    """The parameter whose gradient this is a view of; None for a copy.

    Addresses decide, not storages: gradients may be views of one buffer, as DistributedDataParallel makes them, in which their
    distances may change from step to step.
    """
    for p in parameters:
        if (
            p.grad is not None
            and 0 <= part.data_ptr() - p.grad.data_ptr() < span(p.grad.shape, p.grad.stride()) * p.grad.itemsize
        ):
            return p
    return None


def _as_matrix(update: Tensor, stack: Tensor) -> tuple[tuple[int, int], tuple[int, int], bool] | None:
    """Where an update, as a matrix, begins in a matrix of a stack, its rows and columns, and whether it is a transposed part.

    None if it is no view of the stack that can be written as a matrix.
    """
    m, n = stack.shape[1:]
    matrix = update.reshape(-1, 1) if n == 1 or update.dim() < 2 else update.flatten(1)
    if matrix.untyped_storage().data_ptr() != stack.untyped_storage().data_ptr() or matrix.dtype != stack.dtype:
        return None
    (height, width), (rows, columns) = matrix.shape, matrix.stride()
    row, column = divmod(int(matrix.storage_offset() - stack.storage_offset()) % (m * n), n)
    for is_turned, (down, across) in ((False, (n, 1)), (True, (1, n))):
        if (rows == down or height == 1) and (columns == across or width == 1):
            return (row, column), (height, width), is_turned
    return None
