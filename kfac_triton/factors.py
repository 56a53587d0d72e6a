"""FactorBank: all factors of one padded size live in one (B, n, n) stack, so that one launch serves many layers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .kernels import ops

ALIGNMENT = 16  # sides are padded to a multiple: an odd bias column would cost aligned loads and tensor cores


def padded(size: int) -> int:
    """The side that a factor of this size is stored with."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Single precision for every weight up to it: moving averages in 16 bits stop moving."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


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
    """Factors of one padded size, and as many sums of the current step.

    The pad is zero, so that damping alone fills it and no spectrum is widened.
    """

    def __init__(self, sizes: list[int], side: int, dtype: torch.dtype, device: torch.device) -> None:
        self.sizes = sizes
        self.factors = torch.zeros(len(sizes), side, side, dtype=dtype, device=device)
        self.sums = torch.zeros_like(self.factors)

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

    def padded_view(self, slot: int) -> Tensor:
        """The factor in a slot with its pad: a view."""
        stack, index = self._slots[slot]
        return stack.factors[index]

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

    def sums_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Where backward passes sum a a^T and g g^T of a block, in the padded size: views."""
        a, g = (self._slots[slots[index]] for slots in self._slot_lists)
        return a[0].sums[a[1]], g[0].sums[g[1]]

    def slots_of(self, index: int) -> tuple[int, int]:
        """Slots of A and G of a block."""
        a_slots, g_slots = self._slot_lists
        return a_slots[index], g_slots[index]

    def sum_traces(self) -> Tensor:
        """Trace of every sum, (slots,): finite exactly when the sum is."""
        return torch.cat([s.sums.diagonal(dim1=-2, dim2=-1).sum(-1).to(self.home) for s in self.stacks])

    def weights(self, accept: Tensor, ema_decay: float) -> Tensor:
        """Weight r of the new statistics in every slot, (slots,), counting the update where it is accepted.

        The moving average with bias correction (Kingma and Ba 2015, section 3) is factor <- (1 - r) factor + r new with
        r = (1 - decay) / (1 - decay^t) at the t-th update: the average that starts at zero, divided by the sum of its
        weights. The factor itself is always the corrected one.

        Args:
            accept: (slots,) flags; a slot that is not accepted keeps its count.
            ema_decay: weight of the past, in [0, 1).
        """
        self.updates += accept
        return (1 - ema_decay) / (1 - ema_decay ** self.updates.double().clamp_min(1))

    def blend(self, keep: Tensor, gain: Tensor, accept: Tensor, backend: str = "auto") -> None:
        """Factor <- keep factor + gain sum for every slot that is accepted; vectors over slots."""
        for stack, run in zip(self.stacks, self.runs(), strict=True):
            device = stack.factors.device
            old, new, accepted = (vector[run].to(device) for vector in (keep, gain, accept))
            ops.blend(stack.factors, stack.sums, old, new, accepted, backend=backend)
