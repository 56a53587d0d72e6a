"""The four operators on the layers of the autoencoder, beside what a user would write; `make bench` runs this.

Every result is compared with float64 before it is timed, and its error stands in `extra_info`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_triton.curvature.triangular import symmetric_product, triangular_inverse
from kfac_triton.kernels import ops

SIZES = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
LAYERS = tuple(pairwise(SIZES))
BATCH = 256
EMA_DECAY = 0.95
ALIGNMENT = 16  # the optimizer stores factors padded to a multiple of this
ROUNDING = 1e-5  # relative error of one fp32 product
DIRECT = 1e-3  # energy-norm error of an fp32 factorization
ITERATIVE = 0.1  # the same for an iteration that stops at its tolerance
ROUNDS = 3


def padded(size: int) -> int:
    """Side that a factor is stored with."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def rows_of(size: int) -> Tensor:
    """A batch of rows with a decaying spectrum."""
    return torch.randn(BATCH, size) * torch.logspace(0, -1.5, size)


def decayed_covariance(size: int, batches: int) -> Tensor:
    """A factor after some batches of training, zero on its pad."""
    factor = torch.zeros(padded(size), padded(size))
    for _ in range(batches):
        rows = rows_of(size)
        factor[:size, :size].mul_(EMA_DECAY).addmm_(rows.T, rows, alpha=(1 - EMA_DECAY) / BATCH)
    return factor


def energy_error(factor: Tensor, damping: Tensor, inverse: Tensor) -> float:
    """||I - L^T X L||_F in float64, where factor + damping I = L L^T: how far X is from the inverse."""
    identity = torch.eye(factor.shape[-1], dtype=torch.float64)
    lower = torch.linalg.cholesky(factor.double() + damping.double() * identity)
    return torch.linalg.matrix_norm(identity - lower.T @ inverse.double() @ lower).item()


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the float64 result."""
    return (torch.linalg.vector_norm(value.double() - exact) / torch.linalg.vector_norm(exact)).item()


def time_checked(
    benchmark: Any, run: Callable[..., Any], error: Callable[[], float], bound: float, setup: Callable[[], Any] | None = None
) -> None:
    """Runs once, refuses a result that is off by more than bound, then times it."""
    arguments = setup() if setup is not None else None
    run() if arguments is None else run(*arguments[0], **arguments[1])
    benchmark.extra_info["error"] = found = error()
    assert found <= bound, f"error {found:.2e} is above {bound:.0e}: not timed"
    benchmark.pedantic(run, setup=setup, rounds=ROUNDS)


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same numbers for every contestant."""
    torch.manual_seed(0)


class Covariance:
    """Inputs and output gradients of all layers, with their factors before the update."""

    def __init__(self) -> None:
        self.inputs = [rows_of(inputs) for inputs, _ in LAYERS] + [rows_of(outputs) for _, outputs in LAYERS]
        self.ones = [True] * len(LAYERS) + [False] * len(LAYERS)
        sizes = [x.shape[1] + one for x, one in zip(self.inputs, self.ones, strict=True)]
        self.start = [decayed_covariance(size, 1)[:size, :size].contiguous() for size in sizes]
        self.factors = [factor.clone() for factor in self.start]

    def error(self) -> float:
        """Largest relative error of a factor after one update of `start`."""
        errors = []
        for start, factor, x, one in zip(self.start, self.factors, self.inputs, self.ones, strict=True):
            rows = torch.cat([x, torch.ones(BATCH, 1)], 1) if one else x
            exact = EMA_DECAY * start.double() + (1 - EMA_DECAY) / BATCH * rows.double().T @ rows.double()
            errors.append(relative_error(factor, exact))
        return max(errors)


@pytest.mark.benchmark(group="covariance of 8 layers")
def test_covariance_ema(benchmark: Any) -> None:
    """One call for all layers."""
    case = Covariance()
    factors = []
    for factor in case.factors:
        stored = torch.zeros(padded(len(factor)), padded(len(factor)))
        stored[: len(factor), : len(factor)] = factor
        factors.append(stored)
    case.factors = [stored[: len(factor), : len(factor)] for stored, factor in zip(factors, case.factors, strict=True)]
    count = len(factors)
    alpha, beta = torch.full((count,), (1 - EMA_DECAY) / BATCH), torch.full((count,), EMA_DECAY)
    windows = [ops.ROWS] * count

    def run() -> None:
        ops.covariance_ema(factors, case.inputs, alpha, beta, case.ones, windows)

    time_checked(benchmark, run, case.error, ROUNDING)


@pytest.mark.benchmark(group="covariance of 8 layers")
def test_covariance_addmm_loop(benchmark: Any) -> None:
    """A loop of addmm_, with the column of ones appended."""
    case = Covariance()

    def run() -> None:
        for factor, x, one in zip(case.factors, case.inputs, case.ones, strict=True):
            rows = torch.cat([x, x.new_ones(BATCH, 1)], 1) if one else x
            factor.addmm_(rows.T, rows, beta=EMA_DECAY, alpha=(1 - EMA_DECAY) / BATCH)

    time_checked(benchmark, run, case.error, ROUNDING)


class Inverses:
    """All factors of the autoencoder in stacks of one padded size, damped to a condition number of about a thousand."""

    def __init__(self, batches: int = 8) -> None:
        members: dict[int, list[Tensor]] = defaultdict(list)
        for inputs, outputs in LAYERS:
            for size in (inputs + 1, outputs):
                members[padded(size)].append(decayed_covariance(size, batches))
        self.factors = [torch.stack(stack) for stack in members.values()]
        self.dampings = [1e-3 * torch.linalg.matrix_norm(stack) for stack in self.factors]
        self.results: list[Tensor] = [torch.empty_like(stack) for stack in self.factors]

    def error(self) -> float:
        """Largest energy-norm error of a result."""
        stacks = zip(self.factors, self.dampings, self.results, strict=True)
        return max(energy_error(*triple) for stack in stacks for triple in zip(*stack, strict=True))

    def damped(self, index: int) -> Tensor:
        """Factors of a stack with their damping."""
        return self.factors[index] + torch.diag_embed(self.dampings[index][:, None].expand(-1, self.factors[index].shape[-1]))


@pytest.mark.benchmark(group="inverse of 16 factors")
def test_newton_schulz_inverse(benchmark: Any) -> None:
    """Cold start, without any earlier inverse."""
    case = Inverses()
    residuals = [torch.empty(len(stack)) for stack in case.factors]

    def run() -> None:
        for factor, damping, inverse, residual in zip(case.factors, case.dampings, case.results, residuals, strict=True):
            ops.newton_schulz_inverse(factor, damping, inverse, residual)

    time_checked(benchmark, run, case.error, ITERATIVE)


@pytest.mark.benchmark(group="inverse of 16 factors")
def test_factored_newton_refresh(benchmark: Any) -> None:
    """Warm start from the inverse roots of the factors of one batch before."""
    case = Inverses()
    roots = []
    for index in range(len(case.factors)):
        lower = torch.linalg.cholesky(case.damped(index))
        identity = torch.eye(lower.shape[-1]).expand_as(lower)
        roots.append(torch.linalg.solve_triangular(lower, identity, upper=False))
    for factors in case.factors:
        for factor in factors:
            size = int((factor.diagonal() > 0).sum())
            rows = rows_of(size)
            factor[:size, :size].mul_(EMA_DECAY).addmm_(rows.T, rows, alpha=(1 - EMA_DECAY) / BATCH)
    residuals = [torch.empty(len(stack)) for stack in case.factors]
    refreshed = [torch.empty_like(root) for root in roots]

    def setup() -> tuple[tuple[()], dict[str, Any]]:
        for root, start in zip(refreshed, roots, strict=True):
            root.copy_(start)
        return (), {}

    def run() -> None:
        ops.factored_newton_refresh(case.factors, case.dampings, refreshed, residuals)

    def error() -> float:
        case.results = [root.double().mT @ root.double() for root in refreshed]
        return case.error()

    time_checked(benchmark, run, error, ITERATIVE, setup)


@pytest.mark.benchmark(group="inverse of 16 factors")
def test_cholesky_inverse(benchmark: Any) -> None:
    """Batched cholesky_ex and cholesky_inverse."""
    case = Inverses()

    def run() -> None:
        case.results = [torch.cholesky_inverse(torch.linalg.cholesky_ex(case.damped(i))[0]) for i in range(len(case.factors))]

    time_checked(benchmark, run, case.error, DIRECT)


@pytest.mark.benchmark(group="inverse of 16 factors")
def test_triangular_inverse(benchmark: Any) -> None:
    """What the optimizer does on a CPU: cholesky_ex, then large matrix products instead of cholesky_inverse."""
    case = Inverses()

    def run() -> None:
        lowers = [torch.linalg.cholesky_ex(case.damped(i))[0] for i in range(len(case.factors))]
        case.results = [symmetric_product(triangular_inverse(lower)) for lower in lowers]

    time_checked(benchmark, run, case.error, DIRECT)


@pytest.mark.benchmark(group="inverse of 16 factors")
def test_eigh_inverse(benchmark: Any) -> None:
    """Batched eigh; the inverse is only put together for the check, as users of eigh keep the eigenbasis."""
    case = Inverses()
    eigen: list[Any] = []

    def run() -> None:
        eigen[:] = [torch.linalg.eigh(stack) for stack in case.factors]

    def error() -> float:
        case.results = [
            (vectors / (values.clamp_min(0) + damping[:, None])[:, None, :]) @ vectors.mT
            for (values, vectors), damping in zip(eigen, case.dampings, strict=True)
        ]
        return case.error()

    time_checked(benchmark, run, error, DIRECT)


class Preconditioning:
    """Gradients [weight | bias] of all layers and inverses of their factors."""

    def __init__(self, pad: bool) -> None:
        self.gradients, self.left, self.right = [], [], []
        for inputs, outputs in LAYERS:
            m, n = (padded(outputs), padded(inputs + 1)) if pad else (outputs, inputs + 1)
            gradient = torch.zeros(1, m, n)
            gradient[0, :outputs, : inputs + 1] = torch.randn(outputs, inputs + 1)
            self.gradients.append(gradient)
            self.left.append((decayed_covariance(outputs, 1)[:m, :m] + 0.1 * torch.eye(m)).unsqueeze(0))
            self.right.append((decayed_covariance(inputs + 1, 1)[:n, :n] + 0.1 * torch.eye(n)).unsqueeze(0))
        self.updates = [torch.empty_like(gradient) for gradient in self.gradients]
        self.products = [torch.empty(1) for _ in LAYERS]

    def error(self) -> float:
        """Largest relative error of an update or of its product with the gradient."""
        errors = []
        for gradient, left, right, update, product in zip(
            self.gradients, self.left, self.right, self.updates, self.products, strict=True
        ):
            exact = left.double() @ gradient.double() @ right.double()
            exact_product = (exact * gradient).sum((-2, -1))
            errors += [relative_error(update, exact), relative_error(product, exact_product)]
        return max(errors)


@pytest.mark.benchmark(group="precondition 8 layers")
def test_precondition(benchmark: Any) -> None:
    """Padded stacks, one a shape."""
    case = Preconditioning(pad=True)

    def run() -> None:
        for operands in zip(case.gradients, case.left, case.right, case.updates, case.products, strict=True):
            ops.precondition(*operands)

    time_checked(benchmark, run, case.error, 10 * ROUNDING)


@pytest.mark.benchmark(group="precondition 8 layers")
def test_two_products(benchmark: Any) -> None:
    """Two matrix products a layer and the product with the gradient, which the KL clip needs."""
    case = Preconditioning(pad=False)

    def run() -> None:
        operands = zip(case.gradients, case.left, case.right, strict=True)
        case.updates = [(left[0] @ gradient[0] @ right[0]).unsqueeze(0) for gradient, left, right in operands]
        pairs = zip(case.updates, case.gradients, strict=True)
        case.products = [(update * gradient).sum((-2, -1)) for update, gradient in pairs]

    time_checked(benchmark, run, case.error, 10 * ROUNDING)
