"""FactorBank: all factors of one padded size live in one (B, n, n) stack, so that one launch serves many layers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 16  # sides are padded to a multiple: an odd bias column would cost aligned loads and tensor cores


def padded(size: int) -> int:
    """The side that a factor of this size is stored with."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class BlockSize:
    """A Kronecker block to store: sides of A and G, where and in what precision."""

    a: int
    g: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class ShapeGroup:
    """Blocks whose gradients have one padded shape; their factors are contiguous runs of two stacks."""

    blocks: tuple[int, ...]
    a_stack: int
    a_run: slice
    g_stack: int
    g_run: slice


class FactorStack:
    """Factors of one padded size. The pad is zero, so that damping alone fills it and no spectrum is widened."""

    def __init__(self, sizes: list[int], side: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes = sizes
        self.factors = torch.zeros(len(sizes), side, side, dtype=dtype, device=device)

    def __len__(self) -> int:
        return len(self.sizes)


class FactorBank:
    """Storage and moving average of the factors of all blocks.

    Every factor has a slot, numbered through all stacks; vectors over slots (`updates`, traces, dampings) use that number.

    Attributes:
        stacks: one per padded size, dtype and device.
        groups: blocks by shape of their gradient.
        a_slots, g_slots: slot of each block's A and G.
        updates: number of accepted updates a slot, (slots,).
    """

    def __init__(self, blocks: Sequence[BlockSize]) -> None:
        by_shape: dict[tuple[int, int, torch.dtype, torch.device], list[int]] = defaultdict(list)
        for index, block in enumerate(blocks):
            by_shape[padded(block.g), padded(block.a), block.dtype, block.device].append(index)
        members: dict[tuple[int, torch.dtype, torch.device], list[tuple[str, int, int]]] = defaultdict(list)
        runs = []
        for (g_side, a_side, dtype, device), indices in by_shape.items():
            a_members, g_members = members[a_side, dtype, device], members[g_side, dtype, device]
            a_start = len(a_members)
            a_members.extend(("a", i, blocks[i].a) for i in indices)
            g_start = len(g_members)
            g_members.extend(("g", i, blocks[i].g) for i in indices)
            runs.append((indices, (a_side, dtype, device), a_start, (g_side, dtype, device), g_start))
        keys = list(members)
        self.stacks = [FactorStack([size for _, _, size in members[key]], *key) for key in keys]
        self.groups = [
            ShapeGroup(
                blocks=tuple(indices),
                a_stack=keys.index(a_key),
                a_run=slice(a_start, a_start + len(indices)),
                g_stack=keys.index(g_key),
                g_run=slice(g_start, g_start + len(indices)),
            )
            for indices, a_key, a_start, g_key, g_start in runs
        ]
        self.home = blocks[0].device
        slot_of = {
            (kind, block): slot for slot, (kind, block, _) in enumerate(member for key in keys for member in members[key])
        }
        self.a_slots = torch.tensor([slot_of["a", i] for i in range(len(blocks))], device=self.home)
        self.g_slots = torch.tensor([slot_of["g", i] for i in range(len(blocks))], device=self.home)
        self.sizes = torch.tensor([size for stack in self.stacks for size in stack.sizes], device=self.home)
        self.updates = torch.zeros(len(slot_of), device=self.home)
        self._slots = [(stack, i) for stack in self.stacks for i in range(len(stack))]
        self._slot_lists = self.a_slots.tolist(), self.g_slots.tolist()

    def view(self, slot: int) -> Tensor:
        """The factor in a slot without its pad: a view."""
        stack, index = self._slots[slot]
        size = stack.sizes[index]
        return stack.factors[index, :size, :size]

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        """A and G of a block: views of the bias-corrected moving averages."""
        a_slots, g_slots = self._slot_lists
        return self.view(a_slots[index]), self.view(g_slots[index])

    def runs(self) -> list[slice]:
        """Per stack, the slots that it holds."""
        starts = [0]
        for stack in self.stacks:
            starts.append(starts[-1] + len(stack))
        return [slice(start, stop) for start, stop in itertools.pairwise(starts)]

    def traces(self) -> Tensor:
        """Trace of every factor, (slots,)."""
        return torch.cat([s.factors.diagonal(dim1=-2, dim2=-1).sum(-1).to(self.home) for s in self.stacks])

    def scatter(self, a_values: Tensor, g_values: Tensor) -> Tensor:
        """Vector over slots from one value a block for A and one for G."""
        out = a_values.new_empty(len(self.updates))
        out[self.a_slots] = a_values
        out[self.g_slots] = g_values
        return out

    def update(self, a_sums: list[Tensor], g_sums: list[Tensor], scale: Tensor, accept: Tensor, ema_decay: float) -> None:
        """Moving average with bias correction (Kingma and Ba 2015, section 3): factor <- (1 - r) factor + r scale sum.

        With r = (1 - decay) / (1 - decay^t) at the t-th update this is the average that starts at zero, divided by the sum of
        its weights; the factor itself is always the corrected one.

        Args:
            a_sums: per block the sum of a a^T, in the padded size.
            g_sums: per block the sum of g g^T.
            scale: from sums to means, (slots,).
            accept: (slots,) flags; a slot that is not accepted keeps its factor and its count.
            ema_decay: weight of the past, in [0, 1).
        """
        updates = self.updates + accept
        rate = (1 - ema_decay) / (1 - ema_decay ** updates.double().clamp_min(1))
        sums = dict(zip(itertools.chain(*self._slot_lists), itertools.chain(a_sums, g_sums), strict=True))
        blend = _blend_on_host if all(s.factors.device.type == "cpu" for s in self.stacks) else _blend_on_device
        blend([(stack.factors[i], sums[slot]) for slot, (stack, i) in enumerate(self._slots)], 1 - rate, rate * scale, accept)
        self.updates = updates


def _blend_on_host(pairs: list[tuple[Tensor, Tensor]], keep: Tensor, gain: Tensor, accept: Tensor) -> None:
    for (factor, total), old, new, accepted in zip(pairs, keep.tolist(), gain.tolist(), accept.tolist(), strict=True):
        if accepted:
            factor.mul_(old).add_(total, alpha=new)


def _blend_on_device(pairs: list[tuple[Tensor, Tensor]], keep: Tensor, gain: Tensor, accept: Tensor) -> None:
    """The same without a host read: a sum that is not accepted may be NaN, so it is selected away, not weighted with zero."""
    for slot, (factor, total) in enumerate(pairs):
        new = factor * keep[slot].to(factor) + total * gain[slot].to(factor)
        factor.copy_(torch.where(accept[slot].to(factor.device), new, factor))
