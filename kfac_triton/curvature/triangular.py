"""Inverses from a Cholesky factor: on a CPU by matrix products that skip the blocks known to be zero, on a GPU in a few calls.

On a CPU, LAPACK's potri (torch.cholesky_inverse) synchronizes its threads thousands of times. It is a fifth faster on an idle
machine, but has been seen to take a hundred times as long on a busy one.

On a GPU each of the small products is a launch, and a stack of matrices of 3,072 rows would take thousands of them. There the
whole stack is solved against the identity in one call (cuBLAS's trsmBatched; where PyTorch prefers it, MAGMA's, or one trsm
for each matrix of a small batch), and one batched product follows. Twice the multiplications of the recursion are cheaper than
its launches. `torch.cholesky_inverse` is not used: without MAGMA it calls potrs for one matrix after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from ..kernels.certificate import mirror

_LEAF = 64  # triangles up to this size are solved directly
_BLOCK = 128  # columns per product
_LOOP_FROM = 256  # larger matrices of a batch are taken one by one: on a CPU, a batched product is slower than single ones


def prefers_batches(device: torch.device) -> bool:
    """Whether one call for a whole stack is faster than many that skip zeros: everywhere but on a CPU."""
    return device.type != "cpu"


def _blocks(start: int, stop: int) -> Iterator[slice]:
    for first in range(start, stop, _BLOCK):
        yield slice(first, min(first + _BLOCK, stop))


def _batches(stack: Tensor, out: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
    """The matrices that one product takes together, and where their results go: the whole stack, or each matrix alone."""
    return [(stack, out)] if stack.shape[-1] <= _LOOP_FROM else zip(stack, out, strict=True)


def triangular_inverse(lower: Tensor) -> Tensor:
    """T = L^-1 for lower triangular L, (B, n, n); on a CPU by recursion on halves: T21 = -T22 L21 T11."""
    if prefers_batches(lower.device):
        identity = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        # What a library leaves above the diagonal is zero by the mathematics, not by its contract.
        return torch.linalg.solve_triangular(lower, identity, upper=False).tril()
    result = torch.zeros_like(lower)
    for matrix, inverse in _batches(lower, result):
        _invert_into(matrix, inverse)
    return result


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
        known = slice(columns.start, half)
        torch.matmul(lower[..., half:, known], out[..., known, columns], out=product[..., columns])
    for rows in _blocks(half, n):  # and so is T22
        known = slice(half, rows.stop)
        torch.matmul(out[..., rows, known], product[..., : rows.stop - half, :], out=out[..., rows, :half])
    out[..., half:, :half].neg_()


def symmetric_product(root: Tensor) -> Tensor:
    """X = T^T T for lower triangular T, (B, n, n); symmetric bit for bit, since one half is copied from the other."""
    if prefers_batches(root.device):
        return mirror(root.mT @ root)
    result, n = torch.empty_like(root), root.shape[-1]
    for t, x in _batches(root, result):
        for columns in _blocks(0, n):
            for rows in _blocks(columns.start, n):
                block = t[..., rows.start :, rows].mT @ t[..., rows.start :, columns]  # T is zero above its diagonal
                if rows == columns:
                    block = (block + block.mT).mul_(0.5)
                x[..., rows, columns] = block
                x[..., columns, rows] = block.mT
    return result
