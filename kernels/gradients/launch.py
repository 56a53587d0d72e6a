"""Launches the copies between gradients or updates and stacks: one for each type of number."""

from __future__ import annotations

import functools
from collections import defaultdict

import torch
from torch import Tensor

from .. import runtime
from ..device_tables import Table, device_table, device_vector
from ..tiles import count, shares_of_each
from . import kernel
from .layout import Layout, Piece

_BLOCK_M, _BLOCK_N = 32, 64
_NOTHING = (0,) * 8
Rows = dict[torch.dtype, tuple[tuple[int, ...], ...]]


def can_use_gather(stacks: list[Tensor], gradients: list[Tensor], layout: Layout) -> str | None:
    """Why the kernel cannot serve these gradients; None if it can."""
    types = tuple([gradient.dtype for gradient in gradients])
    return layout.remembered(("gather", types), lambda: _ungatherable(types, layout.pieces)) or _unstacked(stacks)


def _ungatherable(types: tuple[torch.dtype, ...], pieces: list[Piece]) -> str | None:
    found: dict[tuple[int, int], list[torch.dtype]] = defaultdict(list)
    for piece in pieces:
        found[piece.stack, piece.matrix].append(types[piece.tensor])
    for (stack, matrix), members in found.items():
        if len(set(members)) > 1:
            return f"the gradients of matrix {matrix} of stacks[{stack}] have different types"
        if len(members) > 2:
            return f"matrix {matrix} of stacks[{stack}] has more than two pieces"
    return _unreadable("gradients", types)


def can_use_inner(gradients: list[Tensor], updates: list[Tensor], out: Tensor) -> str | None:
    """Why the kernel cannot serve these stacks; None if it can."""
    return _unstacked(gradients) or _unstacked(updates)


def launch_inner(gradients: list[Tensor], updates: list[Tensor], out: Tensor) -> None:
    """The Triton implementation of `inner_reference`."""
    pairs = zip(gradients, updates, strict=True)
    rows, most = _pairs(tuple([(w.data_ptr(), v.data_ptr(), w.shape[0], w.stride(0)) for w, v in pairs]))
    block = 1024
    shares = shares_of_each(count(most, block), len(rows))
    partials = out.new_empty(3, len(rows), shares)
    kernel.inner_kernel[(len(rows), shares)](
        device_table(rows, out.device), partials, BLOCK=block, ALIGNED=_is_aligned(rows),
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    torch.sum(partials, 2, out=out)


@functools.lru_cache(maxsize=64)
def _pairs(stacks: tuple[tuple[int, ...], ...]) -> tuple[Table, int]:
    """Rows for `inner_kernel`, from the addresses of two stacks, their number of matrices and the elements of one.

    And the elements of the largest matrix.
    """
    rows = [(w + 4 * size * i, v + 4 * size * i, size) for w, v, matrices, size in stacks for i in range(matrices)]
    return Table(rows), max(size for *_, size in rows)


@functools.lru_cache(maxsize=64)
def _is_aligned(rows: Table) -> bool:
    return not any(w % 16 or v % 16 or size % 4 for w, v, size in rows)


def can_use_scatter(stacks: list[Tensor], updates: list[Tensor], scale: Tensor, zeros: Tensor, layout: Layout) -> str | None:
    """Why the kernel cannot serve these updates; None if it can."""
    if scale.dtype != torch.float32:
        return f"scale is {scale.dtype}, and the kernel multiplies by a float32"
    types = tuple([update.dtype for update in updates])
    return layout.remembered(("scatter", types), lambda: _unreadable("updates", types)) or _unstacked(stacks)


def _unreadable(name: str, types: tuple[torch.dtype, ...]) -> str | None:
    wrong = (f"{name}[{i}] is {dtype}" for i, dtype in enumerate(types) if dtype not in runtime.TYPES)
    return next((f"{reason}, and the kernel reads float32, bfloat16 and float16" for reason in wrong), None)


def _unstacked(stacks: list[Tensor]) -> str | None:
    for i, stack in enumerate(stacks):
        if stack.dtype != torch.float32 or not stack.is_contiguous():
            return f"stacks[{i}] is not a contiguous float32 stack"
    return None


def _row(piece: Piece) -> tuple[int, ...]:
    return (piece.tensor, piece.offset, *piece.strides, *piece.shape, *piece.corner)


def _address(stack: Tensor, matrix: int) -> int:
    return stack.data_ptr() + 4 * matrix * stack.stride(0)


def _shares(sides: list[tuple[int, int]]) -> int:
    """Programs for each of some matrices of these sides."""
    return shares_of_each(max(count(m, _BLOCK_M) * count(n, _BLOCK_N) for m, n in sides), len(sides))


def launch_gather(stacks: list[Tensor], gradients: list[Tensor], layout: Layout) -> None:
    """The Triton implementation of `gather_reference`."""
    types = tuple([gradient.dtype for gradient in gradients])

    def make() -> Rows:
        members: dict[tuple[int, int], list[Piece]] = defaultdict(list)
        for piece in layout.pieces:
            members[piece.stack, piece.matrix].append(piece)
        rows: dict[torch.dtype, list[tuple[int, ...]]] = defaultdict(list)
        default = types[0] if types else torch.float32
        for s, stack in enumerate(stacks):
            for i in range(len(stack)):
                pieces = members[s, i]
                pair = [*map(_row, pieces), _NOTHING, _NOTHING][:2]
                dtype = types[pieces[0].tensor] if pieces else default
                rows[dtype].append((_address(stack, i), *stack.shape[1:], *pair[0], *pair[1]))
        return {dtype: tuple(some) for dtype, some in rows.items()}

    key = types, *[(x.data_ptr(), x.shape) for x in stacks]
    addresses = device_vector(map(Tensor.data_ptr, gradients) if gradients else (0,), stacks[0].device)
    shares = layout.remembered(key[1:], lambda: _shares([(x.shape[1], x.shape[2]) for x in stacks for _ in range(len(x))]))
    for dtype, table in layout.tables(key, make, stacks[0].device):
        kernel.gather_kernel[(len(table), shares)](
            addresses, table, DTYPE=runtime.TYPES[dtype], BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N, num_warps=4
        )


def launch_scatter(stacks: list[Tensor], updates: list[Tensor], scale: Tensor, zeros: Tensor, layout: Layout) -> None:
    """The Triton implementation of `scatter_reference`."""
    if not layout.pieces:
        return
    types = tuple([update.dtype for update in updates])

    def make() -> Rows:
        rows: dict[torch.dtype, list[tuple[int, ...]]] = defaultdict(list)
        for piece in layout.pieces:
            stack = stacks[piece.stack]
            rows[types[piece.tensor]].append((*_row(piece), _address(stack, piece.matrix), stack.shape[2], piece.flag))
        return {dtype: tuple(some) for dtype, some in rows.items()}

    key = types, *[(x.data_ptr(), x.shape) for x in stacks]
    addresses = device_vector(map(Tensor.data_ptr, updates), stacks[0].device)
    shares = layout.remembered("shares", lambda: _shares([piece.shape for piece in layout.pieces]))
    for dtype, table in layout.tables(key, make, stacks[0].device):
        kernel.scatter_kernel[(len(table), shares)](
            addresses, table, scale, zeros.view(torch.uint8), DTYPE=runtime.TYPES[dtype], BLOCK_M=_BLOCK_M, BLOCK_N=_BLOCK_N,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip


def can_use_clip(
    products: Tensor,
    rates: Tensor,
    members: Tensor,
    places: Tensor,
    kl_clip: float,
    scale: Tensor,
    finite: Tensor,
    zeros: Tensor,
    dropped: Tensor,
) -> str | None:
    """Why the kernel cannot serve these products; None if it can."""
    wrong = (x.dtype for x in (products, rates, scale) if x.dtype != torch.float32)
    return next((f"a product, a rate or the scale is {dtype}, and the kernel needs float32" for dtype in wrong), None)


def launch_clip(
    products: Tensor,
    rates: Tensor,
    members: Tensor,
    places: Tensor,
    kl_clip: float,
    scale: Tensor,
    finite: Tensor,
    zeros: Tensor,
    dropped: Tensor,
) -> None:
    """The Triton implementation of `clip_reference`."""
    block = min(64, max(1, 1 << (members.shape[1] - 1).bit_length()))
    kernel.clip_kernel[(1,)](
        products, rates, members, places, kl_clip, scale, finite.view(torch.uint8), zeros.view(torch.uint8), dropped,
        len(members), MEMBERS=members.shape[1], BLOCK_W=2048 // block, BLOCK_K=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
