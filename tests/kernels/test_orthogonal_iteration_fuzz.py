"""Thousands of steps from bases of every kind: whatever is accepted is orthonormal, and hardly anything is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from support import emulated_tf32
from support.bases import KINDS, Bases, example, orthonormality, step

MOST = 1e-4
SIDES = (1, 3, 16, 24, 33, 64, 96)


def run(total: int, sides: tuple[int, ...], show: Callable[..., None]) -> None:
    """Steps of at least so many matrices."""
    done, refused, worst, off = Counter[str](), Counter[str](), 0.0, 0.0
    while done.total() < total:
        for kind in KINDS:
            n = sides[int(torch.randint(len(sides), (1,)))]
            factor, basis = example(kind, max(1, min(25, 20000 // n**2)), n)
            (after,) = step([Bases(factor.float(), basis.float())])
            distance = orthonormality(after.basis)
            assert after.basis.isfinite().all()
            done[kind] += len(factor)
            refused[kind] += int(after.refused.sum())
            worst = max(worst, float(distance.max()))
            off = max(off, float((distance - after.residual).abs().max()))
    show(f"{done.total()} steps, {refused.total()} refused {dict(+refused)}, worst {worst:.1e}, residual off by {off:.1e}")
    assert worst < MOST
    assert off < 2e-5
    assert refused.total() <= 0.001 * total


@pytest.mark.parametrize("emulated", [False, True])
@pytest.mark.parametrize("total", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_accepted_bases_are_orthonormal(
    total: int, emulated: bool, show: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if emulated:
        emulated_tf32.use(monkeypatch)
    run(total, SIDES, show)


@pytest.mark.slow
def test_large_accepted_bases_are_orthonormal(show: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_tf32.use(monkeypatch)
    run(60, (193, 785), show)
