"""Sums of squares and stacked gradients over lists of tensors, both backends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton.kernels import ops, tiles
from kfac_triton.kernels.multi_tensor import launch, reference

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])
examples = settings(max_examples=30, deadline=None)
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1,), (7,), (1024,), (1025,), (3, 5), (40, 60), (2, 3, 4, 5), (0, 4), (2, 0, 3)]


@both_backends
@examples
@given(st.lists(st.tuples(st.sampled_from(SHAPES), st.sampled_from(TYPES)), min_size=1, max_size=5), st.integers(0, 2**32))
def test_squares_of_integers_are_exact(backend: str, parts: list[tuple[tuple[int, ...], torch.dtype]], seed: int) -> None:
    torch.manual_seed(seed)
    inputs = [torch.randint(-3, 4, shape).to(dtype) for shape, dtype in parts]
    out = torch.full((len(inputs),), torch.nan)
    ops.squares(inputs, out, backend=backend)
    assert out.tolist() == [float(x.double().square().sum()) for x in inputs]


@both_backends
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 1e25])
@pytest.mark.parametrize("at", [0, 1500, 2999])
def test_squares_are_not_finite_when_something_is_not(backend: str, bad: float, at: int) -> None:
    """Nor when the square of something is not; and only there."""
    inputs = [torch.randn(3000) for _ in range(3)]
    inputs[1][at] = bad
    out = torch.zeros(3)
    ops.squares(inputs, out, backend=backend)
    assert out.isfinite().tolist() == [True, False, True]


@both_backends
@pytest.mark.parametrize("order", ["transposed", "channels last"])
def test_squares_of_dense_tensors_in_any_order(backend: str, order: str) -> None:
    x = torch.randint(-3, 4, (2, 3, 4, 5)).float()
    source = (
        x.transpose(0, 3).contiguous().transpose(0, 3) if order == "transposed" else x.to(memory_format=torch.channels_last)
    )
    out = torch.zeros(1)
    ops.squares([source], out, backend=backend)
    assert out == x.square().sum()


def test_squares_in_shares_of_several_turns_and_at_odd_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact on integers; the same numbers each time; what is between the last whole vector and the end counts, too."""
    monkeypatch.setattr(launch, "_SQUARES_BLOCK", 64)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 3)
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 3)
    inputs = [torch.randint(-3, 4, (n,)).to(dtype)[offset:] for n in (0, 5, 64, 1001) for dtype in TYPES for offset in (0, 3)]
    expected = [float(x.double().square().sum()) for x in inputs]
    for last in (None, torch.nan):
        if last is not None:
            inputs[-1][-1] = inputs[-2][-1] = last
        out = torch.full((len(inputs),), torch.nan)
        ops.squares(inputs, out, backend="triton")
        assert out[:-2].tolist() == expected[:-2]
    assert out[-2:].isnan().all()
    random = [torch.randn(3000)]
    first, second = torch.zeros(1), torch.zeros(1)
    ops.squares(random, first, backend="triton")
    ops.squares(random, second, backend="triton")
    assert torch.equal(first, second)


def test_squares_of_tensors_with_gaps_are_left_to_the_reference() -> None:
    gaps, out = torch.ones(4, 6)[:, ::2], torch.zeros(1)
    with pytest.raises(ValueError, match=r"inputs\[0\] .* has gaps; use 'auto' or 'torch'"):
        ops.squares([gaps], out, backend="triton")
    ops.squares([gaps], out)
    assert out == 12


def _averages(sides: list[int], vectors: list[int], offset: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """Stacks of two factors each, then single vectors, of integers; and their sums. An offset makes addresses odd."""

    def one(shape: tuple[int, ...]) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.randint(-3, 4, (count + offset,)).float()[offset:].view(shape)

    shapes = [*((2, side, side) for side in sides), *((size,) for size in vectors)]
    return [one(shape) for shape in shapes], [one(shape) for shape in shapes]


def _matrices(stacks: list[Tensor]) -> list[Tensor]:
    return [matrix for stack in stacks for matrix in (stack if stack.dim() > 1 else stack[None])]


@both_backends
@pytest.mark.parametrize("offset", [0, 1])
def test_blend_is_exact_on_integers_and_powers_of_two(backend: str, offset: int) -> None:
    """Several sizes at once. A refused factor changes nothing, nor does its sum; one without a sum is only copied there."""
    factors, sums = _averages([40, 3, 64, 1], [7, 2000], offset)
    count = len(_matrices(factors))
    before, totals = ([x.clone() for x in _matrices(stacks)] for stacks in (factors, sums))
    keep, gain = 0.5 ** torch.arange(count).double(), 2.0 ** -torch.arange(count).double()
    keep[0] = 0
    accept, summed = torch.arange(count) % 3 != 1, torch.arange(count) % 4 != 3
    for total, accepted, has_sum in zip(_matrices(sums), accept, summed, strict=True):
        if not (accepted and has_sum):
            total.fill_(torch.nan)
    old = torch.zeros(count, dtype=torch.bool)
    ops.blend(factors, sums, keep, gain, accept, summed, old, backend=backend)
    assert torch.equal(old, accept)
    assert {(bool(x), bool(y)) for x, y in zip(accept, summed, strict=True)} == {(x, y) for x in (0, 1) for y in (0, 1)}
    for i, (factor, total) in enumerate(zip(_matrices(factors), _matrices(sums), strict=True)):
        moves = accept[i] and summed[i]
        assert torch.equal(factor, keep[i].float() * before[i] + gain[i].float() * totals[i] if moves else before[i]), i
        assert torch.equal(total, before[i]) if accept[i] else total.isnan().all() or torch.equal(total, totals[i])


def test_a_share_of_a_factor_is_longer_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are more blocks than programs."""
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 2)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 2)
    factors, sums = _averages([100], [7])
    expected = [2 * x + y for x, y in zip(factors, sums, strict=True)]
    before = [x.clone() for x in factors]
    flags, ones = torch.ones(3, dtype=torch.bool), torch.ones(3)
    ops.blend(factors, sums, 2 * ones, ones, flags, flags, torch.zeros_like(flags), backend="triton")
    assert all(torch.equal(x, y) for x, y in zip((*factors, *sums), (*expected, *before), strict=True))


@both_backends
@pytest.mark.parametrize("vector", ["keep", "gain", "accept", "summed", "old"])
def test_blend_reads_each_vector_at_the_factors_place(backend: str, vector: str) -> None:
    factors, sums = (_averages([4], [5])[0] for _ in range(2))
    flags = torch.ones(3, dtype=torch.bool)
    vectors = {"keep": torch.ones(3), "gain": torch.ones(3), "accept": flags, "summed": flags, "old": ~flags}
    if vector == "old":
        vectors["accept"] = torch.tensor([True, True, False])
    else:
        vectors[vector] = torch.tensor([1, 1, 0]).to(vectors[vector].dtype)
    before, totals = factors[1].clone(), sums[1].clone()
    ops.blend(factors, sums, **vectors, backend=backend)
    moved = {"keep": totals, "gain": before, "accept": before, "summed": before, "old": before}[vector]
    assert torch.equal(factors[1], moved)
    assert vectors["old"].tolist() == [True, True, vector not in ("accept", "old")]


@pytest.mark.parametrize("argument", ["keep", "gain", "accept", "summed", "old", "sums"])
def test_blend_refuses_what_does_not_fit(argument: str) -> None:
    stack, flags = torch.zeros(2, 3, 3), torch.ones(2).bool()
    vectors = {"keep": torch.ones(2), "gain": torch.ones(2), "accept": flags, "summed": flags, "old": flags}
    arguments = {"sums": [stack.clone()], **vectors}
    arguments[argument] = [stack[:1]] if argument == "sums" else arguments[argument][:1]
    with pytest.raises(ValueError, match=f"{argument}(.0.)? must have shape"):
        ops.blend([stack], **arguments)


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (torch.zeros(2, 3, 3, dtype=torch.float64), r"factors\[0\] is torch.float64"),
        (torch.zeros(2, 3, 6)[:, :, ::2], r"factors\[0\] is not contiguous"),
    ],
)
def test_blend_leaves_to_the_reference_what_the_kernel_cannot_read(factor: Tensor, message: str) -> None:
    ones, flags = torch.ones(2), torch.ones(2, dtype=torch.bool)
    arguments = ([factor], [torch.ones_like(factor)], ones, ones, flags, flags)
    with pytest.raises(ValueError, match=message):
        ops.blend(*arguments, ~flags, backend="triton")
    ops.blend(*arguments, ~flags)
    assert (factor == 1).all()


class Interrupted(TorchDispatchMode):
    """Raises before the at-th operator, once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.left = at

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return func(*args, **(kwargs or {}))


def test_an_interrupted_average_keeps_the_old_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each factor they are as a whole where `old` says, in the factor or in the sum, before whichever operator it comes."""
    monkeypatch.setattr(reference, "_STRIPE", 12)
    interrupts = 0
    while True:
        torch.manual_seed(0)
        factors, sums = _averages([5, 7], [30])
        count = len(_matrices(factors))
        before, accept = [x.clone() for x in _matrices(factors)], torch.arange(count) != 1
        expected = [(0.5 * x + 0.25 * y if i != 1 else x) for i, (x, y) in enumerate(zip(before, _matrices(sums), strict=True))]
        old = torch.zeros(count, dtype=torch.bool)
        weights = torch.full((count,), 0.5), torch.full((count,), 0.25)
        try:
            with Interrupted(interrupts + 1):
                reference.blend_reference(factors, sums, *weights, accept, torch.ones(count, dtype=torch.bool), old)
            break
        except KeyboardInterrupt:
            interrupts += 1
        for factor, total, is_old, x in zip(_matrices(factors), _matrices(sums), old, before, strict=True):
            assert torch.equal(total if is_old else factor, x), interrupts
    assert interrupts > 50
    assert all(torch.equal(x, y) for x, y in zip(_matrices(factors), expected, strict=True))
    assert torch.equal(old, accept)


def test_the_reference_on_another_device_is_that_on_a_cpu() -> None:
    """There the flags of a stack are not read by the host."""
    for stack in (0, 1):
        found = []
        for blend in (reference._blend_one_by_one, reference._blend_together):
            torch.manual_seed(0)
            factors, sums = _averages([5], [6])
            pair = [x if x.dim() > 1 else x[None] for x in (factors[stack], sums[stack])]
            accept, summed = (torch.tensor(flags[: len(pair[0])]) for flags in ([True, False], [stack == 0, True]))
            old = torch.zeros_like(accept)
            vectors = (torch.full((len(old),), 0.5), torch.full((len(old),), 0.25))
            blend(*pair, *vectors, accept, summed, old)
            found.append([*pair, old])
        assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@both_backends
def test_traces_of_matrices_and_of_diagonals(backend: str) -> None:
    """What is not on a diagonal is not read."""
    factors, _ = _averages([40, 3, 1, 1100], [7, 2000])
    out = torch.full((len(_matrices(factors)),), torch.nan)
    expected = [float(x.trace() if x.dim() > 1 else x.sum()) for x in _matrices(factors)]
    for stack in factors[:4]:
        for matrix in stack:
            matrix[~torch.eye(len(matrix), dtype=torch.bool)] = torch.nan
    ops.traces(factors, out, backend=backend)
    assert out.tolist() == expected
    factors[0][1, 39, 39] = torch.inf
    ops.traces(factors, out, backend=backend)
    assert out.isfinite().tolist() == [i != 1 for i in range(len(expected))]


@both_backends
def test_a_vector_of_many_diagonals_is_as_many_vectors(backend: str) -> None:
    """Sizes and addresses are in the key of what is remembered: the same vector may be divided otherwise."""
    vector, total, stack = torch.arange(30.0), torch.arange(30.0).neg(), torch.eye(3)[None]
    for sizes in ([4, 16, 10], [1, 29], [30]):
        traces = torch.full((len(sizes) + 1,), torch.nan)
        ops.traces([stack, vector], traces, sizes, backend=backend)
        assert traces.tolist() == [3, *(float(x.sum()) for x in vector.split(sizes))]
        factors, sums = [stack.clone(), vector.clone()], [stack.clone(), total.clone()]
        keep, gain = torch.arange(len(sizes) + 1.0), torch.ones(len(sizes) + 1)
        accept, old = torch.arange(len(sizes) + 1) != 1, torch.zeros(len(sizes) + 1, dtype=torch.bool)
        ops.blend(factors, sums, keep, gain, accept, torch.ones_like(accept), old, sizes, backend=backend)
        assert torch.equal(factors[0], stack)
        for i, (x, saved) in enumerate(zip(factors[1].split(sizes), sums[1].split(sizes), strict=True), 1):
            before, added = vector.split(sizes)[i - 1], total.split(sizes)[i - 1]
            assert torch.equal(x, i * before + added if accept[i] else before)
            assert torch.equal(saved, before if accept[i] else added)
        assert torch.equal(old, accept)


@pytest.mark.parametrize("sizes", [[3], [2, 4], [6], [0, 5], [5, 5]])
def test_sizes_of_diagonals_divide_the_vectors(sizes: list[int]) -> None:
    ones, flags = torch.ones(3), torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"sizes must divide vectors of \[5\] numbers"):
        ops.traces([torch.ones(5)], ones, sizes)
    with pytest.raises(ValueError, match=r"sizes must divide vectors of \[5\] numbers"):
        ops.blend([torch.ones(5)], [torch.ones(5)], ones, ones, flags, flags, ~flags, sizes)


def test_traces_refuse_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="out must have shape"):
        ops.traces([torch.zeros(2, 3, 3)], torch.zeros(1))
    with pytest.raises(ValueError, match=r"stacks\[0\] is torch.float64"):
        ops.traces([torch.zeros(2, 3, 3).double()], torch.zeros(2).double(), backend="triton")


def _tensors(seed: int) -> list[Tensor]:
    """All types and layouts, some of them longer than all shares of a kernel."""
    torch.manual_seed(seed)
    shapes = [(), (1,), (3, 5), (0, 4), (40, 60), (20000,), (2, 3, 4, 5)]
    kinds = [*TYPES, torch.float64, torch.complex64]
    tensors = [torch.randn(shape, dtype=torch.float64).to(kind) for shape in shapes for kind in kinds]
    return [*tensors, torch.randn(4, 6).T, torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)]


@both_backends
@pytest.mark.parametrize("rounds", [1, 2])
def test_restore_copies_what_is_not_finite_and_touches_nothing_else(backend: str, rounds: int) -> None:
    """Bit for bit, a NaN and a negative zero, too; one flag serves a tensor of each round."""
    moved = [x for seed in range(rounds) for x in _tensors(seed)]
    kept = [x.clone() for seed in range(rounds) for x in _tensors(seed + 10)]
    for x in kept:
        if x.dim() and len(x):
            x[0] = torch.nan if x.dim() == 2 else -0.0
    before = [x.clone() for x in moved]
    finite = torch.arange(len(moved) // rounds) % 3 != 1
    ops.restore(moved, kept, finite, backend=backend)
    for i, (new, old, copy) in enumerate(zip(moved, before, kept, strict=True)):
        expected = old if finite[i % len(finite)] else copy
        assert torch.equal(*(torch.view_as_real(x) if x.is_complex() else x.signbit() for x in (new, expected))), i
        torch.testing.assert_close(new, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("tensors", "kept", "message"),
    [
        ([torch.zeros(3, dtype=torch.complex128)] * 2, None, r"tensors\[0\] is torch.complex128"),
        ([torch.ones(4, 6)[:, ::2]], None, r"tensors\[0\] has gaps"),
        ([torch.ones(4, 6)], [torch.ones(6, 4).T], r"other strides than its copy"),
    ],
)
def test_restore_leaves_to_the_reference_what_the_kernel_cannot_copy(
    tensors: list[Tensor], kept: list[Tensor] | None, message: str
) -> None:
    copies = [x.clone() + 1 for x in tensors] if kept is None else kept
    with pytest.raises(ValueError, match=message):
        ops.restore(tensors, copies, torch.tensor([False]), backend="triton")
    ops.restore(tensors, copies, torch.tensor([False]))
    assert all(torch.equal(x, copy) for x, copy in zip(tensors, copies, strict=True))


@pytest.mark.parametrize(
    ("tensors", "kept", "finite"),
    [
        ([torch.ones(2)], [], torch.tensor([True])),
        ([torch.ones(2)], [torch.ones(2)], torch.tensor(True)),
        ([torch.ones(2)], [torch.ones(2)], torch.tensor([1.0])),
        ([torch.ones(2)], [torch.ones(3)], torch.tensor([True])),
        ([torch.ones(2)], [torch.ones(2).double()], torch.tensor([True])),
        ([torch.ones(2)], [torch.ones(2)], torch.zeros(0, dtype=torch.bool)),
        ([torch.ones(2)] * 3, [torch.ones(2)] * 3, torch.tensor([True, False])),
        ([torch.ones(2, device="meta")], [torch.ones(2, device="meta")], torch.tensor([True])),
    ],
)
def test_restore_refuses_what_does_not_fit(tensors: list[Tensor], kept: list[Tensor], finite: Tensor) -> None:
    with pytest.raises(ValueError, match=r"finite must hold flags|kept\[0\] must have shape|flags must divide|must be on cpu"):
        ops.restore(tensors, kept, finite)
