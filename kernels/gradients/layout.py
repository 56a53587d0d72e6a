"""Where gradients of parameters are in stacks of matrices W, and updates in stacks of V: made once, used in every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import device_table

Result = TypeVar("Result")
_MOST = 16  # things that a layout remembers


@dataclass(frozen=True)
class Piece:
    """A block (rows, columns) of a matrix of a stack, and the same numbers in a tensor.

    Attributes:
        tensor: index in the list of gradients, or of updates.
        offset: of the block's first element behind that of the tensor, in elements.
        strides: of the block's rows and columns in the tensor, in elements.
        shape: rows and columns.
        stack: index in the list of stacks.
        matrix: index of the matrix in the stack.
        corner: row and column of the matrix where the block begins.
        flag: index of the matrix among those of all stacks.
    """

    tensor: int
    offset: int
    strides: tuple[int, int]
    shape: tuple[int, int]
    stack: int
    matrix: int
    corner: tuple[int, int]
    flag: int = 0

    def of_tensor(self, tensors: Sequence[Tensor]) -> Tensor:
        """The block in its tensor: a view."""
        tensor = tensors[self.tensor]
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.offset)

    def of_stack(self, stacks: Sequence[Tensor]) -> Tensor:
        """The block in its matrix: a view."""
        (row, column), (rows, columns) = self.corner, self.shape
        return stacks[self.stack][self.matrix, row : row + rows, column : column + columns]


@dataclass(eq=False)
class Layout:
    """Pieces, and the tables of them that kernels have read before."""

    pieces: list[Piece]
    _memory: dict[object, Any] = field(default_factory=dict)

    def remembered(self, key: object, make: Callable[[], Result]) -> Result:
        """What `make` returned for this key the first time: stacks and types of gradients rarely change."""
        if key not in self._memory:
            if len(self._memory) > _MOST:
                self._memory.clear()
            self._memory[key] = make()
        return self._memory[key]

    def tables(
        self, key: object, make: Callable[[], dict[torch.dtype, tuple[tuple[int, ...], ...]]], device: torch.device
    ) -> list[tuple[torch.dtype, Tensor]]:
        """What `make` returns for a key, as tables on the device.

        A graph that is being recorded gets tables of its own (see `device_table`).
        """

        def copied() -> list[tuple[torch.dtype, Tensor]]:
            return [(dtype, device_table(rows, device)) for dtype, rows in make().items()]

        return copied() if runtime.is_recording() else self.remembered(("tables", key), copied)
