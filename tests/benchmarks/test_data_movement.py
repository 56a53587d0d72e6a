"""Counts of benchmarks/kernels/data_movement.py against lists of the operators that PyTorch runs, one by one."""

from __future__ import annotations

import pytest

from benchmarks.kernels import data_movement
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
    cost, moved = data_movement.norms(model), 0
    for _ in range(norm.count):
        for reads, writes in SHARED + rest:
            moved += POSITIONS * WIDTH * (reads + writes)
    assert cost.bytes + cost.scratch == moved
    assert cost.bytes == 3 * POSITIONS * WIDTH * (2 + 2)
    assert cost.launches == 3 * (len(SHARED + rest) + more)  # of examples, what is summed is joined, squared and summed, too
    fused = data_movement.norms(model, fused=True)
    assert (fused.bytes, fused.scratch, fused.launches) == (cost.bytes, 0, 1)


def test_a_norm_without_shift_in_float32() -> None:
    norm = Norm(POSITIONS, WIDTH, shift=False, terms_are_positions=True)
    cost = data_movement.norms(Model("m", "", (), itemsize=4, norms=(norm,)))
    each = [(4, 4), (8, 4), (4, 4), (4, 4), (4, 0)]  # normalized, product, joined with nothing, squared, summed
    assert cost.bytes + cost.scratch == POSITIONS * WIDTH * (4 + 4 + sum(map(sum, each)))


def test_a_model_without_norms_launches_nothing() -> None:
    assert data_movement.norms(autoencoder()).launches == data_movement.norms(autoencoder(), fused=True).launches == 0


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
    cost = data_movement.copies(model)
    assert (cost.bytes, cost.launches) == (moved, launches)
    kept = data_movement.copies(model, in_kernels=True)
    assert (kept.bytes, kept.launches) == (sum(side * side * (4 + 4) for side in (16, 32, 48, 64)), 0)


def test_gradients_and_parameters_one_by_one() -> None:
    model = Model("m", "", (Layer(4, 15, 32, count=2), Layer(4, 16, 16, bias=False)), norms=(Norm(4, 16),))
    stacks = [(4, 4), (4, 4), (4, 4)]  # gathered, scaled, selected
    cost = data_movement.gradients(model)
    assert cost.bytes == (2 * 32 * 16 + 16 * 16) * sum(map(sum, stacks))
    assert cost.launches == 2 * len(stacks)  # shapes times operators
    tensors = [32 * 15, 32, 32 * 15, 32, 16 * 16, 16, 16]
    assert data_movement.parameters(model) == (len(tensors), sum(tensors))
    update = [(4, 4), (8, 4), (4, 4), (8, 4)]  # momentum decays, takes the gradient; is scaled; moves the parameter
    keep = [(4, 4), (4, 4)]  # parameter and momentum
    cost = data_movement.parameter_updates(model)
    assert cost.bytes == sum(tensors) * sum(map(sum, update + keep))
    assert cost.launches == len(update) + len(keep) + 1
    assert data_movement.parameter_updates(model, dense=False).launches == len(update) * len(tensors) + len(keep) + 1
