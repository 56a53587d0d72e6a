"""Adam in the eigenbasis on made-up tiles, with its error against the formula in float64."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kfac_triton.kernels import ops
from kfac_triton.kernels.eigen_adam import launch

from .others import Problem, padded, relative_error, worst

SIDES = (17, 72, 200)
_STEPS = 3  # that the averages are of
_OPTIONS = ((0.9, 0.95, 1e-8, 1.0), (0.8, 0.99, 1e-4, 0.0))  # b1, b2, eps, whether the momentum is Nesterov's


class AdamTiles(Problem):
    """Direction and averages of tiles, two of each shape, of which the last one is not accepted.

    Error: largest relative Frobenius norm of a difference, of a direction, a mean or a square. Sums of rows and columns are
    long, and everything else is a few operations on each element.
    """

    operation = "adam_direction"
    allowed = 1e-5

    def __init__(self, name: str, sides: Sequence[int], device: torch.device) -> None:
        """Tiles of all pairs of neighbouring sides, in stacks that are padded as those of a step."""
        shapes = [*itertools.pairwise(sides), (sides[-1], sides[0])]
        self.sizes = [shape for shape in shapes for _ in range(2)]
        count = len(self.sizes)
        self.rotated, means, squares = ([self._stack(shape, device) for shape in shapes] for _ in range(3))
        squares = [x.square() for x in squares]
        self.starts = means, squares
        self.means, self.squares, self.out = ([torch.empty_like(x) for x in self.rotated] for _ in range(3))
        self.steps = torch.full((count,), float(_STEPS), device=device)
        self.noise = torch.rand(count, 2, device=device)
        options = [_OPTIONS[i % 2] for i in range(count)]
        self.options = torch.tensor(options, dtype=torch.float64, device=device)
        self.accept = torch.arange(count, device=device) < count - 1
        nothing = torch.full((), torch.nan, device=device)
        written = [(x, nothing) for x in self.out]
        written += [*zip(self.means, means, strict=True), *zip(self.squares, squares, strict=True)]
        written.append((self.steps, self.steps.clone()))
        super().__init__(name, [(self.rotated, self.means, self.squares, self.out, *self._numbers, self.sizes)], written)

    @staticmethod
    def _stack(shape: tuple[int, int], device: torch.device) -> Tensor:
        m, n = shape
        stack = torch.zeros(2, padded(m), padded(n), device=device)
        stack[:, :m, :n] = torch.randn(2, m, n, device=device)
        return stack

    @property
    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.steps, self.noise, self.options

    @property
    def _moments(self) -> tuple[Any, ...]:
        return self.rotated, self.means, self.squares, self.steps, self.accept, self.options

    def run(self, backend: str = "auto") -> None:
        """Both operations, in the order of a step."""
        for arguments in self.calls:
            ops.adam_direction(*arguments, backend=backend)
        ops.adam_moments(*self._moments, backend=backend)

    def can_use(self, arguments: tuple[Any, ...]) -> str | None:
        """See `Problem`; the operations are no operators."""
        return launch.can_use_direction(*arguments) or launch.can_use_moments(*self._moments)

    def prefers_library(self) -> bool:
        """Never."""
        return False

    @functools.cached_property
    def exact(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """U, M and V of every tile in float64."""
        given = zip(_tiles(self.rotated), _tiles(self.starts[0]), _tiles(self.starts[1]), strict=True)
        results = []
        for i, (tensors, (m, n)) in enumerate(zip(given, self.sizes, strict=True)):
            r, old_mean, old_square = (x[:m, :n].double() for x in tensors)
            beta1, beta2, eps, nesterov = self.options[i].tolist()
            mean = beta1 * old_mean + (1 - beta1) * r
            square = beta2 * old_square + (1 - beta2) * r**2
            along = mean / (1 - beta1 ** (_STEPS + 1))
            if nesterov:
                along = beta1 * along + (1 - beta1) * r
            divisor = square / (1 - beta2 ** (_STEPS + 1))
            of_rows, of_columns = self.noise[i].tolist()
            divisor = divisor + of_rows * divisor.mean(1, keepdim=True)
            divisor = divisor + of_columns * divisor.mean(0, keepdim=True)
            kept = (mean, square) if bool(self.accept[i]) else (old_mean, old_square)
            results.append((along / (divisor.sqrt() + eps), *kept))
        return results

    def error(self) -> float:
        """Infinite if padding is not zero, or a counter is wrong."""
        if not torch.equal(self.steps, _STEPS + self.accept.float()):
            return torch.inf
        errors = []
        found = zip(_tiles(self.out), _tiles(self.means), _tiles(self.squares), strict=True)
        for tensors, right, (m, n) in zip(found, self.exact, self.sizes, strict=True):
            for tensor, exact in zip(tensors, right, strict=True):
                errors.append(relative_error(tensor[:m, :n], exact))
                if tensor[m:].count_nonzero() or tensor[:, n:].count_nonzero():
                    return torch.inf
        return worst(errors)


def _tiles(stacks: Sequence[Tensor]) -> Iterator[Tensor]:
    for stack in stacks:
        yield from stack.unbind()
