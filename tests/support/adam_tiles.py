"""Tiles for Adam in the eigenbasis, and its directions by the formula, in loops over numbers in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kfac_triton.kernels import ops

STACKS = [(3, 16, 48), (3, 32, 16), (1, 48, 32)]
SIZES = [(13, 35), (13, 35), (16, 48), (17, 1), (1, 16), (32, 7), (35, 29)]
TILES = len(SIZES)
OPTIONS = [  # b1, b2, eps, Nesterov's momentum
    (0.9, 0.95, 1e-8, 1),
    (0.7, 0.9, 1e-4, 0),
    (0.9, 0.999, 1e-8, 0),
    (0.0, 0.0, 1e-3, 1),
    (0.5, 0.7, 0.1, 0),
    (0.95, 0.99, 1e-8, 1),
    (0.8, 0.95, 0.0, 1),
]
NOISE = [(0.0, 0.0), (0.2, 0.9), (1.0, 1.0), (0.3, 0.0), (0.0, 0.7), (0.25, 0.5), (0.6, 0.1)]


class Problem:
    """Tiles of all sizes: R, M and V after some steps, and outputs that hold NaN.

    Args:
        dtype: of the stacks.
        padding: what is stored beyond the matrices.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, padding: float = 0.0) -> None:
        torch.manual_seed(0)
        self.rotated, self.means, self.squares = ([torch.randn(shape, dtype=dtype) for shape in STACKS] for _ in range(3))
        self.squares = [x.square() for x in self.squares]
        self.out = [torch.full_like(x, torch.nan) for x in self.rotated]
        self.steps = torch.tensor([0.0, 5.0, 1.0, 2.0, 10.0, 1000.0, 3.0])
        self.noise, self.options = torch.tensor(NOISE), torch.tensor(OPTIONS, dtype=torch.float64)
        for stacks in (self.rotated, self.means, self.squares):
            for tile, (m, n) in zip(tiles_of(stacks), SIZES, strict=True):
                tile[m:], tile[:, n:] = padding, padding
        for stacks in (self.means, self.squares):  # as it is before the first step
            tiles_of(stacks)[0][:13, :35] = 0.0

    def direction(self, backend: str) -> list[Tensor]:
        """U of every tile, with its padding."""
        numbers = self.steps, self.noise, self.options
        ops.adam_direction(self.rotated, self.means, self.squares, self.out, *numbers, SIZES, backend=backend)
        return tiles_of(self.out)

    def state(self) -> list[list[Tensor]]:
        """Copies of what may change, for every tile."""
        moments = zip(tiles_of(self.means), tiles_of(self.squares), self.steps, strict=True)
        return [[x.clone() for x in own] for own in moments]

    def right(self, i: int) -> Tensor:
        """U of a tile without its padding."""
        m, n = SIZES[i]
        r, mean, square = (tiles_of(x)[i][:m, :n].tolist() for x in (self.rotated, self.means, self.squares))
        return by_formula(r, mean, square, float(self.steps[i]), self.noise[i].tolist(), self.options[i].tolist())


def tiles_of(stacks: list[Tensor]) -> list[Tensor]:
    return [tile for stack in stacks for tile in stack]


Numbers = list[list[float]]


def by_formula(
    r: Numbers, mean: Numbers, square: Numbers, steps: float, noise: Sequence[float], options: Sequence[float]
) -> Tensor:
    """The formula, a number at a time, in float64."""
    (beta1, beta2, eps, nesterov), (alpha, beta), t = options, noise, steps + 1
    m, n = len(r), len(r[0])
    first, second = 1 - beta1**t, 1 - beta2**t
    along = [[0.0] * n for _ in range(m)]
    damped = [[0.0] * n for _ in range(m)]
    for i in range(m):
        for j in range(n):
            moment = beta1 * mean[i][j] + (1 - beta1) * r[i][j]
            ahead = beta1 * moment / first + (1 - beta1) * r[i][j]
            along[i][j] = ahead if nesterov else moment / first
            damped[i][j] = (beta2 * square[i][j] + (1 - beta2) * r[i][j] ** 2) / second
    for row in damped:
        average = math.fsum(row) / n
        row[:] = [x + alpha * average for x in row]
    for j in range(n):
        average = math.fsum(row[j] for row in damped) / m
        for row in damped:
            row[j] += beta * average
    pairs = [zip(x, d, strict=True) for x, d in zip(along, damped, strict=True)]
    return torch.tensor([[x / (d**0.5 + eps) if x else 0.0 for x, d in row] for row in pairs], dtype=torch.float64)


def check_padding(u: Tensor, size: tuple[int, int]) -> None:
    m, n = size
    assert not u[m:].count_nonzero()
    assert not u[:, n:].count_nonzero()
