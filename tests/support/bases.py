"""Factors and bases for the tests of orthogonal iteration."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_triton.kernels import ops

F64 = torch.float64
KINDS = ("turned", "unrelated", "rank deficient", "repeated", "converged", "thin", "sparse", "scaled", "zero")


def positive_qr(y: Tensor) -> Tensor:
    """The Q factor by the library, with R's diagonal positive."""
    q, r = torch.linalg.qr(y)
    return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[:, None, :]


def random_basis(count: int, n: int) -> Tensor:
    return positive_qr(torch.randn(count, n, n, dtype=F64)).contiguous()  # the library's has adjacent rows


def turned(basis: Tensor, angle: float) -> Tensor:
    """A basis turned by a random rotation of about this angle."""
    noise = torch.randn_like(basis) * angle / basis.shape[-1] ** 0.5
    return torch.linalg.matrix_exp(noise - noise.mT) @ basis


def symmetric(values: Tensor, vectors: Tensor) -> Tensor:
    factor = (vectors * values[:, None, :]) @ vectors.mT
    return 0.5 * (factor + factor.mT)


def orthonormality(basis: Tensor) -> Tensor:
    """||Q^T Q - I||_F in float64, (B,)."""
    basis = basis.double()
    return torch.linalg.matrix_norm(basis.mT @ basis - torch.eye(basis.shape[-1], dtype=F64))


def shifted(factor: Tensor, basis: Tensor, shift: float = 1e-3) -> Tensor:
    """(A + s I) Q."""
    return factor @ basis + shift * factor.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * basis


@dataclass
class Bases:
    """A stack of factors and of bases, with what a step writes."""

    factor: Tensor
    basis: Tensor
    residual: Tensor = field(init=False)
    refused: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.residual = torch.full_like(self.factor[:, 0, 0], torch.nan)
        self.refused = torch.ones(len(self.factor), dtype=torch.bool)


def step(stacks: list[Bases], backend: str = "torch", **options: float) -> list[Bases]:
    """What a step makes of the stacks, which stay as they are."""
    after = [Bases(x.factor, x.basis.clone()) for x in stacks]
    ops.orthogonal_iteration(
        [x.factor for x in after], [x.basis for x in after], [x.residual for x in after], [x.refused for x in after],
        backend=backend, **options,
    )  # fmt: skip
    return after


def example(kind: str, count: int, n: int) -> tuple[Tensor, Tensor]:
    """Factors and bases in float64 (count, n, n), of one of the KINDS."""
    basis = random_basis(count, n)
    power = torch.empty(count, 1, dtype=F64).uniform_(0, 9)
    values = 10 ** (-power * torch.linspace(0, 1, n, dtype=F64))
    angle = float(10 ** torch.empty(1).uniform_(-3, 0))
    vectors = random_basis(count, n) if kind == "unrelated" else turned(basis, angle)
    if kind == "rank deficient":
        values[:, max(1, n // 3) :] = 0
    elif kind == "repeated":
        values = torch.where(torch.arange(n) < n // 4, 1.0, values[:, -1:]).expand(count, n)
    elif kind == "converged":
        vectors = basis
    elif kind == "zero":
        values = torch.zeros_like(values)
    if kind in ("thin", "sparse"):  # of few rows, in which many inputs are zero
        rows = torch.randn(count, max(1, n // 8), n, dtype=F64)
        if kind == "sparse":
            rows = rows * (torch.rand_like(rows) < 0.3) * 10 ** torch.empty(count, 1, n, dtype=F64).uniform_(-3, 0)
        return rows.mT @ rows / rows.shape[1], basis
    factor = symmetric(values, vectors)
    if kind == "scaled":  # far from one
        factor = factor * 10 ** torch.empty(count, 1, 1, dtype=F64).uniform_(-20, 20)
    assert math.isfinite(float(factor.sum()))
    return factor, basis
