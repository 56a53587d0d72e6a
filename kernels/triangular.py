"""Inverses from a Cholesky factor by large matrix products.

LAPACK's potri (torch.cholesky_inverse) synchronises its threads thousands of times: as fast as this on an idle CPU, a
hundred times slower on a busy one.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAF = 256  # triangles up to this size are solved directly
_BLOCK = 256


def triangular_inverse(lower: Tensor) -> Tensor:
    """T = L^-1 for lower triangular L, (B, n, n), by halves: L21 contributes -T22 L21 T11."""
    out = torch.zeros_like(lower)
    _invert_into(lower, out)
    return out


def _invert_into(lower: Tensor, out: Tensor) -> None:
    n = lower.shape[-1]
    if n <= _LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
        out.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = (n // 2 + 15) // 16 * 16
    top, bottom = slice(None, half), slice(half, None)
    _invert_into(lower[:, top, top], out[:, top, top])
    _invert_into(lower[:, bottom, bottom], out[:, bottom, bottom])
    out[:, bottom, top] = -(out[:, bottom, bottom] @ (lower[:, bottom, top] @ out[:, top, top]))


def symmetric_product(root: Tensor) -> Tensor:
    """X = T^T T for lower triangular T, (B, n, n): only the blocks that are not zero, mirrored, so bitwise symmetric."""
    n = root.shape[-1]
    out = torch.empty_like(root)
    for start in range(0, n, _BLOCK):
        for row in range(start, n, _BLOCK):
            columns, rows = slice(start, min(start + _BLOCK, n)), slice(row, min(row + _BLOCK, n))
            block = root[:, row:, rows].mT @ root[:, row:, columns]  # T is zero above its diagonal
            if row == start:
                out[:, rows, columns] = (block + block.mT).mul_(0.5)
            else:
                out[:, rows, columns] = block
                out[:, columns, rows] = block.mT
    return out
