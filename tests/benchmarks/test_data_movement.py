"""Counts of benchmarks/kernels/data_movement.py against lists of the operators that PyTorch runs, one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.kernels import data_movement
from benchmarks.kernels.cost import Cost
from benchmarks.kernels.shapes import BY_NAME, Layer, Model, Norm, autoencoder

POSITIONS, WIDTH = 12, 8
# (bytes read, bytes written) for each number of the input, bfloat16: what the rows of a norm with scale and shift take.
SHARED = [(2, 4), (2, 4), (4, 4), (8, 4)]  # input and gradient to float32, input normalized, times gradient
BY_POSITION = [(8, 8), (8, 8), (8, 0)]  # both parts joined, squared, summed
BY_EXAMPLE = [(4, 0), (4, 0)]  # each part summed over the positions; its rows are few


@pytest.mark.parametrize(("by_position", "rest", "more"), [(True, BY_POSITION, 0), (False, BY_EXAMPLE, 3)])
def test_norms(by_position: bool, rest: list[tuple[int, int]], more: int) -> None:
    norm = Norm(POSITIONS, WIDTH, count=3, terms_are_positions=by_position)
    model = Model("m", "", (), norms=(norm,))
    cost, moved = data_movement.norms(model, by_pytorch=True), 0
    for _ in range(norm.count):
        for reads, writes in SHARED + rest:
            moved += POSITIONS * WIDTH * (reads + writes)
    assert cost.bytes + cost.scratch == moved
    assert cost.bytes == 3 * POSITIONS * WIDTH * (2 + 2)
    assert cost.launches == 3 * (len(SHARED + rest) + more)  # of examples, what is summed is joined, squared and summed, too
    fused = data_movement.norms(model)
    assert (fused.bytes, fused.scratch, fused.launches) == (cost.bytes, 0, 2)


def test_a_norm_without_shift_in_float32() -> None:
    norm = Norm(POSITIONS, WIDTH, shift=False, terms_are_positions=True)
    cost = data_movement.norms(Model("m", "", (), itemsize=4, norms=(norm,)), by_pytorch=True)
    each = [(4, 4), (8, 4), (4, 4), (4, 4), (4, 0)]  # normalized, product, joined with nothing, squared, summed
    assert cost.bytes + cost.scratch == POSITIONS * WIDTH * (4 + 4 + sum(map(sum, each)))


def test_a_model_without_norms_launches_nothing() -> None:
    for by_pytorch in (False, True):
        assert data_movement.norms(autoencoder(), by_pytorch).launches == 0


def test_norms_of_positions_and_of_channels_have_launches_of_their_own() -> None:
    rows, channels = Norm(POSITIONS, WIDTH, count=2), Norm(POSITIONS, WIDTH, count=3, has_channels=True)
    for norms, launches in (((rows,), 2), ((channels,), 3), ((rows, channels), 5)):
        assert data_movement.norms(Model("m", "", (), norms=norms)).launches == launches


def test_rows_wait_where_they_take_no_more_memory_than_sums() -> None:
    # Sums of 16 x 16 and 32 x 32 take 5,120 bytes; a row of 16 + 32 numbers takes 96 in 16 bits and 192 in 32.
    for itemsize, most in ((2, 53), (4, 26)):
        assert data_movement.is_deferred(Layer(most, 16, 32, bias=False), itemsize)
        assert not data_movement.is_deferred(Layer(most + 1, 16, 32, bias=False), itemsize)
    many, few = BY_NAME["gpt2"].layers[0], Layer(2048, 768, 2304)
    assert data_movement.is_deferred(few, 2) and not data_movement.is_deferred(many, 2)


def test_copies_one_by_one() -> None:
    """A layer whose rows wait, and one whose rows do not, with factors of other sides."""
    model = Model("m", "", (Layer(4, 16, 32, bias=False), Layer(10**4, 48, 64, bias=False)))
    select = [(4, 4), (8, 4), (4, 4)]  # clone, select, copy back
    summed = [(4, 4), (8, 4), (4, 4)]  # clone, blend, copy to the sums' memory
    waiting = [(8, 4)]  # select into the sums' memory
    moved = launches = 0
    for side, factors in ((16, waiting), (32, waiting), (48, summed), (64, summed)):
        for reads, writes in select + factors:
            moved += side * side * (reads + writes)
            launches += 1
    cost = data_movement.blending(model, by_pytorch=True)
    assert (cost.bytes, cost.launches) == (moved, launches)


def test_blending_keeps_old_values_beside_new_ones() -> None:
    layers = (Layer(4, 16, 32, bias=False), Layer(10**4, 48, 64, bias=False))
    copied = (16**2 + 32**2) * (4 + 4)  # factor read, written to the buffer of its sum
    blended = (48**2 + 64**2) * (8 + 8)  # factor and sum read, both written
    assert data_movement.blending(Model("m", "", layers)) == Cost(copied + blended, {}, 1)
    norm = Norm(POSITIONS, WIDTH, count=3)
    with_norms = data_movement.blending(Model("m", "", layers, norms=(norm,)))
    assert with_norms == Cost(copied + blended + 3 * 2 * WIDTH * 16, {}, 2)


def test_gradients_and_parameters_one_by_one() -> None:
    model = Model("m", "", (Layer(4, 15, 32, count=2), Layer(4, 16, 16, bias=False)), norms=(Norm(4, 16),))
    stacks = [(4, 4), (4, 4), (4, 4)]  # gathered, scaled, selected
    cost = data_movement.gradients(model, by_pytorch=True)
    assert cost.bytes == (2 * 32 * 16 + 16 * 16) * sum(map(sum, stacks))
    assert cost.launches == 2 * len(stacks)  # shapes times operators
    # In kernels: gathered, both read for their products, scattered; and the scale.
    assert data_movement.gradients(model) == Cost((2 * 32 * 16 + 16 * 16) * (8 + 8 + 8), {}, 4)
    tensors = [32 * 15, 32, 32 * 15, 32, 16 * 16, 16, 16]
    assert data_movement.parameters(model) == (len(tensors), sum(tensors))
    update = [(4, 4), (8, 4), (4, 4), (8, 4)]  # momentum decays, takes the gradient; is scaled; moves the parameter
    keep = [(4, 4), (4, 4)]  # parameter and momentum
    cost = data_movement.parameter_updates(model, by_pytorch=True)
    assert cost.bytes == sum(tensors) * sum(map(sum, update + keep))
    assert cost.launches == len(update) + len(keep) + 1
    with_gaps = data_movement.parameter_updates(model, by_pytorch=True, dense=False)
    assert with_gaps.launches == len(update) * len(tensors) + len(keep) + 1
    # In one kernel: parameter, gradient and momentum read, parameter and momentum written; and what they are multiplied by.
    assert data_movement.parameter_updates(model) == Cost(sum(tensors) * (12 + 8), {}, 2)


def test_adamw_moves_as_many_numbers_as_its_operators() -> None:
    """PyTorch's multi-tensor operators, listed as they run: each reads its lists of tensors once and writes one of them."""
    moved = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
            nonlocal moved
            lists = [x for x in arguments if isinstance(x, (list, tuple)) and isinstance(x[0], torch.Tensor)]
            if "_foreach_" in str(function) and lists[0][0].dim():  # counters of steps are scalars
                moved += len({x[0].data_ptr() for x in lists}) + 1
            return function(*arguments, **(options or {}))

    parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(2)]
    adamw = torch.optim.AdamW(parameters, foreach=True)
    for p in parameters:
        p.grad = torch.randn_like(p)
    adamw.step()
    with Counting():
        adamw.step()
    assert moved == data_movement.FOREACH_ADAMW_NUMBERS
