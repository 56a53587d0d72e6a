"""The part `refresh`: KFACAdam's refresh of eigenvectors by products, against QR, eigh and Cholesky of the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .findings import Bench
from .operations import MORE, QUICK, say_rows
from .others import BY_NAME, MOST_EIGH_CUBES, Bases, Contestant, compete, damped, kernel_contestants, worst

_MOST_QR_CUBES = 1e12  # as `MOST_EIGH_CUBES`, of factorizations that take a tenth of the time


def run(bench: Bench, names: Sequence[str]) -> None:
    """Says the time of every contestant, or why there is none, on the factors of layers of the part `ops`."""
    models = {**BY_NAME, **MORE}
    for name in QUICK if bench.quick else names:
        bench.attempt(f"{Bases.operation} {name}", partial(_contest, bench, models[name].stacks, name))


def _contest(bench: Bench, stacks: dict[int, int], name: str) -> None:
    torch.manual_seed(0)
    problem = Bases(name, stacks, torch.device(bench.device))
    competitors = [*kernel_contestants(problem), *library(problem)]
    say_rows(bench, f"{problem.operation} {name}", compete(problem, competitors, 0.02 if bench.quick else 0.4))


def library(problem: Bases) -> Iterator[Contestant]:
    """What a user would write, in float32 as training does; and Cholesky inverses of the same factors, K-FAC's refresh."""
    results: list[Tensor] = []
    cubes = sum(len(stack) * stack.shape[-1] ** 3 for stack in problem.factors)

    def contestant(
        name: str, solve: Callable[[Tensor, Tensor], Tensor], error: Callable[[], float], most: float = math.inf
    ) -> Contestant:
        def run() -> None:
            results[:] = map(solve, problem.factors, problem.starts)

        obstacle = f"sides cubed add up to {cubes:.0e}, which takes too long" if cubes > most else None
        return Contestant(name, run, error, None, obstacle, graph=False, tf32=False)

    def of_iteration() -> float:
        for basis, result in zip(problem.bases, results, strict=True):
            basis.copy_(result)
        return problem.error()

    def of_eigh() -> float:
        return worst(map(off_diagonal, problem.factors, results))

    def of_inverses() -> float:
        return worst(of_inverse(shifted(factor, problem.shift), x) for factor, x in zip(problem.factors, results, strict=True))

    def one_by_one(factor: Tensor, start: Tensor) -> Tensor:
        return torch.stack([qr(a, q) for a, q in zip(factor, start, strict=True)])

    def qr(factor: Tensor, start: Tensor) -> Tensor:
        return torch.linalg.qr(shifted(factor, problem.shift) @ start)[0]

    def cholesky_qr(factor: Tensor, start: Tensor) -> Tensor:
        """First with B = Q^T Y, whose condition is the root of that of Y^T Y, which alone would fail."""
        y = shifted(factor, problem.shift) @ start
        z = _divided(y, start.mT @ y)
        return _divided(z, z.mT @ z)

    yield contestant("QR of A Q", qr, of_iteration, _MOST_QR_CUBES)
    yield contestant("QR of A Q, loop", one_by_one, of_iteration, _MOST_QR_CUBES)
    yield contestant("Cholesky-QR twice", cholesky_qr, of_iteration)
    yield contestant("eigh", lambda factor, _: torch.linalg.eigh(factor)[1], of_eigh, MOST_EIGH_CUBES)
    yield contestant("inverse by Cholesky", lambda factor, _: _inverse(shifted(factor, problem.shift)), of_inverses)


def shifted(factor: Tensor, shift: float) -> Tensor:
    """A + s I, with s in units of the mean of A's diagonal; of one matrix or a stack."""
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1)
    return factor + shift * mean[..., None, None] * torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)


def off_diagonal(factor: Tensor, vectors: Tensor) -> float:
    """Largest ||Q^T A Q - diag|| / ||A||, or ||Q^T Q - I||."""
    a, q = factor.double(), vectors.double()
    rotated = q.mT @ a @ q
    rest = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
    apart = torch.linalg.matrix_norm(rest) / torch.linalg.matrix_norm(a)
    gap = torch.linalg.matrix_norm(damped(q.mT @ q, -q.new_ones(len(q))))
    return worst([*apart.tolist(), *gap.tolist()])


def of_inverse(matrix: Tensor, inverse: Tensor) -> float:
    """Largest ||I - L^T X L|| / sqrt(n) with the matrix L L^T."""
    lower = torch.linalg.cholesky(matrix.double())
    product = lower.mT @ inverse.double() @ lower
    return worst((torch.linalg.matrix_norm(damped(product, -product.new_ones(len(product)))) / len(matrix[0]) ** 0.5).tolist())


def _divided(y: Tensor, gram: Tensor) -> Tensor:
    """Y L^-T with the Gram matrix L L^T."""
    lower = torch.linalg.cholesky_ex((gram + gram.mT) / 2)[0]
    return torch.linalg.solve_triangular(lower.mT, y, upper=True, left=False)


def _inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix)[0])
