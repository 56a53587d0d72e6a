"""Symmetric matrices that are hard to invert, and dampings, at random: mixed kinds in one stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from kfac_triton.kernels.certificate import mirror

F64 = torch.float64


def uniform(random: Generator, low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(*shape, dtype=F64, generator=random)


def pick(random: Generator, count: int, *, out_of: int) -> Tensor:
    return torch.randint(out_of, (count,), generator=random)


def _normal(random: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=random)


def _rotated(random: Generator, spectrum: Tensor) -> Tensor:
    count, n = spectrum.shape
    basis = torch.linalg.qr(_normal(random, count, n, n))[0]
    return mirror((basis * spectrum.unsqueeze(-2)) @ basis.mT)


def _conditions(random: Generator, count: int) -> Tensor:
    return 10 ** uniform(random, 0, 9, count, 1)


def _geometric(random: Generator, count: int, n: int) -> Tensor:
    return _rotated(random, _conditions(random, count) ** -torch.linspace(0, 1, n, dtype=F64))


def _outlier(random: Generator, count: int, n: int) -> Tensor:
    """One eigenvalue far above the others, or far below."""
    spectrum = torch.ones(count, n, dtype=F64)
    spectrum[:, :1] = _conditions(random, count) ** torch.where(pick(random, count, out_of=2) == 0, 1.0, -1.0)[:, None]
    return _rotated(random, spectrum)


def _clustered(random: Generator, count: int, n: int) -> Tensor:
    spectrum = torch.where(torch.rand(count, n, generator=random) < 0.5, 1.0, 1 / _conditions(random, count))
    return _rotated(random, spectrum * (1 + 1e-6 * _normal(random, count, n)))


def _rank_deficient(random: Generator, count: int, n: int) -> Tensor:
    rank = 1 + (torch.rand(count, 1, generator=random) * (n - 1)).long()
    return _rotated(random, (torch.arange(n) < rank) * 10 ** uniform(random, -3, 0, count, n))


def _few_examples(random: Generator, count: int, n: int) -> Tensor:
    """Summed in float32, so slightly indefinite where there are fewer examples than columns."""
    rows = _normal(random, count, max(1, n // 2), n).float()
    rows = rows * (10 ** uniform(random, -3, 0, count, 1, n)).float()
    return mirror(rows.mT @ rows).double()


def _zero(random: Generator, count: int, n: int) -> Tensor:
    return torch.zeros(count, n, n, dtype=F64)


def _diagonal(random: Generator, count: int, n: int) -> Tensor:
    return torch.diag_embed(10 ** uniform(random, -9, 0, count, n))


def _nearly_diagonal(random: Generator, count: int, n: int) -> Tensor:
    root = (10 ** uniform(random, -4, 0, count, n)).unsqueeze(-1)
    correlation = torch.eye(n, dtype=F64) + 1e-3 / n * mirror(_normal(random, count, n, n)).clamp(-3, 3)
    return mirror(root * correlation * root.mT)


def _block(random: Generator, count: int, n: int) -> Tensor:
    """Two blocks of different scale with nothing between."""
    half = n // 2
    out = torch.zeros(count, n, n, dtype=F64)
    out[:, half:, half:] = _geometric(random, count, n - half)
    if half:
        out[:, :half, :half] = _rank_deficient(random, count, half) * 10 ** uniform(random, -12, 12, count, 1, 1)
    return out


def _graded(random: Generator, count: int, n: int) -> Tensor:
    """Well conditioned but for the scales of its rows and columns."""
    root = (10 ** uniform(random, -8, 8, count, n)).unsqueeze(-1)
    return mirror(root * _rotated(random, 10 ** uniform(random, -1, 0, count, n)) * root.mT)


def _scaled(random: Generator, count: int, n: int) -> Tensor:
    return _geometric(random, count, n) * 10 ** uniform(random, -30, 30, count, 1, 1)


def _denormal(random: Generator, count: int, n: int) -> Tensor:
    """Entries below float32's normal numbers: all of them, or those of some rows and columns."""
    root = torch.full((count, n, 1), 1e-20, dtype=F64) * 10 ** uniform(random, -2, 1, count, 1, 1)
    root = torch.where((pick(random, count, out_of=2) == 0)[:, None, None] & (torch.arange(n) % 2 == 0)[:, None], 1.0, root)
    return mirror(root * _rotated(random, 10 ** uniform(random, -2, 0, count, n)) * root.mT)


def _indefinite(random: Generator, count: int, n: int) -> Tensor:
    """No covariance: eigenvalues of both signs."""
    return _rotated(random, _normal(random, count, n) * 10 ** uniform(random, -6, 0, count, n))


def _huge_off_diagonal(random: Generator, count: int, n: int) -> Tensor:
    out = _geometric(random, count, n)
    if n > 1:
        _put(random, out, 10 ** uniform(random, 3, 38, count), off_diagonal=True)
    return out


def _nan(random: Generator, count: int, n: int) -> Tensor:
    return _put(random, _geometric(random, count, n), torch.full((count,), torch.nan, dtype=F64))


def _inf(random: Generator, count: int, n: int) -> Tensor:
    signs = torch.where(pick(random, count, out_of=2) == 0, 1.0, -1.0).double()
    return _put(random, _geometric(random, count, n), signs * torch.inf)


def _put(random: Generator, out: Tensor, values: Tensor, off_diagonal: bool = False) -> Tensor:
    """Writes one value into each matrix, anywhere, with its mirror image."""
    count, n, _ = out.shape
    row, shift = pick(random, count, out_of=n), pick(random, count, out_of=n - off_diagonal)
    column = (row + shift + off_diagonal) % n
    out[torch.arange(count), row, column] = out[torch.arange(count), column, row] = values
    return out


KINDS: dict[str, Callable[[Generator, int, int], Tensor]] = {
    "geometric": _geometric,
    "one outlier": _outlier,
    "clustered": _clustered,
    "rank-deficient": _rank_deficient,
    "few examples": _few_examples,
    "zero": _zero,
    "diagonal": _diagonal,
    "nearly diagonal": _nearly_diagonal,
    "blocks": _block,
    "graded": _graded,
    "scaled 1e-30..1e30": _scaled,
    "denormal": _denormal,
    "indefinite": _indefinite,
    "huge off-diagonal": _huge_off_diagonal,
    "NaN": _nan,
    "Inf": _inf,
}


@dataclass
class HardStack:
    """Matrices of one size and type.

    Attributes:
        kinds: (B,), numbers in the order of `KINDS`.
        factors: (B, n, n), exactly symmetric.
        damping: (B,), positive.
    """

    kinds: Tensor
    factors: Tensor
    damping: Tensor


def hard_stack(
    random: Generator, count: int, n: int, dtype: torch.dtype = torch.float32, kinds: Sequence[str] = tuple(KINDS)
) -> HardStack:
    """As many matrices as asked for, of these kinds, mixed."""
    numbers = torch.tensor([list(KINDS).index(kind) for kind in kinds])[pick(random, count, out_of=len(kinds))]
    factors = torch.empty(count, n, n, dtype=F64)
    for number, make in enumerate(KINDS.values()):
        places = (numbers == number).nonzero().squeeze(-1)
        if len(places):
            factors[places] = make(random, len(places), n)
    factors = factors.to(dtype)
    return HardStack(numbers, factors, hard_damping(random, factors))


def hard_damping(random: Generator, factors: Tensor) -> Tensor:
    """Mostly 1e-12 to 1e3 of the mean diagonal entry; some far above or below it, some denormal."""
    count = len(factors)
    mean = factors.diagonal(dim1=-2, dim2=-1).double().abs().mean(-1)
    mean = torch.where(torch.isfinite(mean) & (mean > 0), mean, 10 ** uniform(random, -30, 5, count))
    damping = mean * 10 ** uniform(random, -12, 3, count)
    luck = torch.rand(count, generator=random)
    damping = torch.where(luck < 0.05, mean * 10 ** uniform(random, -40, 12, count), damping)
    limits = torch.finfo(factors.dtype)
    damping = torch.where(luck > 0.98, limits.smallest_normal * 10 ** uniform(random, -6, 0, count), damping)
    least = limits.smallest_normal * limits.eps  # the smallest denormal
    return damping.clamp(least, 0.5 * limits.max).to(factors.dtype).clamp_min(least)


def drifted(random: Generator, stack: HardStack) -> HardStack:
    """The same stack a refresh later: matrices that hardly moved, that moved towards another one, that are another one."""
    count, dtype = len(stack.factors), stack.factors.dtype
    order, change = torch.randperm(count, generator=random), pick(random, count, out_of=3)
    old, other = stack.factors.double(), stack.factors[order].double()
    near = old * (1 + 1e-3 * _normal(random, count, 1, 1))
    choices = (near, mirror(0.9 * old + 0.1 * other), other)
    factors = torch.stack(choices).to(dtype)[change, torch.arange(count)]
    limits = torch.finfo(dtype)
    damping = (stack.damping.double() * 10 ** uniform(random, -2, 2, count)).clamp(0, 0.5 * limits.max).to(dtype)
    damping = torch.where(change == 2, stack.damping[order], damping).clamp_min(limits.smallest_normal * limits.eps)
    kinds = torch.stack([stack.kinds, torch.full((count,), len(KINDS)), stack.kinds[order]])[change, torch.arange(count)]
    return HardStack(kinds, factors, damping)
