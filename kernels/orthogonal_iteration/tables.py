"""The table of stacks and the scratch memory of orthogonal iteration; tables of programs are those of `factored_newton`."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..device_tables import Table
from ..factored_newton import tables
from ..tiles import count, padded

# Columns of the table of stacks, int64. Those up to FIRST are where `locate` and others of `factored_newton.tables` look.
FACTOR, FACTOR_BATCH, FACTOR_STRIDE, BASIS, BASIS_BATCH, BASIS_STRIDE, RESIDUAL, REFUSED = range(8)
N, SIDE, FIRST, TILES, MATRICES, LOWER_TILES = range(8, 14)
# Two pairs of matrices with their transposes: Y, then the basis, and corrections of it; Z, and the other corrections.
TRANSPOSED, PAIR, PAIR_ACROSS, OTHER, OTHER_ACROSS, GRAM, ROOT, PARTIALS = range(17, 25)
# Numbers of a matrix, float32, those of all matrices side by side: whether it is active in an attempt, whether corrections are
# under way, whether it keeps the basis that came in, the pair and the residual of an accepted one, 1 / mean diagonal, the
# damping of the Newton launches, which is zero, and their bound, which nobody reads.
ACTIVE, RUNNING, KEPT, ACCEPTED_PAIR, DISTANCE, INVERSE_MEAN, DAMPING, BOUND = range(8)
NUMBERS = 8


@dataclass(frozen=True)
class Layout:
    """Parts of the scratch memory, in elements: of each stack from TRANSPOSED to PARTIALS, and the size of all."""

    places: tuple[tuple[int, ...], ...]
    size: int


@functools.lru_cache(maxsize=64)
def layout(shapes: tables.Shapes, block: int) -> Layout:
    """One allocation for all stacks. It begins with the numbers of all matrices."""
    end = NUMBERS * sum(batch for batch, _ in shapes)
    places = []
    for batch, n in shapes:
        starts = []
        for size in (*[n * padded(n)] * 7, 2 * count(n, block) ** 2):
            end = padded(end)
            starts.append(end)
            end += batch * size
        places.append(tuple(starts))
    return Layout(tuple(places), end)


@functools.lru_cache(maxsize=64)
def rows(
    shapes: tables.Shapes,
    addresses: tuple[tuple[int, ...], ...],
    strides: tuple[tuple[int, ...], ...],
    block: int,
) -> Table:
    """The table of stacks.

    Args:
        shapes: of the stacks.
        addresses: for each stack those of its factors, bases, residuals and flags of refusal.
        strides: for each stack those between its factors and between their rows, and the same of its bases.
        block: side of a tile.
    """
    result, first = [], 0
    total = sum(batch for batch, _ in shapes)
    places = layout(shapes, block).places
    for own, (batch, n), (factor, basis, residual, refused), steps in zip(places, shapes, addresses, strides, strict=True):
        blocks = count(n, block)
        row = [0] * tables.STACK_FIELDS
        row[FACTOR:N] = (factor, *steps[:2], basis, *steps[2:], residual, refused)
        row[N : LOWER_TILES + 1] = (n, padded(n), first, blocks**2, total, blocks * (blocks + 1) // 2)
        row[TRANSPOSED : PARTIALS + 1] = own
        result.append(tuple(row))
        first += batch
    return Table(result)


def matrices(scratch: torch.Tensor, shapes: tables.Shapes, block: int, field: int) -> list[torch.Tensor]:
    """A part of the scratch memory as stacks of matrices (B, n, n)."""
    result = []
    for places, (batch, n) in zip(layout(shapes, block).places, shapes, strict=True):
        side = padded(n)
        result.append(scratch.as_strided((batch, n, n), (n * side, side, 1), places[field - TRANSPOSED]))
    return result


def numbers(scratch: torch.Tensor, shapes: tables.Shapes, field: int) -> list[torch.Tensor]:
    """A number of every matrix, (B,) for each stack."""
    counts = [batch for batch, _ in shapes]
    start = field * sum(counts)
    return list(scratch[start : start + sum(counts)].split(counts))
