"""The exact quadratic model of a loss on the span of a few directions (Martens and Grosse 2015, section 6.4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Direction = Sequence[Tensor | None]

# Bound of rounding errors in an entry of a Gram matrix or in a loss, in units of the machine precision.
ROUNDING = 16.0


class Minimum(NamedTuple):
    """The minimum of a quadratic model.

    Attributes:
        coefficients: c, (directions,), float64.
        change: M(c), (): the change of the objective that the model predicts, at most 0. NaN if the model is not finite.
    """

    coefficients: Tensor
    change: Tensor


class QuadraticModel:
    r"""M(c) = c^T b + 1/2 c^T B c, the change of an objective along sum_i c_i d_i.

        B_ij = scale (J d_i)^T H (J d_j) + <d_i, R d_j>,    b_i = <h, d_i>

    where H is the Hessian of the sum of the loss terms with respect to the outputs, h the gradient of the objective, and R the
    diagonal matrix of damping and L2 penalties (Martens and Grosse 2015, sections 6.4 and 7). The curvature is exact: it is the
    generalized Gauss-Newton matrix of the batch. K-FAC only chooses the directions.

    Args:
        gram: B, (directions, directions), symmetric.
        linear: b, (directions,).
        cutoff: eigenvalues of B, scaled to a unit diagonal, up to this size count as rounding errors; the largest eigenvalue
            is at least 1.
    """

    def __init__(self, gram: Tensor, linear: Tensor, cutoff: float = ROUNDING * torch.finfo(torch.float64).eps) -> None:
        self.gram = gram.double()
        self.linear = linear.double()
        self.cutoff = cutoff

    @classmethod
    def build(
        cls,
        directions: Sequence[Direction],
        gradient: Direction,
        products: Sequence[Tensor],
        curved: Sequence[Tensor],
        scale: float,
        ridge: Sequence[float],
    ) -> QuadraticModel:
        """Builds the model, in float64 whatever the types.

        Args:
            directions: d_i.
            gradient: h, aligned with the entries of a direction.
            products: J d_i.
            curved: H J d_i.
            scale: 1 / terms for a mean loss, 1 for a sum.
            ridge: the diagonal of R, one number for each parameter.

        Raises:
            ValueError: if there is no direction.
        """
        if not directions:
            raise ValueError("directions must have at least one direction, but is empty; without a gradient there is no step")
        entries = [  # of the lower triangle, row by row
            scale * inner([products[i]], [curved[j]]) + inner(directions[i], directions[j], ridge)
            for i in range(len(directions))
            for j in range(i + 1)
        ]
        triangle = torch.stack(_on_one_device(entries))
        gram = triangle.new_zeros(len(directions), len(directions))
        rows, columns = torch.tril_indices(len(directions), len(directions), device=gram.device)
        gram[rows, columns] = gram[columns, rows] = triangle
        linear = torch.stack(_on_one_device([inner(gradient, d) for d in directions]))
        precision = max(torch.finfo(x.dtype).eps for x in (*products, *(t for d in directions for t in d if t is not None)))
        return cls(gram, linear.to(gram.device), ROUNDING * precision)

    def change(self, coefficients: Tensor) -> Tensor:
        """M(c), a scalar."""
        c = coefficients.to(self.gram)
        return c @ self.linear + (c @ self.gram @ c) / 2

    def solve(self) -> Minimum:
        """The minimum of M, by the pseudo-inverse of B scaled to a unit diagonal, D B D with D_ii = B_ii^-1/2.

        The scaling makes the result independent of the lengths of the directions. Parallel directions share the step. One
        without curvature has coefficient 0, because the model has no minimum along it.
        """
        finite = self.gram.isfinite().all() & self.linear.isfinite().all()
        gram = torch.where(finite, self.gram, 0.0)
        diagonal = gram.diagonal()
        d = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        values, vectors = torch.linalg.eigh(d[:, None] * gram * d)
        inverse = torch.where(values > self.cutoff, 1 / values, 0.0)
        coefficients = -d * (vectors @ (inverse * (vectors.mT @ (d * self.linear))))
        return Minimum(coefficients, self.change(coefficients))


def all_finite(tensors: Direction) -> bool:
    """Whether no entry is NaN or infinite."""
    found = [x.isfinite().all() for x in tensors if x is not None]
    return not found or bool(torch.stack([x.to(found[0].device) for x in found]).all())


def combined(coefficients: Sequence[float], directions: Sequence[Direction]) -> list[Tensor | None]:
    """sum_i c_i d_i, a new tensor for each parameter."""
    result: list[Tensor | None] = []
    for entries in zip(*directions, strict=True):
        parts = [x * c for c, x in zip(coefficients, entries, strict=True) if x is not None]
        result.append(sum(parts[1:], parts[0]) if parts else None)
    return result


def inner(xs: Direction, ys: Direction, weights: Sequence[float] | None = None) -> Tensor:
    """sum_p w_p <x_p, y_p> over the entries that both have, in float64."""
    parts = [
        torch.sum(x.double() * y.double()) * w
        for x, y, w in zip(xs, ys, weights or [1.0] * len(xs), strict=True)
        if x is not None and y is not None
    ]
    return torch.stack(_on_one_device(parts)).sum() if parts else torch.zeros((), dtype=torch.float64)


def _on_one_device(scalars: list[Tensor]) -> list[Tensor]:
    """Scalars moved to the first GPU that holds one of them."""
    home = next((x.device for x in scalars if x.device.type != "cpu"), torch.device("cpu"))
    return [x.to(home) for x in scalars]
