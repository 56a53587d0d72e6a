"""Operations on random layers, with their errors against float64: what `doctor`, `tune` and the benchmarks run."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...curvature.factor_stack import padded
from ...kernels import operators, ops, runtime
from ...kernels.certificate import damped, mirror
from ...kernels.covariance.window import flatten
from ...kernels.orthogonal_iteration import launch as orthogonal_iteration

EMA_DECAY = 0.95
DAMPING = 1e-3  # over the Frobenius norm of a factor: a condition number of about a thousand
_TF32 = 2.0**-10  # relative error of a float32 number whose last 13 bits are cut off
_UNSET = torch.tensor(math.nan)  # start of what is only written: whatever a kernel leaves out stays NaN


class Problem(ABC):
    """The arguments of one operation for a set of layers.

    Attributes:
        operation: its name in `ops`.
        allowed: largest error, in the measure of the operation, of a right result.
        name: what to print.
        calls: arguments of every call, in the order of the signature, without the backend.
        operands: the same arguments in the form that the implementations of the operation take.
        written: every tensor that the calls write, with its values before a run.
    """

    operation: str
    allowed: float

    def __init__(self, name: str, calls: Sequence[tuple[Any, ...]], written: Sequence[tuple[Tensor, Tensor]]) -> None:
        self.name = name
        self.calls = self.operands = calls
        self.written = [(tensor, start.to(tensor.device)) for tensor, start in written]
        self.device = written[0][0].device
        self.prepare()

    @abstractmethod
    def error(self) -> float:
        """Error of the present results against float64; infinite or NaN for an invalid result."""

    def prepare(self) -> None:
        """Resets what the calls write. Otherwise a second run of warm inverses would start from the result of the first."""
        for tensor, start in self.written:
            tensor.copy_(start)

    def run(self, backend: str = "auto") -> None:
        """Makes all calls."""
        for arguments in self.calls:
            getattr(ops, self.operation)(*arguments, backend=backend)

    def check(self, backend: str) -> float:
        """Error of one run from the start."""
        self.prepare()
        self.run(backend)
        return self.error()

    def can_use(self, arguments: tuple[Any, ...]) -> str | None:
        """Why no kernel can serve a call; None if one can."""
        return operators.OPERATORS[self.operation].can_use(*arguments)

    def prefers_library(self) -> bool:
        """Whether the library serves the calls with backend="auto"."""
        return bool(operators.OPERATORS[self.operation].prefers_library(self.device))

    def is_right(self, error: float) -> bool:
        """Whether an error is allowed; NaN is not."""
        return error <= self.allowed


def kernel_obstacle(problem: Problem) -> str | None:
    """Why no Triton kernel can serve a problem; None if one can."""
    reasons = map(problem.can_use, problem.operands)
    return runtime.obstacle(problem.device) or next(filter(None, reasons), None)


class RowSource(NamedTuple):
    """Where rows of X come from: a matrix, or images and a window; and whether a column of ones follows."""

    source: Tensor
    window: ops.Window = ops.ROWS
    ones: bool = False

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """All rows in this type, with their ones."""
        rows = self.source.to(dtype)
        if rows.dim() == 4:
            kernel, stride, padding, dilation = self.window
            rows = F.unfold(rows, kernel, dilation, padding, stride).movedim(1, 2).flatten(0, 1)
        return F.pad(rows, (0, 1), value=1.0) if self.ones else rows


class Covariance(Problem):
    """A <- beta A + alpha X^T X; error: largest Frobenius norm of a layer's difference over that of its alpha X^T X.

    Two factors of a product may be cut to TF32 each, or a product of 16-bit rows be rounded to 16 bits: 2^-9 either way, and
    twice that is allowed. Whole numbers weighted with powers of two allow no error at all.
    """

    operation = "covariance_ema"

    def __init__(self, name: str, rows: Sequence[RowSource], whole: bool = False) -> None:
        """The layers; whole: their numbers are small integers."""
        self.rows = rows
        self.allowed = 0.0 if whole else 2.0**-8
        device = rows[0].source.device
        shapes = [layer._replace(source=layer.source.to("meta")).matrix(torch.float32).shape for layer in rows]
        weights = [0.25 if whole else (1 - EMA_DECAY) / max(1, count) for count, _ in shapes]
        self.alpha = torch.tensor(weights, device=device)
        self.beta = torch.full_like(self.alpha, 0.5 if whole else EMA_DECAY)
        roots = (torch.randn(side, 4, dtype=torch.float64, device=device) for _, side in shapes)
        # In float64, where the order of the sums leaves no trace in the float32.
        self.starts = [(root @ root.T).float() for root in (map(torch.round, roots) if whole else roots)]
        storage = [start.new_zeros(2 * [padded(len(start))]) for start in self.starts]
        self.factors = [stored[: len(start), : len(start)] for stored, start in zip(storage, self.starts, strict=True)]
        sources, windows, ones = zip(*rows, strict=True)
        arguments = (storage, list(sources), self.alpha, self.beta, list(ones))
        super().__init__(name, [(*arguments, windows, None)], list(zip(self.factors, self.starts, strict=True)))
        self.operands = [(*arguments, flatten(windows), None)]

    @functools.cached_property
    def exact(self) -> list[tuple[Tensor, float]]:
        """The new factors in float64, and the norms of what was added."""
        results = []
        weights = zip(self.alpha.tolist(), self.beta.tolist(), strict=True)
        for layer, start, (alpha, beta) in zip(self.rows, self.starts, weights, strict=True):
            rows = layer.matrix(torch.float64)
            added = alpha * (rows.T @ rows)
            results.append((added.add(start, alpha=beta), float(torch.linalg.vector_norm(added))))
        return results

    def error(self) -> float:
        """Infinite if a factor is not symmetric to the last bit."""
        is_symmetric = all(torch.equal(factor, factor.T) for factor in self.factors)
        return self.error_of(self.factors) if is_symmetric else math.inf

    def error_of(self, factors: Iterable[Tensor]) -> float:
        """The error of factors that were computed in any way."""
        pairs = zip(factors, self.exact, strict=True)
        return worst(float(torch.linalg.vector_norm(factor - exact)) / (norm or 1.0) for factor, (exact, norm) in pairs)


class Inverses(Problem):
    """(A + damping I)^-1 of stacks of factors; error: largest energy norm ||I - L^T X L||_F with A + damping I = L L^T.

    K-FAC trains as well with an error of 0.3 as with none. An iteration stops at 0.05; twice that is allowed.
    """

    allowed = 0.1
    tolerance: float
    steps: int

    def __init__(self, name: str, stacks: Mapping[int, int], device: torch.device) -> None:
        """The stacks: side -> number of matrices."""
        before = [torch.stack([decaying_factor(side, device) for _ in range(count)]) for side, count in stacks.items()]
        self.factors = [
            torch.stack([EMA_DECAY * old + (1 - EMA_DECAY) * decaying_factor(old.shape[0], device) for old in stack])
            for stack in before
        ]
        self.dampings = [DAMPING * torch.linalg.matrix_norm(stack) for stack in self.factors]
        self.results = [torch.empty_like(stack) for stack in self.factors]
        self.residuals = [torch.empty_like(damping) for damping in self.dampings]
        written = [*zip(self.results, map(self.start, before), strict=True), *((r, _UNSET) for r in self.residuals)]
        super().__init__(name, self.calls_of(self.factors, self.dampings, self.results, self.residuals), written)

    def calls_of(self, *lists: list[Tensor]) -> list[tuple[Any, ...]]:
        """A call for each stack, given the operation's arguments as lists over stacks."""
        return [(*stack, self.tolerance, self.steps) for stack in zip(*lists, strict=True)]

    def start(self, before: Tensor) -> Tensor:
        """What an iteration starts from, given the factors one batch before."""
        return _UNSET

    @functools.cached_property
    def cholesky_factors(self) -> list[Tensor]:
        """L of every damped factor, in float64."""
        return [torch.linalg.cholesky(damped(f.double(), d.double())) for f, d in zip(self.factors, self.dampings, strict=True)]

    def errors_of(self, inverses: Iterable[Tensor]) -> Tensor:
        """The error of every inverse of all stacks."""
        products = (lower.mT @ x.double() @ lower for x, lower in zip(inverses, self.cholesky_factors, strict=True))
        return torch.cat([torch.linalg.matrix_norm(damped(p, -p.new_ones(len(p)))) for p in products])  # of p - I

    def certified_error_of(self, inverses: Iterable[Tensor]) -> float:
        """The error, or infinite where it is above its certificate."""
        errors = self.errors_of(inverses)
        return worst(errors.tolist()) if bool((errors <= torch.cat(self.residuals)).all()) else math.inf


class ColdInverses(Inverses):
    """Without any earlier inverse; infinite error where the certificate is too low or the inverse not symmetric."""

    operation = "newton_schulz_inverse"
    tolerance, steps = 1e-3, 40

    def error(self) -> float:
        """See the class."""
        is_symmetric = all(torch.equal(inverse, inverse.mT) for inverse in self.results)
        return self.certified_error_of(self.results) if is_symmetric else math.inf


class WarmInverses(Inverses):
    """From the inverse roots T of the factors one batch before; infinite error where the certificate is too low."""

    operation = "factored_newton_refresh"
    tolerance, steps = 0.05, 8

    def calls_of(self, *lists: list[Tensor]) -> list[tuple[Any, ...]]:
        """One call for all stacks."""
        return [(*lists, self.tolerance, self.steps)]

    def start(self, before: Tensor) -> Tensor:
        """T with T^T T the inverse of the damped factors."""
        lower = torch.linalg.cholesky(damped(before, DAMPING * torch.linalg.matrix_norm(before)))
        return torch.linalg.solve_triangular(lower, torch.eye(before.shape[-1], device=before.device), upper=False)

    def error(self) -> float:
        """See the class."""
        return self.certified_error_of(root.double().mT @ root.double() for root in self.results)


class Bases(Problem):
    """Eigenvectors of factors one batch before, turned to the present factors by a step of orthogonal iteration.

    Error: how far a basis Q is from orthonormal, or Q^T Y from upper triangular in units of Y = (A + s I) Q_before.
    """

    operation = "orthogonal_iteration"
    allowed = 3e-4
    shift, rescue_shift, steps, accept = 1e-3, 1.0, 9, 0.1

    def __init__(self, name: str, stacks: Mapping[int, int], device: torch.device) -> None:
        """The stacks: side -> number of matrices."""
        before = [torch.stack([decaying_factor(side, device) for _ in range(count)]) for side, count in stacks.items()]
        self.factors = [
            torch.stack([EMA_DECAY * old + (1 - EMA_DECAY) * decaying_factor(old.shape[0], device) for old in stack])
            for stack in before
        ]
        self.starts = [torch.linalg.eigh(stack)[1].flip(-1).contiguous() for stack in before]
        self.bases = [torch.empty_like(start) for start in self.starts]
        self.residuals = [stack.new_empty(len(stack)) for stack in before]
        self.refused = [torch.zeros(len(stack), dtype=torch.bool, device=device) for stack in before]
        lists = self.factors, self.bases, self.residuals, self.refused
        written = [*zip(self.bases, self.starts, strict=True), *((r, _UNSET) for r in self.residuals)]
        super().__init__(name, [(*lists, self.shift, self.rescue_shift, self.steps, self.accept)], written)

    def can_use(self, arguments: tuple[Any, ...]) -> str | None:
        """See `Problem`; the operation is no operator."""
        return orthogonal_iteration.can_use(*arguments)

    def prefers_library(self) -> bool:
        """Never."""
        return False

    def error(self) -> float:
        """See the class."""
        errors = []
        for factor, start, basis in zip(self.factors, self.starts, self.bases, strict=True):
            a, before, q = factor.double(), start.double(), basis.double()
            mean = a.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            y = a @ before + self.shift * mean * before
            below = torch.linalg.matrix_norm((q.mT @ y).tril(-1)) / torch.linalg.matrix_norm(y)
            errors += [*below.tolist(), *torch.linalg.matrix_norm(damped(q.mT @ q, -q.new_ones(len(q)))).tolist()]
        return worst(errors)


class Preconditioning(Problem):
    """G^-1 W A^-1 and <V, W> for stacks of gradients; error: largest relative norm, of an update or of a product.

    Every product cuts two operands to TF32 at most.
    """

    operation = "precondition"

    def __init__(self, name: str, stacks: Mapping[tuple[int, int], int], device: torch.device, factored: bool = True) -> None:
        """The stacks: (rows, columns) -> number of gradients; factored: the inverses come as roots."""
        self.factored = factored
        self.allowed = (8 if factored else 4) * _TF32
        self.gradients = [torch.randn(count, m, n, device=device) for (m, n), count in stacks.items()]
        self.left = [self._inverse(w, w.shape[1]) for w in self.gradients]
        self.right = [self._inverse(w, w.shape[2]) for w in self.gradients]
        self.updates = [torch.empty_like(w) for w in self.gradients]
        self.products = [w.new_empty(len(w)) for w in self.gradients]
        arguments = zip(self.gradients, self.left, self.right, self.updates, self.products, strict=True)
        written = [(tensor, _UNSET) for tensor in self.updates + self.products]
        super().__init__(name, [(*stack, factored) for stack in arguments], written)

    def _inverse(self, gradients: Tensor, side: int) -> Tensor:
        root = torch.randn(len(gradients), side, side, device=gradients.device).tril_(-1) / (2 * math.sqrt(side))
        root.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return root if self.factored else mirror(root.mT @ root)

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
        """The error of updates and products that were computed in any way."""
        pairs = zip(self.exact, self.gradients, strict=True)
        exact_products = [torch.linalg.vecdot(v.flatten(1), w.double().flatten(1)) for v, w in pairs]
        return worst([*map(relative_error, updates, self.exact), *map(relative_error, products, exact_products)])


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return float(torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact).clamp_min(1e-300))


def worst(errors: Iterable[float]) -> float:
    """The largest; infinite if one is not a number."""
    return max((math.inf if math.isnan(error) else error for error in errors), default=0.0)


def decaying_factor(side: int, device: torch.device) -> Tensor:
    """Covariance of twice as many rows as columns, with eigenvalues over three decades."""
    rows = torch.randn(2 * side, side, device=device) * torch.logspace(0, -1.5, side, device=device)
    return mirror(rows.T @ rows / len(rows))
