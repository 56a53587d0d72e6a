"""Adam in the eigenbasis, in both backends, against the formula in loops over numbers in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_triton.kernels import ops, tiles
from kfac_triton.kernels.eigen_adam import launch, reference

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])
STACKS = [(2, 16, 48), (3, 32, 16), (1, 48, 32)]
SIZES = [(13, 35), (16, 48), (17, 1), (1, 16), (32, 7), (35, 29)]
TILES = len(SIZES)
OPTIONS = [  # b1, b2, eps, Nesterov's momentum
    (0.9, 0.95, 1e-8, 1),
    (0.9, 0.999, 1e-8, 0),
    (0.0, 0.0, 1e-3, 1),
    (0.5, 0.7, 0.1, 0),
    (0.95, 0.99, 1e-8, 1),
    (0.8, 0.95, 0.0, 1),
]
NOISE = [(0.0, 0.0), (1.0, 1.0), (0.3, 0.0), (0.0, 0.7), (0.25, 0.5), (0.6, 0.1)]


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch, scratch_is_nan: None) -> None:
    """Small blocks and few programs, so that small tiles take several turns of a program."""
    for name, value in (("_BLOCK_M", 8), ("_BLOCK_N", 16), ("_SPAN", 8), ("_DEPTH", 2), ("_BLOCK", 64)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 2)


class Problem:
    """Tiles of all sizes: R, M and V after some steps, and outputs that hold NaN.

    Args:
        dtype: of the stacks.
        padding: what is stored beyond the matrices.
    """

    def __init__(self, dtype: torch.dtype = torch.float32, padding: float = 0.0) -> None:
        torch.manual_seed(0)
        self.rotated, self.means, self.squares = ([torch.randn(shape, dtype=dtype) for shape in STACKS] for _ in range(3))
        self.squares = [x.square() for x in self.squares]
        self.out = [torch.full_like(x, torch.nan) for x in self.rotated]
        self.steps = torch.tensor([0.0, 1.0, 2.0, 10.0, 1000.0, 3.0])
        self.noise, self.options = torch.tensor(NOISE), torch.tensor(OPTIONS, dtype=torch.float64)
        for stacks in (self.rotated, self.means, self.squares):
            for tile, (m, n) in zip(_tiles(stacks), SIZES, strict=True):
                tile[m:], tile[:, n:] = padding, padding
        for stacks in (self.means, self.squares):  # as it is before the first step
            _tiles(stacks)[0][:13, :35] = 0.0

    def direction(self, backend: str) -> list[Tensor]:
        """U of every tile, with its padding."""
        numbers = self.steps, self.noise, self.options
        ops.adam_direction(self.rotated, self.means, self.squares, self.out, *numbers, SIZES, backend=backend)
        return _tiles(self.out)

    def state(self) -> list[list[Tensor]]:
        """Copies of what may change, for every tile."""
        moments = zip(_tiles(self.means), _tiles(self.squares), self.steps, strict=True)
        return [[x.clone() for x in own] for own in moments]

    def right(self, i: int) -> Tensor:
        """U of a tile without its padding."""
        m, n = SIZES[i]
        r, mean, square = (_tiles(x)[i][:m, :n].tolist() for x in (self.rotated, self.means, self.squares))
        return _direction(r, mean, square, float(self.steps[i]), self.noise[i].tolist(), self.options[i].tolist())


def _tiles(stacks: list[Tensor]) -> list[Tensor]:
    return [tile for stack in stacks for tile in stack]


Numbers = list[list[float]]


def _direction(
    r: Numbers, mean: Numbers, square: Numbers, steps: float, noise: Sequence[float], options: Sequence[float]
) -> Tensor:
    """The formula, a number at a time, in float64."""
    (beta1, beta2, eps, nesterov), (alpha, beta), t = options, noise, steps + 1
    m, n = len(r), len(r[0])
    first, second = 1 - beta1**t, 1 - beta2**t
    along = [[0.0] * n for _ in range(m)]
    damped = [[0.0] * n for _ in range(m)]
    for i in range(m):
        for j in range(n):
            moment = beta1 * mean[i][j] + (1 - beta1) * r[i][j]
            ahead = beta1 * moment / first + (1 - beta1) * r[i][j]
            along[i][j] = ahead if nesterov else moment / first
            damped[i][j] = (beta2 * square[i][j] + (1 - beta2) * r[i][j] ** 2) / second
    for row in damped:
        average = math.fsum(row) / n
        row[:] = [x + alpha * average for x in row]
    for j in range(n):
        average = math.fsum(row[j] for row in damped) / m
        for row in damped:
            row[j] += beta * average
    pairs = [zip(x, d, strict=True) for x, d in zip(along, damped, strict=True)]
    return torch.tensor([[x / (d**0.5 + eps) if x else 0.0 for x, d in row] for row in pairs], dtype=torch.float64)


def _check_padding(u: Tensor, size: tuple[int, int]) -> None:
    m, n = size
    assert not u[m:].count_nonzero()
    assert not u[:, n:].count_nonzero()


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
        _check_padding(u, SIZES[i])
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
    right = _direction(*lists, 0.0, numbers[1][0].tolist(), OPTIONS[0])
    torch.testing.assert_close(out[0, :m, :n].double(), right, rtol=3e-6, atol=1e-6)
    _check_padding(out[0], (m, n))


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
    _check_padding(out[0], (2, 2))


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
        first, second, *_ = _tiles(stacks)
        first[3], first[:, 5] = 0.0, 0.0
        second.zero_()
    first, second, *rest = problem.direction(backend)
    assert not first[3].count_nonzero()
    assert not first[:, 5].count_nonzero()
    assert first[:3, :5].count_nonzero() == 15
    assert not second.count_nonzero()
    assert all(x.isfinite().all() for x in (first, *rest))


@both_backends
@pytest.mark.parametrize("kind", ["nan", "inf", "overflow", "overflow of a sum", "infinite square"])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_bad_tile_is_nan_and_leaves_its_neighbours_alone(backend: str, kind: str, noise: float) -> None:
    problem, good = Problem(), Problem()
    problem.noise = good.noise = torch.full((TILES, 2), noise)
    bad = 1
    m, n = SIZES[bad]
    tile = _tiles(problem.rotated)[bad]
    if kind in {"nan", "inf"}:
        tile[m - 1, n - 1] = float(kind)
    elif kind == "overflow":
        tile[3, 4] = 1e30
    elif kind == "overflow of a sum":  # each of the squares is finite
        _tiles(problem.squares)[bad][:] = 3e38
    else:
        _tiles(problem.squares)[bad][0, 0] = torch.inf
    _tiles(problem.means)[bad][0] = tile[0] = _tiles(problem.squares)[bad][1] = 0.0  # the direction would be zero there
    problem.options[bad, 2] = 0.0
    found, right = problem.direction(backend), good.direction(backend)
    for i, (x, y) in enumerate(zip(found, right, strict=True)):
        if i == bad:
            assert x[:m, :n].isnan().all()
            _check_padding(x, SIZES[i])
        else:
            assert torch.equal(x, y)
    assert not _tiles(good.out)[bad].isnan().any()


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


ACCEPTED = [True, False, True, False, False, True]


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_those_of_the_formula_or_stay(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    for i, accepted in enumerate(ACCEPTED):
        if not accepted:  # and what is not accepted may hold anything
            _tiles(problem.rotated)[i].fill_(torch.nan)
            _tiles(problem.means)[i][0], _tiles(problem.squares)[i][-1] = torch.nan, torch.inf
    before, gradients = problem.state(), [x.clone() for x in _tiles(problem.rotated)]
    backend = backend if dtype == torch.float32 else "torch"
    lists = problem.rotated, problem.means, problem.squares
    ops.adam_moments(*lists, problem.steps, torch.tensor(ACCEPTED), problem.options, backend=backend)
    digits = 1e-6 if dtype == torch.float32 else 1e-14
    for i, (new, old) in enumerate(zip(problem.state(), before, strict=True)):
        if not ACCEPTED[i]:
            assert all(torch.equal(x.view(torch.int32), y.view(torch.int32)) for x, y in zip(new, old, strict=True))
            continue
        (beta1, beta2, *_), r = OPTIONS[i], gradients[i].double()
        right = beta1 * old[0].double() + (1 - beta1) * r, beta2 * old[1].double() + (1 - beta2) * r**2
        for x, y in zip(new, right, strict=False):
            torch.testing.assert_close(x.double(), y, rtol=digits, atol=digits)
        assert new[2] == old[2] + 1
        m, n = SIZES[i]
        assert not any(x[m:].count_nonzero() + x[:, n:].count_nonzero() for x in new[:2])


def test_without_a_host_read_moments_are_the_same() -> None:
    """What the reference does on a GPU."""
    one, other, accept = Problem(torch.float64), Problem(torch.float64), torch.tensor(ACCEPTED)
    ops.adam_moments(one.rotated, one.means, one.squares, one.steps, accept, one.options)
    matrices = list(zip(_tiles(other.rotated), _tiles(other.means), _tiles(other.squares), strict=True))
    reference._select_accepted(matrices, accept, other.options)
    for x, y in zip([*one.means, *one.squares], [*other.means, *other.squares], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=0)


@both_backends
def test_steps_in_turns_are_adam(backend: str) -> None:
    """Many steps without noise, against PyTorch's Adam on the same gradients."""
    torch.manual_seed(0)
    p = torch.zeros(16, 16, requires_grad=True)
    adam = torch.optim.Adam([p], lr=1.0, betas=(0.8, 0.9), eps=1e-6)
    mean, square, out = (torch.zeros(1, 16, 16) for _ in range(3))
    steps, noise, accept = torch.zeros(1), torch.zeros(1, 2), torch.tensor([True])
    options, total = torch.tensor([[0.8, 0.9, 1e-6, 0]], dtype=torch.float64), torch.zeros(16, 16)
    for _ in range(6):
        p.grad = torch.randn(16, 16)
        adam.step()
        lists = [p.grad[None].clone()], [mean], [square]
        ops.adam_direction(*lists, [out], steps, noise, options, [(16, 16)], backend=backend)
        ops.adam_moments(*lists, steps, accept, options, backend=backend)
        total -= out[0]
    torch.testing.assert_close(total, p.detach(), rtol=1e-5, atol=1e-5)
    assert steps == 6


def _launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of kernels, in the order of their launches."""
    found: list[str] = []

    class Counted:
        def __init__(self, name: str, function: Any) -> None:
            self.name, self.function = name, function

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            found.append(self.name)
            return self.function[grid]

    for name in ("sums_kernel", "means_kernel", "direction_kernel", "moments_kernel"):
        monkeypatch.setattr(launch.kernel, name, Counted(name, getattr(launch.kernel, name)))
    return found


def test_the_number_of_launches_does_not_depend_on_that_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the kernel of moments is compiled before the first direction: it must not fail in the middle of a step."""
    problem, accept = Problem(), torch.ones(TILES, dtype=torch.bool)
    monkeypatch.setattr(launch, "_COMPILED", set())
    found = _launches(monkeypatch)
    before = problem.state()
    problem.direction("triton")
    assert found == ["moments_kernel", "sums_kernel", "means_kernel", "direction_kernel"]
    assert all(
        torch.equal(x, y) for new, old in zip(problem.state(), before, strict=True) for x, y in zip(new, old, strict=True)
    )
    found.clear()
    problem.direction("triton")
    lists = problem.rotated, problem.means, problem.squares
    ops.adam_moments(*lists, problem.steps, accept, problem.options, backend="triton")
    assert found == ["sums_kernel", "means_kernel", "direction_kernel", "moments_kernel"]


def test_tiles_at_any_address_and_of_any_width_are_served() -> None:
    """Copies are not wide then; the results are the same."""
    torch.manual_seed(0)
    m, n = 5, 7
    memory = torch.randn(4, m * n + 1)
    r, mean, square, out = (x[1:].view(1, m, n) for x in memory)
    square.abs_()
    numbers = torch.zeros(1), torch.tensor([[0.3, 0.4]]), torch.tensor([OPTIONS[0]], dtype=torch.float64)
    right = _direction(r[0].tolist(), mean[0].tolist(), square[0].tolist(), 0.0, numbers[1][0].tolist(), OPTIONS[0])
    ops.adam_direction([r], [mean], [square], [out], *numbers, [(m, n)], backend="triton")
    torch.testing.assert_close(out[0].double(), right, rtol=3e-6, atol=1e-6)
    twins = mean.clone(), square.clone(), torch.zeros(1)
    for moments, backend in (((mean, square, numbers[0]), "triton"), (twins, "torch")):
        x, y, steps = moments
        ops.adam_moments([r], [x], [y], steps, torch.tensor([True]), numbers[2], backend=backend)
    for one, other in zip((mean, square, numbers[0]), twins, strict=True):
        torch.testing.assert_close(one, other)


def test_what_the_kernel_cannot_read_is_left_to_the_reference() -> None:
    for change, message in (
        ({"rotated": [torch.randn(2, 48, 16).mT, *Problem().rotated[1:]]}, r"stacks\[0\] is not a contiguous"),
        ({"noise": torch.tensor(NOISE).double()}, "noise is torch.float64"),
        ({"options": torch.tensor(OPTIONS, dtype=torch.float64).mT.contiguous().mT}, "options is not contiguous"),
    ):
        problem = Problem()
        vars(problem).update(change)
        with pytest.raises(ValueError, match=message):
            problem.direction("triton")
        m, n = SIZES[0]
        torch.testing.assert_close(problem.direction("auto")[0][:m, :n].double(), problem.right(0), rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("means", [torch.zeros(2, 16, 48)], "means must have 3 stacks"),
        ("squares", [torch.zeros(shape, dtype=torch.float64) for shape in STACKS], r"squares\[0\] must have shape"),
        ("rotated", [torch.zeros(shape).half() for shape in STACKS], r"rotated\[0\] must be float32 or float64"),
        (
            "rotated",
            [torch.zeros(2, 16, 48), torch.zeros(3, 32, 16).double(), torch.zeros(1, 48, 32)],
            r"rotated\[1\] must have",
        ),
        ("steps", torch.zeros(5), r"steps must have shape \(6,\)"),
        ("steps", torch.zeros(TILES, dtype=torch.int64), "steps must be float32"),
        ("noise", torch.zeros(TILES), r"noise must have shape \(6, 2\)"),
        ("noise", torch.zeros(TILES, 2).half(), "noise must be float32"),
        ("options", torch.zeros(TILES, 4), "options must be float64"),
        ("sizes", SIZES[1:], "sizes must have an entry for each of 6 tiles"),
        ("sizes", [(17, 35), *SIZES[1:]], r"sizes\[0\] must fit a tile of 16 x 48, but is 17 x 35"),
        ("sizes", [(0, 35), *SIZES[1:]], r"sizes\[0\] must fit"),
    ],
)
def test_arguments_are_checked(name: str, wrong: Any, message: str) -> None:
    problem = Problem()
    arguments = {key: getattr(problem, key) for key in ("rotated", "means", "squares", "out", "steps", "noise", "options")}
    with pytest.raises(ValueError, match=message):
        ops.adam_direction(**arguments | {"sizes": SIZES, name: wrong})
    assert all(x.isnan().all() for x in problem.out)


def test_outputs_and_flags_are_checked() -> None:
    problem = Problem()
    lists, numbers = (problem.rotated, problem.means, problem.squares), (problem.steps, problem.noise, problem.options)
    for taken in lists:
        with pytest.raises(ValueError, match=r"out\[1\] must not be one of"):
            ops.adam_direction(*lists, [problem.out[0], taken[1], problem.out[2]], *numbers, SIZES)
    for accept, message in ((torch.ones(5).bool(), "accept must have shape"), (torch.ones(TILES), "accept must be bool")):
        with pytest.raises(ValueError, match=message):
            ops.adam_moments(*lists, problem.steps, accept, problem.options)


@both_backends
def test_nothing_is_a_problem_without_tiles(backend: str) -> None:
    none, options = torch.zeros(0), torch.zeros(0, 4, dtype=torch.float64)
    ops.adam_direction([], [], [], [], none, torch.zeros(0, 2), options, [], backend=backend)
    ops.adam_moments([], [], [], none, none.bool(), options, backend=backend)
    empty = [torch.zeros(0, 16, 16)]
    ops.adam_direction(empty, empty, empty, empty, none, torch.zeros(0, 2), options, [], backend=backend)
