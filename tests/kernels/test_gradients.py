"""Gradients into stacks, updates out of them, inner products and the KL clip: both backends, several types and layouts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.kernels import ops, tiles
from kfac_triton.kernels.gradients import launch
from kfac_triton.kernels.gradients.layout import Layout, Piece

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])
examples = settings(max_examples=12, deadline=None)
TYPES = [torch.float32, torch.bfloat16, torch.float16]
STACKS = [(2, 16, 32), (1, 20, 35), (1, 5, 1), (1, 1, 9)]


@pytest.fixture(autouse=True)
def _many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles and few programs, so that small matrices take several turns of a program."""
    monkeypatch.setattr(launch, "_BLOCK_M", 8)
    monkeypatch.setattr(launch, "_BLOCK_N", 16)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 2)


def _stacks(value: float = torch.nan) -> list[Tensor]:
    return [torch.full(shape, value) for shape in STACKS]


def _tensor(kind: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, int, tuple[int, int]]:
    """A tensor that contains a matrix, the offset of it, and its strides: as it is, transposed, or a part of another."""
    if kind == "turned":
        return torch.randn(columns, rows).to(dtype), 0, (1, rows)
    if kind == "part":
        return torch.randn(rows + 2, columns + 3).to(dtype), columns + 5, (columns + 3, 1)
    return torch.randn(rows, columns).to(dtype), 0, (columns, 1)


@st.composite
def _problem(draw: st.DrawFn) -> tuple[list[Tensor], Layout]:
    """Tensors and the places of their pieces: none, one or two in a matrix, two side by side or one below the other."""
    tensors, pieces, flag = [], [], 0
    for stack, (count, m, n) in enumerate(STACKS):
        for matrix in range(count):
            dtype, flag = draw(st.sampled_from(TYPES)), flag + 1
            rows, columns = draw(st.integers(1, m)), draw(st.integers(1, n))
            places = [(0, 0, rows, columns)]
            if draw(st.booleans()) and columns < n:
                places.append((0, columns, rows, 1))
            elif rows < m:
                places.append((rows, 0, draw(st.integers(1, m - rows)), columns))
            for row, column, height, width in places if draw(st.integers(0, 4)) else []:
                tensor, offset, strides = _tensor(draw(st.sampled_from(["plain", "turned", "part"])), height, width, dtype)
                where = (len(tensors), offset, strides, (height, width), stack, matrix, (row, column), flag - 1)
                pieces.append(Piece(*where))
                tensors.append(tensor)
    return tensors, Layout(pieces)


@both_backends
@examples
@given(_problem(), st.integers(0, 2**32))
def test_gather_is_a_copy_and_zero_elsewhere(backend: str, problem: tuple[list[Tensor], Layout], seed: int) -> None:
    gradients, layout = problem
    torch.manual_seed(seed)
    stacks, expected = _stacks(), _stacks(0.0)
    for piece in layout.pieces:
        (row, column), (rows, columns), x = piece.corner, piece.shape, gradients[piece.tensor]
        source = x.flatten()[piece.offset :]
        for i in range(rows):
            for j in range(columns):
                expected[piece.stack][piece.matrix, row + i, column + j] = source[i * piece.strides[0] + j * piece.strides[1]]
    ops.gather(stacks, gradients, layout, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(stacks, expected, strict=True))
    assert all(torch.equal(x.signbit(), y.signbit()) for x, y in zip(stacks, expected, strict=True))


def test_gather_reads_the_gradients_of_now_and_of_their_types() -> None:
    """A layout is used for many steps: neither addresses nor types are remembered."""
    layout = Layout([Piece(0, 0, (3, 1), (2, 3), 0, 0, (0, 0)), Piece(1, 0, (1, 1), (2, 1), 0, 0, (0, 3))])
    for dtype in (torch.float32, torch.float32, torch.bfloat16):
        gradients, stack = [torch.randn(2, 3).to(dtype), torch.randn(2).to(dtype)], torch.full((1, 4, 5), torch.nan)
        ops.gather([stack], gradients, layout, backend="triton")
        assert torch.equal(stack[0, :2, :4], torch.cat([gradients[0], gradients[1][:, None]], 1).float())
        assert stack[0, 2:].count_nonzero() == stack[0, :, 4:].count_nonzero() == 0


def test_a_nan_and_a_negative_zero_are_copied_where_they_are() -> None:
    first, second = torch.tensor([[-0.0, torch.nan]]), torch.tensor([torch.inf, -0.0])
    layout = Layout([Piece(0, 0, (2, 1), (1, 2), 0, 0, (0, 0)), Piece(1, 0, (1, 1), (2, 1), 0, 0, (0, 2))])
    stack = torch.ones(1, 2, 3)
    ops.gather([stack], [first, second], layout, backend="triton")
    assert stack.isnan().tolist() == [[[False, True, False], [False] * 3]]
    assert stack[0, 0, 2] == torch.inf
    assert stack.signbit()[0, :, [0, 2]].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(
    ("gradients", "stack", "message"),
    [
        ([torch.ones(2), torch.ones(2).half()], torch.zeros(1, 2, 9), r"matrix 0 of stacks\[0\] have different types"),
        ([torch.ones(2)] * 3, torch.zeros(1, 2, 9), "more than two pieces"),
        ([torch.ones(2).double()] * 2, torch.zeros(1, 2, 9), r"gradients\[0\] is torch.float64"),
        ([torch.ones(2)] * 2, torch.zeros(1, 2, 9).double(), r"stacks\[0\] is not a contiguous float32 stack"),
    ],
)
def test_gather_leaves_to_the_reference_what_the_kernel_cannot_read(
    gradients: list[Tensor], stack: Tensor, message: str
) -> None:
    layout = Layout([Piece(i, 0, (1, 1), (2, 1), 0, 0, (0, 2 * i)) for i in range(len(gradients))])
    with pytest.raises(ValueError, match=message):
        ops.gather([stack], gradients, layout, backend="triton")
    ops.gather([stack], gradients, layout)
    assert stack.sum() == 2 * len(gradients)


@both_backends
@examples
@given(_problem(), st.integers(0, 2**32))
def test_scatter_scales_and_writes_nothing_else(backend: str, problem: tuple[list[Tensor], Layout], seed: int) -> None:
    """Where the flag is set zero is written, even if the matrix is NaN."""
    updates, layout = problem
    torch.manual_seed(seed)
    stacks, scale = [torch.randn(shape) for shape in STACKS], torch.tensor(0.37)
    zeros = torch.rand(sum(map(len, stacks))) < 0.4
    for stack, flags in zip(stacks, zeros.split([len(x) for x in stacks]), strict=True):
        stack[flags] = torch.nan
    expected = [x.clone() for x in updates]
    for piece in layout.pieces:
        (row, column), (rows, columns) = piece.corner, piece.shape
        block = stacks[piece.stack][piece.matrix, row : row + rows, column : column + columns] * scale
        target = expected[piece.tensor].view(-1).as_strided(piece.shape, piece.strides, piece.offset)
        target.copy_(torch.zeros(()) if zeros[piece.flag] else block)
    ops.scatter(stacks, updates, scale, zeros, layout, backend=backend)
    for x, y in zip(updates, expected, strict=True):
        cuts = x.dtype == torch.bfloat16 and backend == "triton"  # the interpreter does, where a GPU rounds
        torch.testing.assert_close(x, y, rtol=2**-7 if cuts else 0, atol=0)


@both_backends
def test_scatter_may_scale_a_stack_in_place(backend: str) -> None:
    stack = torch.randn(2, 20, 18)
    expected = torch.stack([0.5 * stack[0], torch.zeros(20, 18)])
    layout = Layout([Piece(0, 360 * i, (18, 1), (20, 18), 0, i, (0, 0), i) for i in range(2)])
    ops.scatter([stack], [stack], torch.tensor(0.5), torch.tensor([False, True]), layout, backend=backend)
    assert torch.equal(stack, expected)


def test_scatter_refuses_what_does_not_fit() -> None:
    stack, layout = torch.zeros(1, 2, 2), Layout([Piece(1, 0, (1, 1), (1, 1), 0, 0, (0, 0))])
    one, flags = torch.ones(()), torch.zeros(1, dtype=torch.bool)
    for updates, scale, zeros, message in (
        ([one], one, flags, r"pieces of updates\[1\], but there are 1"),
        ([one, one], torch.ones(1), flags, "scale must be a scalar"),
        ([one, one], one, torch.zeros(2).bool(), "zeros must have shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.scatter([stack], updates, scale, zeros, layout)
    for updates, scale, message in (([one, one.double()], one, r"updates\[1\] is"), ([one, one], one.double(), "scale is")):
        with pytest.raises(ValueError, match=message):
            ops.scatter([stack], updates, scale, flags, layout, backend="triton")


@both_backends
@pytest.mark.parametrize("shapes", [[(3, 16, 32), (2, 4, 700)], [(2, 3, 5), (1, 40, 60)]], ids=["aligned", "odd"])
def test_inner_products_of_integers_are_exact(backend: str, shapes: list[tuple[int, int, int]]) -> None:
    gradients, updates = ([torch.randint(-3, 4, shape).float() for shape in shapes] for _ in range(2))
    count = sum(map(len, gradients))
    out = torch.full((3, count), torch.nan)
    ops.inner(gradients, updates, out, backend=backend)
    pairs = [(w, v) for stacks in zip(gradients, updates, strict=True) for w, v in zip(*stacks, strict=True)]
    assert out.T.tolist() == [[float((v * w).sum()), float((w * w).sum()), float((v * v).sum())] for w, v in pairs]
    updates[0][1, -1, -1] = torch.nan
    ops.inner(gradients, updates, out, backend=backend)
    assert out.isnan().tolist() == [[i == 1 for i in range(count)], [False] * count, [i == 1 for i in range(count)]]


def test_inner_refuses_what_does_not_fit() -> None:
    stack = torch.zeros(2, 3, 3)
    for arguments in (
        ([stack], [], torch.zeros(3, 2)),
        ([stack], [stack[:1]], torch.zeros(3, 2)),
        ([stack], [stack], stack[0]),
    ):
        with pytest.raises(ValueError, match=r"stacks of gradients|updates\[0\] must have|out must have"):
            ops.inner(*arguments)


def _clip(
    backend: str, products: Tensor, rates: Tensor, members: list[list[int]], kl_clip: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    most = max(map(len, members))
    table = torch.tensor([row + [-1] * (most - len(row)) for row in members], dtype=torch.int32)
    places = torch.arange(len(products)).flip(0)
    scale, dropped = torch.full((), torch.nan), torch.full((len(products) + 1,), 5)
    finite, zeros = torch.zeros(len(members), dtype=torch.bool), torch.ones(len(products), dtype=torch.bool)
    ops.clip(products, rates, table, places, kl_clip, scale, finite, zeros, dropped, backend=backend)
    return scale, finite, zeros, dropped - 5


@both_backends
@examples
@given(
    sizes=st.lists(st.integers(1, 70) | st.just(1), min_size=1, max_size=40),
    bad=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([torch.nan, torch.inf, -torch.inf])), max_size=3),
    kl_clip=st.sampled_from([None, 1e-3, 1.0]),
    seed=st.integers(0, 2**32),
)
def test_clip_against_its_formula(
    backend: str, sizes: list[int], bad: list[tuple[int, float]], kl_clip: float | None, seed: int
) -> None:
    """A weight with a matrix that is not finite takes no part, and all of its matrices are to be zero."""
    torch.manual_seed(seed)
    count = sum(sizes)
    products, rates = torch.rand(count), torch.rand(len(sizes))
    for place, value in bad:
        products[place % count] = value
    members = [x.tolist() for x in torch.randperm(count).split(sizes)]
    scale, finite, zeros, dropped = _clip(backend, products, rates, members, kl_clip)
    broken = ~products.isfinite()
    good = [not broken[row].any() for row in members]
    assert finite.tolist() == good
    assert zeros.tolist() == [not good[next(w for w, row in enumerate(members) if i in row)] for i in range(count)]
    assert dropped.tolist() == [*broken.flip(0).long().tolist(), 0]
    total = sum(float(rates[w]) ** 2 * float(products[row].double().sum()) for w, row in enumerate(members) if good[w])
    expected = 1.0 if kl_clip is None or total == 0 else min(1.0, math.sqrt(kl_clip / total))
    assert float(scale) == pytest.approx(expected, rel=1e-5)


@both_backends
def test_a_term_that_overflows_is_left_out_and_a_negative_sum_does_not_clip(backend: str) -> None:
    scale, finite, zeros, dropped = _clip(backend, torch.tensor([1e30, 4.0]), torch.tensor([1e10, 1.0]), [[0], [1]], 1.0)
    assert (float(scale), finite.all(), zeros.any(), dropped.any()) == (0.5, True, False, False)
    for products in (torch.tensor([-1.0]), torch.zeros(1)):
        assert _clip(backend, products, torch.ones(1), [[0]], 1e-3)[0] == 1.0


def test_clip_refuses_what_does_not_fit() -> None:
    ones, members = torch.ones(2), torch.tensor([[0], [1]], dtype=torch.int32)
    places, flags, scale = torch.arange(2), torch.zeros(2, dtype=torch.bool), torch.ones(())
    good = [ones, ones, members, places, 1.0, scale, flags, flags, places]
    for place, wrong in ((1, ones[:1]), (2, members.long()), (3, places[:1]), (5, ones), (6, flags[:1]), (7, flags[:1])):
        with pytest.raises(ValueError, match=r"must be|must have"):
            ops.clip(*[wrong if i == place else x for i, x in enumerate(good)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"torch.float64, and the kernel needs float32"):
        ops.clip(ones.double(), *good[1:], backend="triton")  # type: ignore[arg-type]
