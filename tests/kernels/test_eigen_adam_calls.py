"""Moments of Adam in the eigenbasis; launches, and arguments of both operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.adam_tiles import NOISE, OPTIONS, SIZES, STACKS, TILES, Problem, by_formula, tiles_of

from kfac_triton.kernels import ops, tiles
from kfac_triton.kernels.eigen_adam import launch, reference

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch, scratch_is_nan: None) -> None:
    """Small blocks and few programs, so that small tiles take several turns of a program."""
    for name, value in (("_BLOCK_M", 8), ("_BLOCK_N", 16), ("_SPAN", 8), ("_DEPTH", 2), ("_BLOCK", 64)):
        monkeypatch.setattr(launch, name, value)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 2)


ACCEPTED = [True, False, True, True, False, False, True]


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments_are_those_of_the_formula_or_stay(backend: str, dtype: torch.dtype) -> None:
    problem = Problem(dtype)
    for i, accepted in enumerate(ACCEPTED):
        if not accepted:  # and what is not accepted may hold anything
            tiles_of(problem.rotated)[i].fill_(torch.nan)
            tiles_of(problem.means)[i][0], tiles_of(problem.squares)[i][-1] = torch.nan, torch.inf
    before, gradients = problem.state(), [x.clone() for x in tiles_of(problem.rotated)]
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
    matrices = list(zip(tiles_of(other.rotated), tiles_of(other.means), tiles_of(other.squares), strict=True))
    reference._select_accepted(matrices, accept, other.options)
    for x, y in zip([*one.means, *one.squares], [*other.means, *other.squares], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-14, atol=1e-15)


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


def test_the_number_of_launches_does_not_depend_on_that_oftiles_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the kernel of moments is compiled before the first direction: it must not fail in the middle of a step."""
    problem, accept = Problem(), torch.ones(TILES, dtype=torch.bool)
    monkeypatch.setattr(launch, "_COMPILED", set())
    found = _launches(monkeypatch)
    before = [x.clone() for x in (*problem.means, *problem.squares, problem.steps)]
    problem.direction("triton")
    assert found == ["moments_kernel", "sums_kernel", "means_kernel", "direction_kernel"]
    after = *problem.means, *problem.squares, problem.steps
    assert all(torch.equal(x, y) for x, y in zip(after, before, strict=True))
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
    right = by_formula(r[0].tolist(), mean[0].tolist(), square[0].tolist(), 0.0, numbers[1][0].tolist(), OPTIONS[0])
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
        ({"rotated": [torch.randn(3, 48, 16).mT, *Problem().rotated[1:]]}, r"stacks\[0\] is not a contiguous"),
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
        ("rotated", [torch.zeros(STACKS[0]), torch.zeros(STACKS[1]).double(), torch.zeros(2)], r"rotated\[1\] must have"),
        ("rotated", [torch.zeros(2), torch.zeros(2), torch.zeros(2)], r"rotated\[0\] must have shape \(B, rows, columns\)"),
        ("steps", torch.zeros(5), r"steps must have shape \(7,\)"),
        ("steps", torch.zeros(TILES, dtype=torch.int64), "steps must be float32"),
        ("noise", torch.zeros(TILES), r"noise must have shape \(7, 2\)"),
        ("noise", torch.zeros(TILES, 2).half(), "noise must be float32"),
        ("options", torch.zeros(TILES, 4), "options must be float64"),
        ("sizes", SIZES[1:], "sizes must have an entry for each of 7 tiles"),
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
def test_nothing_is_a_problem_withouttiles_of(backend: str) -> None:
    none, options = torch.zeros(0), torch.zeros(0, 4, dtype=torch.float64)
    ops.adam_direction([], [], [], [], none, torch.zeros(0, 2), options, [], backend=backend)
    ops.adam_moments([], [], [], none, none.bool(), options, backend=backend)
    empty = [torch.zeros(0, 16, 16)]
    ops.adam_direction(empty, empty, empty, empty, none, torch.zeros(0, 2), options, [], backend=backend)
