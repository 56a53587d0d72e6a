"""Gradients of the layers of one shape, stacked, preconditioned and read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .factors import FactorBank, ShapeGroup
from .inverse import InverseStack
from .kernels import ops
from .layers import Layer


@dataclass(frozen=True)
class Block:
    """One Kronecker block: a layer, or one channel group of it."""

    layer: Layer
    group: int


class GradientStack:
    """Persistent buffers (B, m, n) of one `ShapeGroup`, padded with zeros.

    Attributes:
        members: the blocks in order.
        gradient: W = [weight.grad | bias.grad].
        update: V = G^-1 W A^-1.
        product: <V, W>, (B,).
    """

    def __init__(
        self,
        group: ShapeGroup,
        blocks: list[Block],
        bank: FactorBank,
        inverses: list[InverseStack],
        backend: str,
        host_looks: bool,
    ) -> None:
        self.indices = group.blocks
        self.places = torch.tensor(group.blocks, device=bank.home)
        self._backend = backend
        self._host_looks = host_looks
        self.members = [blocks[i] for i in group.blocks]
        self._left, self._right = inverses[group.g_stack], inverses[group.a_stack]
        self._left_run, self._right_run = group.g_run, group.a_run
        rows, columns = (bank.stacks[i].factors.shape[-1] for i in (group.g_stack, group.a_stack))
        self.gradient = bank.stacks[group.a_stack].factors.new_zeros(len(self.members), rows, columns)
        self.update = torch.zeros_like(self.gradient)
        self.product = self.gradient.new_zeros(len(self.members))
        self._nothing = self.gradient.new_empty(0)

    def precondition(self, usable: list[bool]) -> None:
        """V and <V, W> for the blocks that are usable; zero for the others."""
        parts = [
            block.layer.gradient(block.group) if usable[index] else (None, None)
            for index, block in zip(self.indices, self.members, strict=True)
        ]
        weights, biases = ([self._nothing if x is None else x for x in side] for side in zip(*parts, strict=True))
        ops.gather(weights, biases, self.gradient, backend=self._gather_backend(weights + biases))
        ops.precondition(
            self.gradient,
            self._left.values[self._left_run],
            self._right.values[self._right_run],
            self.update,
            self.product,
            factored=self._left.factored,
            backend=self._backend,
        )

    def _gather_backend(self, gradients: list[Tensor]) -> str:
        """Gradients with gaps, or of several types, are copied one by one whatever the backend."""
        plain = all(gradient.is_contiguous() for gradient in gradients)
        return self._backend if plain and len({g.dtype for g in gradients if g.numel()}) == 1 else "torch"

    def finish(self, scale: Tensor) -> Tensor:
        """Scales V by nu; a block whose gradient is not finite gets no update. Returns the flags (B,) of those."""
        broken = ~torch.isfinite(self.product)
        self.update.mul_(scale.to(self.update))
        if not self._host_looks or bool(broken.any()):
            self.update.masked_fill_(broken[:, None, None], 0.0)
        return broken
