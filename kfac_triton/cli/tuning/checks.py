"""Operations on made-up layers, with their errors against float64: what `doctor`, `tune` and the benchmarks run.

Inverses and preconditioning are here, the statistics in `covariance_check`.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...kernels import operators, ops, runtime

EMA_DECAY = 0.95
DAMPING = 1e-3  # over the Frobenius norm of a factor: a condition number of about a thousand
_TF32 = 2.0**-10  # relative error of a float32 number whose last 13 bits are cut off


class Problem(ABC):
    """The arguments of one operation for a set of layers.

    Attributes:
        operation: its name in `ops`.
        name: what to print.
        allowed: largest error, in the measure of the operation, of a right result.
        resets: whether a run changes what the next one starts from, so that `prepare` must come before each.
    """

    operation: str
    allowed: float
    resets = False

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device

    @abstractmethod
    def calls(self) -> list[tuple[Any, ...]]:
        """Arguments of every call, in the order of the signature, without the backend."""

    def operands(self) -> list[tuple[Any, ...]]:
        """The same arguments as the implementations of the operation take them."""
        return self.calls()

    @abstractmethod
    def prepare(self) -> None:
        """Resets what is updated in place to its start, and fills what is only written with NaN."""

    @abstractmethod
    def error(self) -> float:
        """Error of the present results against float64; infinite or NaN for an invalid result."""

    def run(self, backend: str = "auto") -> None:
        """All calls."""
        for arguments in self.calls():
            getattr(ops, self.operation)(*arguments, backend=backend)

    def check(self, backend: str) -> float:
        """Error of one run from the start."""
        self.prepare()
        self.run(backend)
        return self.error()

    def is_right(self, error: float) -> bool:
        """Whether an error is allowed; NaN is not."""
        return error <= self.allowed


def kernel_obstacle(problem: Problem) -> str | None:
    """Why no Triton kernel can serve a problem; None if one can."""
    can_use = operators.OPERATORS[problem.operation].can_use
    reasons = (can_use(*arguments) for arguments in problem.operands())
    return runtime.obstacle(problem.device) or next(filter(None, reasons), None)


class Inverses(Problem):
    """(A + damping I)^-1 of stacks of factors; error: largest energy norm ||I - L^T X L||_F with A + damping I = L L^T.

    K-FAC trains as well with an error of 0.3 as with none. An iteration stops at 0.05; twice that is allowed.
    """

    allowed = 0.1

    def __init__(self, name: str, stacks: Mapping[int, int], device: torch.device) -> None:
        """The stacks: side -> number of matrices."""
        super().__init__(name, device)
        self.before = [torch.stack([decaying_factor(side, device) for _ in range(count)]) for side, count in stacks.items()]
        self.factors = [
            torch.stack([EMA_DECAY * old + (1 - EMA_DECAY) * decaying_factor(old.shape[0], device) for old in stack])
            for stack in self.before
        ]
        self.dampings = [DAMPING * torch.linalg.matrix_norm(stack) for stack in self.factors]
        self.results = [torch.full_like(stack, math.nan) for stack in self.factors]
        self.residuals = [torch.full_like(damping, math.nan) for damping in self.dampings]

    @functools.cached_property
    def cholesky_factors(self) -> list[Tensor]:
        """L of every damped factor, in float64."""
        return [torch.linalg.cholesky(damp(f.double(), d.double())) for f, d in zip(self.factors, self.dampings, strict=True)]

    def errors_of(self, inverses: Iterable[Tensor]) -> list[list[float]]:
        """The error of every inverse of every stack."""
        stacks = zip(inverses, self.cholesky_factors, strict=True)
        return [[energy_error(x, lower) for x, lower in zip(*stack, strict=True)] for stack in stacks]

    def error_of(self, inverses: Iterable[Tensor]) -> float:
        """The error of somebody else's inverses."""
        return worst(error for stack in self.errors_of(inverses) for error in stack)

    def certified_error_of(self, inverses: Iterable[Tensor]) -> float:
        """The error, or infinite where it is above its certificate."""
        errors = self.errors_of(inverses)
        for stack, residual in zip(errors, self.residuals, strict=True):
            if not all(error <= bound for error, bound in zip(stack, residual.tolist(), strict=True)):
                return math.inf
        return worst(error for stack in errors for error in stack)


class ColdInverses(Inverses):
    """Without any earlier inverse; infinite error where the certificate is too low or the inverse not symmetric."""

    operation = "newton_schulz_inverse"
    tolerance, steps = 1e-3, 40

    def calls(self) -> list[tuple[Any, ...]]:
        """One call a stack."""
        stacks = zip(self.factors, self.dampings, self.results, self.residuals, strict=True)
        return [(*stack, self.tolerance, self.steps) for stack in stacks]

    def prepare(self) -> None:
        """Nothing is known."""
        for tensor in self.results + self.residuals:
            tensor.fill_(math.nan)

    def error(self) -> float:
        """See the class."""
        if not all(torch.equal(inverse, inverse.mT) for inverse in self.results):
            return math.inf
        return self.certified_error_of(self.results)


class WarmInverses(Inverses):
    """From the inverse roots T of the factors one batch before; infinite error where the certificate is too low."""

    operation = "factored_newton_refresh"
    tolerance, steps = 0.05, 8
    resets = True

    def __init__(self, name: str, stacks: Mapping[int, int], device: torch.device) -> None:
        super().__init__(name, stacks, device)
        self.starts = [self._root(stack) for stack in self.before]

    def _root(self, stack: Tensor) -> Tensor:
        lower = torch.linalg.cholesky(damp(stack, DAMPING * torch.linalg.matrix_norm(stack)))
        identity = torch.eye(stack.shape[-1], device=self.device).expand_as(stack)
        return torch.linalg.solve_triangular(lower, identity, upper=False)

    def calls(self) -> list[tuple[Any, ...]]:
        """One call a stack."""
        stacks = zip(self.factors, self.dampings, self.results, self.residuals, strict=True)
        return [(*stack, self.tolerance, self.steps) for stack in stacks]

    def prepare(self) -> None:
        """The roots of one batch before."""
        for root, start, residual in zip(self.results, self.starts, self.residuals, strict=True):
            root.copy_(start)
            residual.fill_(math.nan)

    def error(self) -> float:
        """See the class."""
        return self.certified_error_of(root.double().mT @ root.double() for root in self.results)


class Preconditioning(Problem):
    """G^-1 W A^-1 and <V, W> for stacks of gradients; error: largest relative norm, of an update or of a product.

    Every product cuts two operands to TF32 at most.
    """

    operation = "precondition"

    def __init__(self, name: str, stacks: Mapping[tuple[int, int], int], device: torch.device, factored: bool = True) -> None:
        """The stacks: (rows, columns) -> number of gradients; factored: the inverses come as roots."""
        super().__init__(name, device)
        self.factored = factored
        self.allowed = (8 if factored else 4) * _TF32
        self.gradients = [torch.randn(count, m, n, device=device) for (m, n), count in stacks.items()]
        self.left = [self._inverse(len(w), w.shape[1]) for w in self.gradients]
        self.right = [self._inverse(len(w), w.shape[2]) for w in self.gradients]
        self.updates = [torch.full_like(w, math.nan) for w in self.gradients]
        self.products = [torch.full((len(w),), math.nan, device=device) for w in self.gradients]

    def _inverse(self, count: int, side: int) -> Tensor:
        root = torch.randn(count, side, side, device=self.device).tril_(-1) / (2 * math.sqrt(side))
        root.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        if self.factored:
            return root
        inverse = root.mT @ root
        return inverse.tril() + inverse.tril(-1).mT

    def calls(self) -> list[tuple[Any, ...]]:
        """One call a stack."""
        stacks = zip(self.gradients, self.left, self.right, self.updates, self.products, strict=True)
        return [(*stack, self.factored) for stack in stacks]

    def prepare(self) -> None:
        """Nothing is known."""
        for tensor in self.updates + self.products:
            tensor.fill_(math.nan)

    @functools.cached_property
    def exact(self) -> list[Tensor]:
        """The updates in float64."""
        results = []
        for gradient, left, right in zip(self.gradients, self.left, self.right, strict=True):
            w, g, a = gradient.double(), left.double(), right.double()
            results.append(g.mT @ (g @ w @ a.mT) @ a if self.factored else g @ w @ a)
        return results

    def error(self) -> float:
        """See the class."""
        return self.error_of(self.updates, self.products)

    def error_of(self, updates: Sequence[Tensor], products: Sequence[Tensor]) -> float:
        """The error of somebody else's updates and products."""
        pairs = zip(self.exact, self.gradients, strict=True)
        exact_products = [torch.linalg.vecdot(v.flatten(1), w.double().flatten(1)) for v, w in pairs]
        return worst([*map(relative_error, updates, self.exact), *map(relative_error, products, exact_products)])


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return float(torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-300))


def worst(errors: Iterable[float]) -> float:
    """The largest; infinite if one is not a number."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def energy_error(inverse: Tensor, lower: Tensor) -> float:
    """||I - L^T X L||_F in float64, for L L^T what X should invert."""
    identity = torch.eye(lower.shape[-1], dtype=torch.float64, device=lower.device)
    return float(torch.linalg.matrix_norm(identity - lower.T @ inverse.double() @ lower))


def damp(factors: Tensor, damping: Tensor) -> Tensor:
    """A + damping I for a stack."""
    return factors + torch.diag_embed(damping[:, None].expand(-1, factors.shape[-1]))


def decaying_factor(side: int, device: torch.device) -> Tensor:
    """Covariance of twice as many rows as columns, with eigenvalues over three decades."""
    rows = torch.randn(2 * side, side, device=device) * torch.logspace(0, -1.5, side, device=device)
    factor = rows.T @ rows / len(rows)
    return factor.tril() + factor.tril(-1).T
