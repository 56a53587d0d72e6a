"""Sums of squares and stacked gradients over lists of tensors, both backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.kernels import ops

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


def test_squares_of_tensors_with_gaps_are_left_to_the_reference() -> None:
    gaps, out = torch.ones(4, 6)[:, ::2], torch.zeros(1)
    with pytest.raises(ValueError, match=r"inputs\[0\] .* has gaps; use 'auto' or 'torch'"):
        ops.squares([gaps], out, backend="triton")
    ops.squares([gaps], out)
    assert out == 12


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Gradients of layers and a stack that holds them, with what must be overwritten in it: NaN."""
    dtype = draw(st.sampled_from(TYPES))
    weights, biases = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(1, 1), (3, 5), (8, 20), (5, 2, 3), (6, 2, 2, 2)]))
        present, has_bias = draw(st.sampled_from([True, True, False])), draw(st.booleans())
        weights.append(torch.randn(shape if present else (0,)).to(dtype))
        biases.append(torch.randn(shape[0] if present and has_bias else 0).to(dtype))
    out = torch.zeros(len(weights), 9, 24)
    for block, weight in zip(out, weights, strict=True):
        if weight.numel():
            block[: weight.shape[0], : weight[0].numel() + 1] = torch.nan
        else:
            block.fill_(torch.nan)
    return weights, biases, out


@both_backends
@examples
@given(layers(), st.integers(0, 2**32))
def test_gather_is_a_copy(backend: str, stack: tuple[list[Tensor], list[Tensor], Tensor], seed: int) -> None:
    torch.manual_seed(seed)
    weights, biases, out = stack
    ops.gather(weights, biases, out, backend=backend)
    expected = torch.zeros_like(out)
    for block, weight, bias in zip(expected, weights, biases, strict=True):
        if weight.numel():
            rows, columns = weight.shape[0], weight[0].numel()
            block[:rows, :columns] = weight.flatten(1)
            if bias.numel():
                block[:rows, columns] = bias
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("weights", "biases", "out", "message"),
    [
        ([torch.ones(3, 4)], [torch.ones(3)], torch.zeros(1, 3, 4), r"weights\[0\] .* must fit a block of shape \(3, 4\)"),
        ([torch.ones(3, 4)], [torch.ones(2)], torch.zeros(1, 8, 8), r"biases\[0\] of shape \(2,\)"),
        ([torch.ones(3, 4)], [], torch.zeros(1, 8, 8), "the same number of layers"),
        ([torch.ones(3, 4)], [torch.ones(3)], torch.zeros(8, 8), "the same number of layers"),
        ([torch.ones(3, 4)], [torch.ones(3)], torch.zeros(1, 8, 8).half(), "out must be float32 or float64"),
    ],
)
def test_gather_refuses_what_does_not_fit(weights: list[Tensor], biases: list[Tensor], out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.gather(weights, biases, out)


@both_backends
def test_blend_is_exact_on_integers_and_powers_of_two(backend: str) -> None:
    """The first update overwrites; a refused one changes nothing, whatever is in the sum."""
    old, total = torch.randint(-3, 4, (4, 40, 40)).float(), torch.randint(-3, 4, (4, 40, 40)).float()
    total[3] = torch.nan
    stack = old.clone()
    keep, gain = torch.tensor([0.5, 0.0, 1.0, 0.5]).double(), torch.tensor([0.25, 2.0, 0.0, 0.5]).double()
    ops.blend(stack, total, keep, gain, torch.tensor([True, True, True, False]), backend=backend)
    assert torch.equal(stack, torch.stack([0.5 * old[0] + 0.25 * total[0], 2 * total[1], old[2], old[3]]))


@pytest.mark.parametrize("argument", ["keep", "gain", "accept", "total"])
def test_blend_refuses_what_does_not_fit(argument: str) -> None:
    stack = torch.zeros(2, 3, 3)
    arguments = {"total": stack.clone(), "keep": torch.ones(2), "gain": torch.ones(2), "accept": torch.ones(2).bool()}
    arguments[argument] = arguments[argument][:1]
    with pytest.raises(ValueError, match=f"{argument} must have shape"):
        ops.blend(stack, **arguments)


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
