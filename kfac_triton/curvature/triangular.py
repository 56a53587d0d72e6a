"""Inverses from a Cholesky factor by large matrix products that skip the blocks known to be zero.

LAPACK's potri (torch.cholesky_inverse) synchronizes its threads thousands of times. It is a fifth faster on an idle CPU, but
has been seen to take a hundred times as long on a busy one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LEAF = 64  # triangles up to this size are solved directly
_BLOCK = 128  # columns per product
_LOOP_FROM = 256  # larger matrices of a batch are taken one by one: on a CPU, a batched product is slower than single ones


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _BLOCK):
        yield slice(first, min(first + _BLOCK, stop))


def triangular_inverse(lower: Tensor) -> Tensor:
    """T = L^-1 for lower triangular L, (B, n, n), by recursion on halves: T21 = -T22 L21 T11."""
    out = torch.zeros_like(lower)
    if lower.shape[-1] <= _LOOP_FROM:
        _invert_into(lower, out)
    else:
        for matrix, inverse in zip(lower, out, strict=True):
            _invert_into(matrix, inverse)
    return out


def _invert_into(lower: Tensor, out: Tensor) -> None:
    n = lower.shape[-1]
    if n <= _LEAF:
        identity = torch.eye(n, dtype=lower.dtype, device=lower.device).expand_as(lower)
        out.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = (n // 2 + 15) // 16 * 16
    _invert_into(lower[..., :half, :half], out[..., :half, :half])
    _invert_into(lower[..., half:, half:], out[..., half:, half:])
    product = lower.new_empty(*lower.shape[:-2], n - half, half)
    for columns in _blocks(0, half):  # T11 is zero above its diagonal
        torch.matmul(
            lower[..., half:, columns.start : half], out[..., columns.start : half, columns], out=product[..., columns]
        )
    for rows in _blocks(half, n):  # and so is T22
        known = slice(half, rows.stop)
        torch.matmul(out[..., rows, known], product[..., : rows.stop - half, :], out=out[..., rows, :half])
    out[..., half:, :half].neg_()


def symmetric_product(root: Tensor) -> Tensor:
    """X = T^T T for lower triangular T, (B, n, n); symmetric bit for bit, since one half is copied from the other."""
    out = torch.empty_like(root)
    if root.shape[-1] <= _LOOP_FROM:
        _multiply_into(root, out)
    else:
        for matrix, product in zip(root, out, strict=True):
            _multiply_into(matrix, product)
    return out


def _multiply_into(root: Tensor, out: Tensor) -> None:
    n = root.shape[-1]
    for columns in _blocks(0, n):
        for rows in _blocks(columns.start, n):
            block = root[..., rows.start :, rows].mT @ root[..., rows.start :, columns]  # T is zero above its diagonal
            if rows == columns:
                out[..., rows, columns] = (block + block.mT).mul_(0.5)
            else:
                out[..., rows, columns] = block
                out[..., columns, rows] = block.mT
