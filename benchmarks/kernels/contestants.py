"""The four operations as the kernels do them and as a user would write them, on the layers of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_triton.cli.tuning.checks import (
    Bases,
    ColdInverses,
    Covariance,
    Inverses,
    Preconditioning,
    Problem,
    RowSource,
    WarmInverses,
    kernel_obstacle,
    worst,
)
from kfac_triton.kernels import ops, runtime
from kfac_triton.kernels.certificate import damped

from .shapes import Layer, Model

OURS = "kernel"
REFERENCE = "torch reference"
LIBRARY = "auto (library, TF32)"  # where the operation, left to choose, takes a library's products and not the kernel
# Eigendecompositions run one after the other; beyond this sum of cubed sides they would take the time of all others.
MOST_EIGH_CUBES = 1e11


@dataclass
class Contestant:
    """A way to do an operation.

    Attributes:
        name: for the tables.
        run: does it once.
        error: error of what `run` left, against float64.
        prepare: sets back what the check needs, if anything.
        resets: whether `prepare` must come before every run, and not only before the check.
        obstacle: why it cannot run here.
        graph: whether a CUDA graph may hold it; library factorizations wait for the device.
        tf32: whether a library's float32 products may be TF32, as those of the kernels are.
    """

    name: str
    run: Callable[[], object]
    error: Callable[[], float]
    prepare: Callable[[], None] | None = None
    obstacle: str | None = None
    resets: bool = False
    graph: bool = True
    tf32: bool = True


def make_problem(operation: str, model: Model, device: torch.device) -> Problem:
    """Made-up numbers for an operation on the layers of a model."""
    if operation == "covariance_ema":
        return Covariance(model.name, [rows for layer in model.layers for rows in _rows(layer, model, device)])
    if operation == "newton_schulz_inverse":
        return ColdInverses(model.name, model.stacks, device)
    if operation == "factored_newton_refresh":
        return WarmInverses(model.name, model.stacks, device)
    return Preconditioning(model.name, model.gradients, device)


def _rows(layer: Layer, model: Model, device: torch.device) -> Iterator[RowSource]:
    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(torch.float32 if model.itemsize == 4 else torch.bfloat16)

    for _ in range(layer.count):
        if layer.images is None:
            yield RowSource(numbers(layer.rows, layer.inputs), ones=layer.bias)
            yield RowSource(numbers(layer.rows, layer.outputs))
            continue
        images = layer.images
        window = ops.window((images.kernel,) * 2, (images.stride,) * 2, (images.padding,) * 2)
        yield RowSource(numbers(images.batch, images.channels, images.side, images.side), window, layer.bias)
        yield RowSource(numbers(images.batch, layer.outputs, images.out_side, images.out_side), ops.window((1, 1)))


def kernel_contestants(problem: Problem) -> list[Contestant]:
    """The kernel, its plain-torch reference, and a library where the same call takes that."""
    obstacle = kernel_obstacle(problem)
    if obstacle is None and runtime.INTERPRETED:
        obstacle = "it would run in the interpreter, whose times mean nothing"
    resets = isinstance(problem, WarmInverses | Bases)  # these start from their own result
    ours = [
        Contestant(OURS, lambda: problem.run("triton"), problem.error, problem.prepare, obstacle, resets),
        Contestant(REFERENCE, lambda: problem.run("torch"), problem.error, problem.prepare, None, resets, tf32=False),
    ]
    if problem.prefers_library():
        ours.append(Contestant(LIBRARY, problem.run, problem.error, problem.prepare, None, resets))
    return ours


def contestants(problem: Problem) -> list[Contestant]:
    """Those of `kernel_contestants`, and what a user would write."""
    ours = kernel_contestants(problem)
    if isinstance(problem, Covariance):
        return ours + list(_covariances(problem))
    if isinstance(problem, Inverses):
        return ours + list(_inverses(problem))
    assert isinstance(problem, Preconditioning)
    return ours + list(_preconditioning(problem))


def _covariances(problem: Covariance) -> Iterator[Contestant]:
    factors = [start.clone() for start in problem.starts]
    weights = list(zip(problem.alpha.tolist(), problem.beta.tolist(), strict=True))

    def start_over() -> None:
        for factor, start in zip(factors, problem.starts, strict=True):
            factor.copy_(start)

    def addmm() -> None:
        for factor, layer, (alpha, beta) in zip(factors, problem.rows, weights, strict=True):
            rows = layer.matrix(torch.float32)
            factor.addmm_(rows.T, rows, beta=beta, alpha=alpha)

    def multiply_in_16_bits() -> None:
        for factor, layer, (alpha, beta) in zip(factors, problem.rows, weights, strict=True):
            rows = layer.matrix(layer.source.dtype)
            factor.mul_(beta).add_(rows.T @ rows, alpha=alpha)

    # Layers of one shape in one batched product. Convolutions are left to the loops: a batch of their patches fills memory.
    groups: dict[tuple[object, ...], list[int]] = defaultdict(list)
    for i, layer in enumerate(problem.rows):
        groups[tuple(layer.source.shape), layer.ones].append(i)
    stacks = {members[0]: torch.stack([problem.starts[i] for i in members]) for members in groups.values()}

    def bmm() -> None:
        for members in groups.values():
            alpha, beta = weights[members[0]]
            rows = torch.stack([problem.rows[i].matrix(torch.float32) for i in members])
            stacks[members[0]].baddbmm_(rows.mT, rows, beta=beta, alpha=alpha)

    def bmm_error() -> float:
        results = {i: stacks[members[0]][j] for members in groups.values() for j, i in enumerate(members)}
        return problem.error_of(results[i] for i in range(len(problem.rows)))

    def restack() -> None:
        for members in groups.values():
            stacks[members[0]].copy_(torch.stack([problem.starts[i] for i in members]))

    images = any(layer.source.dim() > 2 for layer in problem.rows)
    yield Contestant("addmm_ loop", addmm, lambda: problem.error_of(factors), start_over)
    if problem.rows[0].source.dtype != torch.float32:
        yield Contestant("16-bit matmul loop", multiply_in_16_bits, lambda: problem.error_of(factors), start_over)
    refusal = "patches of all equal layers at once would fill memory" if images else None
    yield Contestant("baddbmm_", bmm, bmm_error, restack, refusal)


def _inverses(problem: Inverses) -> Iterator[Contestant]:
    results: list[Tensor] = []
    cubes = sum(len(stack) * stack.shape[-1] ** 3 for stack in problem.factors)

    def contestant(name: str, invert: Callable[[Tensor], Tensor], obstacle: str | None = None) -> Contestant:
        def run() -> None:
            results[:] = [invert(damped(f, d)) for f, d in zip(problem.factors, problem.dampings, strict=True)]

        return Contestant(name, run, lambda: worst(problem.errors_of(results).tolist()), None, obstacle, graph=False)

    def one_by_one(invert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda stack: torch.stack([invert(matrix) for matrix in stack])

    too_long = f"sides cubed add up to {cubes:.0e}, which takes too long" if cubes > MOST_EIGH_CUBES else None
    yield contestant("cholesky_ex + cholesky_inverse", _by_cholesky)
    yield contestant("cholesky_ex + cholesky_inverse, loop", one_by_one(_by_cholesky))
    yield contestant("linalg.inv", torch.linalg.inv)
    yield contestant("eigh", _by_eigh, too_long)
    yield contestant("eigh, loop", one_by_one(_by_eigh), too_long)


def _by_cholesky(matrices: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(matrices)[0])


def _by_eigh(matrices: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors / values.unsqueeze(-2)) @ vectors.mT


def _preconditioning(problem: Preconditioning) -> Iterator[Contestant]:
    # A user has dense inverses, and needs <V, W> for the KL clip.
    left = [root.mT @ root for root in problem.left]
    right = [root.mT @ root for root in problem.right]
    updates, products = list(problem.updates), list(problem.products)

    def batched() -> None:
        for i, gradient in enumerate(problem.gradients):
            updates[i] = torch.bmm(torch.bmm(left[i], gradient), right[i])
            products[i] = (updates[i] * gradient).sum((-2, -1))

    def one_by_one() -> None:
        for i, gradient in enumerate(problem.gradients):
            updates[i] = torch.stack([g @ w @ a for g, w, a in zip(left[i], gradient, right[i], strict=True)])
            products[i] = torch.stack([(v * w).sum() for v, w in zip(updates[i], gradient, strict=True)])

    yield Contestant("bmm", batched, lambda: problem.error_of(updates, products))
    yield Contestant("matmul loop", one_by_one, lambda: problem.error_of(updates, products))
