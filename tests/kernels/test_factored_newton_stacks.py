"""One call of the warm refresh for stacks of several sizes: as if each were alone, and in as many launches as one takes."""

from __future__ import annotations

import os
import re

os.environ.setdefault("TRITON_INTERPRET", "1")

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.launches import counted_launches
from support.refreshes import exact_root, with_condition
from torch import Tensor

from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.kernels import ops, precision
from kfac_triton.kernels.certificate import damped
from kfac_triton.kernels.factored_newton import launch as factored_newton_launch
from kfac_triton.kernels.factored_newton import tables

# The interpreter computes with numpy, which remarks on numbers that overflow; a GPU does not.
pytestmark = [
    pytest.mark.usefixtures("scratch_is_nan"),
    pytest.mark.filterwarnings("ignore:overflow|invalid value|All-NaN:RuntimeWarning"),
]
both_modes = pytest.mark.parametrize("mode", ["ieee", "tf32"])
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
OLD = 0.25  # residual before a refresh
CPU = torch.device("cpu")


@dataclass
class Stack:
    """A stack, the roots that its refresh starts from, and what is kept of each matrix."""

    factor: Tensor
    damping: Tensor
    root: Tensor
    residual: Tensor = field(init=False)
    used: Tensor = field(init=False)
    fallbacks: Tensor = field(init=False)
    refused: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.factor)
        self.residual, self.used = torch.full((count,), OLD), torch.arange(count) + 0.5
        self.fallbacks, self.refused = torch.arange(count), torch.ones(count, dtype=torch.bool)

    def copy(self) -> Stack:
        copy = Stack(self.factor, self.damping, self.root.clone())
        copy.residual.copy_(self.residual)
        return copy

    def written(self) -> tuple[Tensor, ...]:
        return self.root, self.residual, self.used, self.fallbacks, self.refused


def stack(n: int, *changes: float) -> Stack:
    """A matrix for each change: the factor was so many times as large when its root was computed, in half of its directions."""
    count = len(changes)
    factor = torch.stack([with_condition(n, 10.0 ** (1 + i % 3)) for i in range(count)])
    damping = torch.linspace(1, 2, count, dtype=torch.float64)
    half = torch.ones(n, dtype=torch.float64)
    half[: n // 2] = 0
    before = factor + (torch.tensor(changes, dtype=torch.float64) - 1)[:, None, None] * torch.diag(half)
    return Stack(factor.float(), damping.float(), exact_root(damped(before, damping)).float())


def refresh(
    stacks: list[Stack],
    mode: str = "ieee",
    accept: float | None = ACCEPT,
    steps: int = 4,
    backend: str = "triton",
    tolerance: float = 0.05,
) -> list[Stack]:
    """The stacks after one call; inputs stay as they are."""
    results = [x.copy() for x in stacks]
    kept = [[x.used for x in results], [x.fallbacks for x in results], [x.refused for x in results]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "resolve", lambda purpose, target: mode)
        ops.factored_newton_refresh(
            [x.factor for x in results], [x.damping for x in results], [x.root for x in results],
            [x.residual for x in results], tolerance, steps, accept, *(kept if accept is not None else ()), backend=backend,
        )  # fmt: skip
    return results


def same(first: Stack, second: Stack) -> bool:
    pairs = zip(first.written(), second.written(), strict=True)
    return all(torch.equal(x.nan_to_num(nan=7.0), y.nan_to_num(nan=7.0)) for x, y in pairs)


@both_modes
@pytest.mark.parametrize("accept", [None, ACCEPT])
def test_a_call_for_all_is_a_call_for_each(mode: str, accept: float | None) -> None:
    """To the last bit, whatever the others need: some of these wait for the power iteration, some take one step, some four."""
    stacks = [stack(48, 1.01, 50.0), stack(70, 1.5), stack(80, 4.0), stack(34, 1e6, 1.0)]
    together = refresh(stacks, mode, accept)
    assert all(same(one, *refresh([x], mode, accept)) for one, x in zip(together, stacks, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_all_of_them_are_the_reference(steps: int) -> None:
    """Near and far, with the power iteration and with the bound on the scale in later steps."""
    stacks = [stack(70, 1.1, 1e3, 300.0), stack(34, 8.0, 1e5)]
    for one, other in zip(refresh(stacks, "ieee", None, steps), refresh(stacks, "ieee", None, steps, "torch"), strict=True):
        unit = other.root.abs().amax((-2, -1), keepdim=True)
        torch.testing.assert_close(one.root / unit, other.root / unit, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(one.residual, other.residual, rtol=1e-2, atol=1e-4)


@both_modes
def test_which_stack_comes_first_makes_no_difference(mode: str) -> None:
    stacks = [stack(48, 1.5), stack(80, 1.2, 30.0), stack(48, 3.0)]
    assert all(map(same, refresh(stacks, mode), refresh(stacks[::-1], mode)[::-1]))


@backends
@both_modes
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_refused_keeps_its_root_bit_for_bit(backend: str, mode: str, steps: int) -> None:
    """And its residual and damping; of the others all is new."""
    stacks = [stack(48, 1.1, 1e6), stack(70, 1e6), stack(34, 1.0, 1e6, 1.05)]
    stacks[2].factor[0, 3, 5] = torch.nan
    expected = [[False, True], [True], [True, True, False]]
    plain = refresh(stacks, mode, None, steps, backend)
    for before, after, free, flags in zip(stacks, refresh(stacks, mode, ACCEPT, steps, backend), plain, expected, strict=True):
        refused = torch.tensor(flags)
        assert torch.equal(after.refused, refused)
        assert torch.equal(after.fallbacks, before.fallbacks + refused)
        assert torch.equal(after.root[refused], before.root[refused])
        assert torch.equal(after.residual[refused], before.residual[refused])
        assert torch.equal(after.used[refused], before.used[refused])
        assert torch.equal(after.root[~refused], free.root[~refused])
        assert torch.equal(after.residual[~refused], free.residual[~refused])
        assert torch.equal(after.used[~refused], before.damping[~refused])
        assert (free.residual[refused] > ACCEPT).all()


@backends
def test_nothing_is_refused_before_the_last_step(backend: str) -> None:
    """Above the bound after one step, and far below it after four."""
    stacks = [stack(48, 4.0)]
    (first,), (last,), (free,) = (refresh(stacks, "tf32", *rest, backend) for rest in ((ACCEPT, 1), (ACCEPT, 4), (None, 4)))
    assert first.refused.all()
    assert torch.equal(last.root, free.root)
    assert torch.equal(last.residual, free.residual)
    assert not last.refused.any()


@backends
def test_the_bound_itself_is_accepted(backend: str) -> None:
    stacks = [stack(48, 1.2)]
    (free,) = refresh(stacks, accept=None, steps=1, backend=backend)
    bound = float(free.residual)
    assert [float(x.refused) for x in refresh(stacks, accept=bound, steps=1, backend=backend)] == [0.0]
    assert [float(x.refused) for x in refresh(stacks, accept=0.999 * bound, steps=1, backend=backend)] == [1.0]


@both_modes
@pytest.mark.parametrize("where", ["factor", "damping", "root"])
def test_what_is_not_finite_harms_no_other_stack(where: str, mode: str) -> None:
    stacks = [stack(48, 1.2, 1.1), stack(70, 1.3)]
    clean = refresh(stacks, mode)
    for i, bad in enumerate((torch.nan, torch.inf)):
        {"factor": stacks[0].factor[i], "damping": stacks[0].damping[i], "root": stacks[0].root[i]}[where].fill_(bad)
    stacks[0].root.tril_()
    first, second = refresh(stacks, mode)
    assert first.refused.all()
    torch.testing.assert_close(first.root, stacks[0].root, rtol=0, atol=0, equal_nan=True)
    assert same(second, clean[1])


@both_modes
def test_parts_of_wider_stacks_beside_others(mode: str) -> None:
    """Neither the pad nor the matrices between are read or written, and an unaligned stack leaves aligned ones alone."""
    n, pad = 34, 5
    inner, other = stack(n, 1.2, 1e6), stack(48, 1.3)
    expected = refresh([inner, other], mode)
    wide_factor, wide_root = torch.full((4, n + pad, n + pad), torch.nan), torch.full((3, n + pad, n + pad + 3), torch.nan)
    wide_factor[::2, :n, :n], wide_root[1:, :n, :n] = inner.factor, inner.root
    result = Stack(wide_factor[::2, :n, :n], torch.stack([inner.damping, inner.damping], 1)[:, 0], wide_root[1:, :n, :n])
    copies = other.copy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "resolve", lambda purpose, target: mode)
        lists = [[x, y] for x, y in zip(vars(result).values(), vars(copies).values(), strict=True)]
        ops.factored_newton_refresh(*lists[:4], 0.05, 4, ACCEPT, *lists[4:], backend="triton")
    assert same(result, expected[0])
    assert same(copies, expected[1])
    wide_root[1:, :n, :n] = torch.nan
    assert wide_root.isnan().all()


@pytest.mark.parametrize("sizes", [(48,), (48, 32, 64, 80, 1104), (16, 32, 48, 64, 80, 96, 112)])
@pytest.mark.parametrize("steps", [1, 4])
def test_launches_depend_on_the_steps_alone(sizes: tuple[int, ...], steps: int) -> None:
    """Not on how many stacks there are, nor on their sizes."""
    zeros = [torch.zeros(2, n, n) for n in sizes]
    stacks = [Stack(x, torch.ones(2), x.clone()) for x in zeros]
    with counted_launches() as counts:
        refresh(stacks, steps=steps)
    each = dict.fromkeys(("factor_kernel", "energy_kernel", "plan_kernel", "update_kernel"), steps)
    assert counts == {"prepare_kernel": 1, "grow_kernel": 6, "conclude_kernel": 1} | each
    assert steps != 4 or sum(counts.values()) == 24


def test_empty_stacks_are_left_out() -> None:
    full, empty = stack(48, 1.2), Stack(torch.zeros(0, 20, 20), torch.zeros(0), torch.zeros(0, 20, 20))
    assert same(refresh([empty, full, empty])[1], *refresh([full]))
    with counted_launches() as counts:
        refresh([empty, empty])
        refresh([])
    assert not counts


@pytest.mark.parametrize(
    ("factor", "root", "expected"),
    [
        ((2, 48, 48), (2, 48, 48), True),
        ((2, 40, 40), (2, 40, 40), False),
        ((2, 48, 56), (2, 48, 48), False),
        ((2, 48, 48), (2, 48, 56), False),
    ],
)
def test_what_counts_as_aligned(factor: tuple[int, ...], root: tuple[int, ...], expected: bool) -> None:
    """Kernels copy 16 bytes at a time there: a wrong hint would be an invalid access on a GPU, and is none here."""
    stacks = [torch.zeros(shape)[..., : factor[1]] for shape in (factor, root)]
    assert tables.is_aligned(*stacks) == expected
    shifted = torch.zeros(2 * 48 * 48 + 1)[1:].view(2, 48, 48)
    assert not tables.is_aligned(torch.zeros(2, 48, 48), shifted)
    assert not tables.is_aligned(shifted, torch.zeros(2, 48, 48))
    assert not tables.is_aligned(
        torch.zeros(2 * 48 * 48 + 8).as_strided((2, 48, 48), (48 * 48 + 8, 48, 1)), torch.zeros(2, 48, 48)
    )


def test_tables_are_made_once() -> None:
    stacks = [stack(48, 1.2), stack(64, 1.1, 1.2)]
    shapes = tables.shapes_of([x.factor for x in stacks])
    first = tables.programs(shapes, 16, "energy", CPU)
    assert tables.programs(shapes, 16, "energy", CPU) is first


def test_the_same_memory_may_hold_stacks_of_other_strides() -> None:
    """Addresses are in the key of the table of stacks, and strides, too."""
    one = stack(48, 1.1, 1.2)
    (expected,), kept = refresh([one]), one.copy()
    buffers = [torch.empty(2 * 64 * 64) for _ in range(2)]
    for is_part in (False, True, False):
        views = [x.view(2, 64, 64)[:, :48, :48] if is_part else x[: 2 * 48 * 48].view(2, 48, 48) for x in buffers]
        for view, values in zip(views, (one.factor, one.root), strict=True):
            view.copy_(values)
        ops.factored_newton_refresh(
            [views[0]], [kept.damping], [views[1]], [kept.residual.fill_(OLD)], 0.05, 4, ACCEPT, [kept.used], [kept.fallbacks],
            [kept.refused], backend="triton",
        )  # fmt: skip
        assert torch.equal(views[1], expected.root)


@pytest.mark.parametrize("order", ["factor", "energy", "update"])
def test_every_tile_has_one_program_and_the_longest_come_first(order: str) -> None:
    rows = tables.programs(((2, 100), (3, 33)), 16, order, CPU).tolist()
    wanted = {
        (s, m, i, j) for s, (b, t) in enumerate(((2, 7), (3, 3))) for m in range(b) for i in range(t) for j in range(i + 1)
    }
    assert len(rows) == len(wanted)
    assert set(map(tuple, rows)) == wanted
    lengths = [{"factor": i, "energy": j, "update": i - j}[order] for _, _, i, j in rows]
    assert lengths == sorted(lengths, reverse=True)


def test_parts_of_the_scratch_memory_do_not_overlap() -> None:
    shapes = ((2, 100), (3, 33), (1, 16))
    layout = tables.layout(shapes, 16, 64, 6, True, True)
    starts = [start for places in layout.places for start in places]
    assert starts == sorted(starts)
    assert all(start % 16 == 0 for start in starts)
    assert starts[0] >= tables.STATE * 6
    matrix = 100 * 112
    assert [b - a for a, b in zip(layout.places[0], layout.places[0][1:], strict=False)][:5] == [2 * matrix] * 5
    assert layout.size >= starts[-1] + 6 * 16


def usable(**changes: Any) -> dict[str, Any]:
    arguments = {
        "factors": [torch.eye(6)[None]] * 2,
        "dampings": [torch.ones(1)] * 2,
        "roots": [torch.eye(6)[None], torch.eye(6)[None]],
        "residuals": [torch.ones(1), torch.ones(1)],
    }
    for name, value in changes.items():
        arguments[name] = [arguments[name][0], value] if name in arguments and isinstance(value, Tensor) else value
    return arguments


KEPT = {
    "accept": ACCEPT,
    "used": [torch.ones(1), torch.ones(1)],
    "fallbacks": [torch.zeros(1, dtype=torch.long)] * 2,
    "refused": [torch.zeros(1, dtype=torch.bool)] * 2,
}


def test_the_calls_that_the_refusals_vary_are_fine() -> None:
    ops.factored_newton_refresh(**usable(), backend="triton")
    ops.factored_newton_refresh(**usable(**KEPT), backend="triton")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({name: [x.double() for x in value] for name, value in usable().items()}, r"factors\[0\] is torch.float64"),
        ({"factors": torch.eye(12)[None, ::2, ::2]}, r"factors\[1\] has columns 2 elements apart"),
        ({"roots": torch.eye(6).as_strided((1, 6, 6), (36, 1, 6))}, r"roots\[1\] has columns 6 elements apart"),
        (
            {name: [x.expand(2, *x.shape[1:]) for x in value] for name, value in usable().items()}
            | {"residuals": [torch.ones(4)[::2]] * 2},
            r"residuals\[0\] has gaps",
        ),
        ({name: [x[:, :0, :0] for x in usable()[name]] for name in ("factors", "roots")}, r"factors\[0\] are empty"),
        (
            {"factors": [torch.empty_strided((1, 6, 6), (0, 2**29, 1), device="meta")] * 2},
            r"factors\[0\] has matrices with more",
        ),
    ],
)
def test_what_the_kernel_cannot_serve_is_said(changes: dict[str, Any], reason: str) -> None:
    arguments = usable(**changes)
    assert re.search(reason, str(factored_newton_launch.can_use(**arguments, tolerance=0.05, max_steps=8)))
    if not arguments["factors"][0].is_meta:
        with pytest.raises(ValueError, match=reason):
            ops.factored_newton_refresh(**arguments, backend="triton")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"roots": [torch.eye(6)[None]]}, "roots"),
        ({"residuals": []}, "residuals"),
        ({"accept": ACCEPT}, "refused"),
        ({"used": KEPT["used"]}, "used"),
        (KEPT | {"max_steps": 0}, "max_steps"),
        (KEPT | {"refused": [torch.zeros(1)] * 2}, r"refused\[0\]"),
        (KEPT | {"fallbacks": [torch.zeros(1)] * 2}, r"fallbacks\[0\]"),
        (KEPT | {"used": [torch.ones(1), torch.ones(2)]}, r"used\[1\]"),
        ({"factors": torch.eye(6, dtype=torch.float64)[None]}, r"factors\[1\]"),
        ({"factors": torch.eye(6, device="meta")[None]}, r"factors\[1\]"),
        ({"factors": torch.eye(6)}, r"factors\[1\]"),
        ({name: [x.bfloat16() for x in value] for name, value in usable().items()}, r"factors\[0\]"),
        ({"roots": torch.eye(7)[None]}, r"roots\[1\]"),
        ({"dampings": torch.ones(2)}, r"dampings\[1\]"),
        ({"residuals": torch.ones(1, 1)}, r"residuals\[1\]"),
    ],
)
def test_refusals_name_the_argument(changes: dict[str, Any], named: str) -> None:
    arguments = usable(**changes)
    before = [x.clone() for x in (*arguments["roots"], *arguments["residuals"])]
    with pytest.raises(ValueError, match=named):
        ops.factored_newton_refresh(**arguments)
    assert all(map(torch.equal, before, (*arguments["roots"], *arguments["residuals"])))
