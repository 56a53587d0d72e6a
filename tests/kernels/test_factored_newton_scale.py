"""The scale of the warm refresh: nearest in the Frobenius norm, and no more steps than when the power iteration gave it."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.refreshes import assert_honest, exact_root, refresh, with_condition
from torch import Tensor

from kfac_triton.kernels.certificate import damped, mirror, root_residual
from kfac_triton.kernels.factored_newton.reference import ITERATE_ABOVE, _nearest_scale, _spectral_bounds

TOLERANCE = 0.05


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=st.integers(1, 40), power=st.floats(0, 6), unit=st.floats(-30, 30), seed=st.integers(0, 2**32))
def test_the_nearest_scale_minimises_the_distance(n: int, power: float, unit: float, seed: int) -> None:
    """No scale on a fine grid around it, and none of many over twelve decades, brings the matrix nearer to I."""
    torch.manual_seed(seed)
    matrix = 10**unit * (with_condition(n, 10**power) + torch.eye(n, dtype=torch.float64))
    scale = _nearest_scale(matrix[None])
    factors = torch.cat([torch.linspace(0.9, 1.1, 201), torch.logspace(-6, 6, 121)]).double()
    identity = torch.eye(n, dtype=torch.float64)
    distances = torch.linalg.matrix_norm(identity - (factors * scale)[:, None, None] * matrix)
    assert torch.linalg.matrix_norm(identity - scale[:, None, None] * matrix) <= distances.min() + 1e-12


def test_squares_of_the_matrix_may_be_beyond_its_type() -> None:
    """In float32, 1e25 and 1e-25 have squares that overflow and vanish."""
    for unit in (1e25, 1e-25):
        matrix = unit * torch.tensor([[[2.0, 1.0], [1.0, 3.0]]])
        torch.testing.assert_close(_nearest_scale(matrix), torch.tensor([5 / 15 / unit]), rtol=1e-6, atol=0)


def step_of_power_iteration(target: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
    """The step whose scale is 1 up to a distance of 0.5, and from the power iteration beyond: what it must not fall behind."""
    energy, distance, rounding = root_residual(target, root)
    lower, upper = _spectral_bounds(energy)
    scale = torch.where(distance > 0.5, 2 / (lower + upper), torch.ones_like(distance))
    gap = torch.eye(root.shape[-1], dtype=root.dtype) - scale[:, None, None] * energy
    distance = torch.linalg.matrix_norm(gap)
    phi = gap.tril(-1) + torch.diag_embed(0.5 * gap.diagonal(dim1=-2, dim2=-1))
    return scale.sqrt()[:, None, None] * (root + phi @ root), 1.5 * distance**2 + 0.5 * distance**3 + scale * rounding


def steps_needed(factor: Tensor, damping: Tensor, root: Tensor, by_power_iteration: bool) -> tuple[int, Tensor]:
    for step in range(1, 13):
        if by_power_iteration:
            root, residual = step_of_power_iteration(damped(factor, damping), root)
        else:
            root, residual = refresh(factor, damping, root, TOLERANCE, 1, backend="torch")
        if residual <= TOLERANCE:
            assert_honest(factor, damping, root, residual)
            return step, root
    raise AssertionError("twelve steps were not enough")


def drift(n: int, rows: int, damping: float, decay: float = 0.95, jump: float = 1.0, seed: int = 0) -> list[tuple[int, int]]:
    """Steps (new, by power iteration) of ten refreshes that each follow a moving average; one direction jumps in the sixth."""
    torch.manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    units = torch.logspace(0, -2, n, dtype=torch.float64)

    def fresh(jump: float = 1.0) -> Tensor:
        samples = torch.randn(rows, n, dtype=torch.float64) * units
        samples[:, 0] *= math.sqrt(jump)
        samples = samples @ basis
        return samples.T @ samples / rows

    average = fresh()
    shift = (damping * average.diagonal().mean())[None]
    root, counts = exact_root(damped(average[None], shift)).float(), []
    for update in range(10):
        average = decay * average + (1 - decay) * fresh(jump if update == 5 else 1.0)
        problem = mirror(average[None].float()), shift.float(), root
        before, _ = steps_needed(*problem, by_power_iteration=True)
        now, root = steps_needed(*problem, by_power_iteration=False)
        counts.append((now, before))
    return counts


@pytest.mark.parametrize("damping", [0.1, 0.01, 0.001])
@pytest.mark.parametrize(("n", "ratio"), [(16, 1), (16, 16), (64, 1), (64, 16), (256, 1), (256, 16)])
def test_drifting_factors_never_need_more_steps_than_with_the_power_iteration(n: int, ratio: int, damping: float) -> None:
    """Decay 0.95; with many fresh rows (ratio of them to n), one step is what most refreshes need, whatever the damping."""
    counts = drift(n, ratio * n, damping)
    assert all(now <= before for now, before in counts)
    if ratio == 16 and n <= 64:
        assert Counter(now for now, _ in counts)[1] >= 9


@pytest.mark.parametrize(("decay", "jump"), [(0.95, 10.0), (0.95, 100.0), (0.7, 10.0), (0.7, 100.0)])
def test_one_direction_that_jumps_falls_back_to_the_power_iteration(decay: float, jump: float) -> None:
    counts = drift(64, 1024, 0.01, decay, jump)
    assert all(now <= before for now, before in counts)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("jump", "diverges"), [(10.0, True), (30.0, True), (100.0, False)])
def test_one_large_eigenvalue_needs_the_power_iteration(jump: float, diverges: bool, backend: str) -> None:
    """The scale that is nearest in the Frobenius norm leaves it above 2, where the step diverges, or the others far below 1."""
    n = 40
    factor, damping = with_condition(n, 1e2)[None], torch.ones(1, dtype=torch.float64)
    start = exact_root(damped(factor, damping))
    direction = torch.linalg.inv(start[0]) @ torch.randn(n, 1, dtype=torch.float64)
    direction *= math.sqrt(jump) / torch.linalg.vector_norm(start[0] @ direction)
    factor = mirror(factor + direction @ direction.mT)
    energy, _, _ = root_residual(damped(factor, damping), start)
    nearest = _nearest_scale(energy)
    largest = torch.linalg.matrix_norm(energy, 2)
    assert torch.linalg.matrix_norm(torch.eye(n, dtype=torch.float64) - nearest * energy) > ITERATE_ABOVE
    assert (nearest * largest > 2) == diverges
    factor, damping, start = factor.float(), damping.float(), start.float()
    root, residual = refresh(factor, damping, start, TOLERANCE, 12, backend=backend)
    assert residual <= TOLERANCE
    assert_honest(factor, damping, root, residual)
