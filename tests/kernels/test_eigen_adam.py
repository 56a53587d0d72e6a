"""Directions of Adam in the eigenbasis, in both backends, against the formula."""

from __future__ import annotations

import pytest
import torch
from support.adam_tiles import OPTIONS, SIZES, TILES, Problem, by_formula, check_padding, tiles_of

from kfac_triton.kernels import ops, tiles
from kfac_triton.kernels.eigen_adam import launch

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch, scratch_is_nan: None) -> None:
    """Small blocks and few programs, so that small tiles take several turns of a program."""
    for name, value in (("_BLOCK_M", 8), ("_BLOCK_N", 16), ("_SPAN", 8), ("_DEPTH", 2), ("_BLOCK", 64)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 2)


@both_backends
@pytest.mark.parametrize("padding", [0.0, torch.nan])
def test_directions_are_those_of_the_formula(backend: str, padding: float) -> None:
    """Of several stacks, with odd sides, and options and numbers of steps of their own; nothing else is written."""
    problem = Problem(padding=padding)
    kept = [*problem.rotated, *problem.means, *problem.squares, problem.steps, problem.noise, problem.options]
    before = [x.clone() for x in kept]
    for i, u in enumerate(problem.direction(backend)):
        m, n = SIZES[i]
        torch.testing.assert_close(u[:m, :n].double(), problem.right(i), rtol=3e-6, atol=1e-6)
        check_padding(u, SIZES[i])
    for x, y in zip(kept, before, strict=True):
        assert torch.equal(x.view(torch.int32), y.view(torch.int32))


@pytest.mark.parametrize("type_of_noise", [torch.float32, torch.float64])
def test_in_double_precision_the_reference_has_all_digits(type_of_noise: torch.dtype) -> None:
    problem = Problem(torch.float64)
    problem.noise = problem.noise.to(type_of_noise)
    problem.noise[1:] += 1e-9  # has no effect in single precision
    for i, u in enumerate(problem.direction("auto")):
        m, n = SIZES[i]
        torch.testing.assert_close(u[:m, :n], problem.right(i), rtol=1e-12, atol=1e-12)


@both_backends
def test_the_kernel_has_the_blocks_that_are_shipped(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    torch.manual_seed(0)
    m, n = 70, 133
    r, mean = torch.randn(2, 1, 80, 144)
    r[:, m:], r[:, :, n:] = 0.0, 0.0
    square, out = r.square() + 0.1, torch.full_like(r, torch.nan)
    numbers = torch.zeros(1), torch.tensor([[0.3, 0.4]]), torch.tensor([OPTIONS[0]], dtype=torch.float64)
    ops.adam_direction([r], [mean], [square], [out], *numbers, [(m, n)], backend=backend)
    lists = [x[0, :m, :n].tolist() for x in (r, mean, square)]
    right = by_formula(*lists, 0.0, numbers[1][0].tolist(), OPTIONS[0])
    torch.testing.assert_close(out[0, :m, :n].double(), right, rtol=3e-6, atol=1e-6)
    check_padding(out[0], (m, n))


@both_backends
@pytest.mark.parametrize("options", [(0.5, 0.75, 0.0, 1), (0.5, 0.75, 0.0, 0), (0.0, 0.0, 1.0, 0)], ids=str)
def test_whole_numbers_have_exact_directions(backend: str, options: tuple[float, ...]) -> None:
    """The first step: M' / (1 - b1) = R, and D of one size is R^2 (1 + alpha) (1 + beta), here four times R^2 or R^2."""
    torch.manual_seed(0)
    for alpha, beta, root in ((1.0, 1.0, 2.0), (0.0, 0.0, 1.0)):
        r = torch.zeros(1, 16, 16)
        r[0, :8, :16] = 2.0 ** torch.randint(-3, 4, ()) * torch.randint(0, 2, (8, 16)).mul(2).sub(1)
        out, zero = torch.full_like(r, torch.nan), torch.zeros_like(r)
        numbers = torch.zeros(1), torch.tensor([[alpha, beta]]), torch.tensor([options], dtype=torch.float64)
        ops.adam_direction([r], [zero], [zero], [out], *numbers, [(8, 16)], backend=backend)
        right = r / (root * r.abs() + options[2]) if options[2] else r.sign() / root
        assert torch.equal(out, right)


@both_backends
def test_means_are_exact_for_whole_numbers(backend: str) -> None:
    """With b2 = 0, V' = R^2, and the means of whole numbers are added one after the other."""
    r = torch.zeros(1, 16, 16)
    r[0, :2, :2] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    # R^2 = 1 4, 9 16, means of rows 2.5, 12.5; D = 3.5 6.5, 21.5 28.5, means of columns 12.5 17.5.
    damped = torch.tensor([[16.0, 24.0], [34.0, 46.0]])
    out, zero = torch.full_like(r, torch.nan), torch.zeros_like(r)
    numbers = torch.zeros(1), torch.ones(1, 2), torch.tensor([[0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    ops.adam_direction([r], [zero], [zero], [out], *numbers, [(2, 2)], backend=backend)
    assert torch.equal(out[0, :2, :2], r[0, :2, :2] / damped.sqrt())
    check_padding(out[0], (2, 2))


@both_backends
@pytest.mark.parametrize("exponent", [-30, -7, 5, 25])
def test_directions_do_not_depend_on_the_scale_of_gradients(backend: str, exponent: int) -> None:
    """Without eps not a bit of them changes with a power of two: neither weights nor losses have a unit."""
    one, other = Problem(), Problem()
    for problem in (one, other):
        problem.options[:, 2] = 0.0
    factor = 2.0**exponent
    other.rotated, other.means = ([x * factor for x in stacks] for stacks in (other.rotated, other.means))
    other.squares = [x * factor**2 for x in other.squares]
    for x, y in zip(one.direction(backend), other.direction(backend), strict=True):
        assert torch.equal(x, y)
        assert x.count_nonzero()


@both_backends
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_dead_units_do_not_move(backend: str, noise: float) -> None:
    """Zeros divided by zero: rows, columns and whole tiles that never had a gradient, without eps."""
    problem = Problem()
    problem.options[:, 2], problem.noise = 0.0, torch.full((TILES, 2), noise)
    for stacks in (problem.rotated, problem.means, problem.squares):
        first, _, second, *_ = tiles_of(stacks)
        first[3], first[:, 5] = 0.0, 0.0
        second.zero_()
    first, other, second, *rest = problem.direction(backend)
    assert not first[3].count_nonzero()
    assert not first[:, 5].count_nonzero()
    assert first[:3, :5].count_nonzero() == 15
    assert not second.count_nonzero()
    assert all(x.isfinite().all() for x in (first, other, *rest))


@both_backends
@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "overflow of a sum", "infinite square"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_bad_tile_is_nan_and_leaves_its_neighbours_alone(backend: str, kind: str, noise: float) -> None:
    problem, good = Problem(), Problem()
    problem.noise = good.noise = torch.full((TILES, 2), noise)
    bad = 0
    m, n = SIZES[bad]
    tile = tiles_of(problem.rotated)[bad]
    if kind in {"nan", "inf"}:
        tile[m - 1, n - 1] = float(kind)
    elif kind == "overflow":
        tile[3, 4] = 1e30
    elif kind == "overflow of a sum":  # each of the squares is finite
        tiles_of(problem.squares)[bad][:] = 3e38
    else:
        tiles_of(problem.squares)[bad][0, 0] = torch.inf
    tiles_of(problem.means)[bad][0] = tile[0] = tiles_of(problem.squares)[bad][1] = 0.0  # the direction would be zero there
    problem.options[bad, 2] = 0.0
    found, right = problem.direction(backend), good.direction(backend)
    for i, (x, y) in enumerate(zip(found, right, strict=True)):
        if i == bad:
            assert x[:m, :n].isnan().all()
            check_padding(x, SIZES[i])
        else:
            assert torch.equal(x, y)
    assert not tiles_of(good.out)[bad].isnan().any()


@both_backends
@pytest.mark.parametrize("size", [1e14, 1e-14])
def test_large_and_small_gradients_neither_overflow_nor_vanish(backend: str, size: float) -> None:
    """Sums of squares near 1e31 and 1e-26."""
    problem = Problem()
    for stacks, factor in ((problem.rotated, size), (problem.means, size), (problem.squares, size**2)):
        for stack in stacks:
            stack *= factor
    problem.options[:, 2] *= size
    for i, u in enumerate(problem.direction(backend)):
        m, n = SIZES[i]
        torch.testing.assert_close(u[:m, :n].double(), problem.right(i), rtol=3e-6, atol=1e-6)


@both_backends
def test_the_correction_of_the_bias_keeps_its_digits(backend: str) -> None:
    """After the first step with betas near one: in single precision 1 - beta has four digits."""
    r, zero = torch.full((1, 16, 16), 0.3), torch.zeros(1, 16, 16)
    out, options = torch.empty_like(r), torch.tensor([[0.99999, 0.99999, 0.0, 0]], dtype=torch.float64)
    ops.adam_direction([r], [zero], [zero], [out], torch.zeros(1), torch.zeros(1, 2), options, [(16, 16)], backend=backend)
    torch.testing.assert_close(out, torch.ones(1, 16, 16), rtol=1e-6, atol=0)
