"""FactorBank: which factor lies where, and the bias-corrected moving average."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.curvature.factor_bank import FactorBank
from kfac_triton.curvature.factor_stack import ALIGNMENT, padded
from kfac_triton.layers.partition import FactorSpec

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BlockSize:
    """A layer's factors: sides of A and G, in one precision."""

    a: int
    g: int
    dtype: torch.dtype
    device: torch.device

    def specs(self) -> list[FactorSpec]:
        return [FactorSpec(size, self.dtype, self.device) for size in (self.a, self.g)]


class Bank(FactorBank):
    """A bank whose tiles share no factor."""

    def __init__(self, blocks: list[BlockSize]) -> None:
        super().__init__([s for b in blocks for s in b.specs()], [(2 * i, 2 * i + 1) for i in range(len(blocks))])
        self.a_slots, self.g_slots = torch.tensor(self.slots[::2]), torch.tensor(self.slots[1::2])

    def block(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(self.slots[2 * index]), self.view(self.slots[2 * index + 1])

    def scatter(self, a_values: Tensor, g_values: Tensor) -> Tensor:
        out = a_values.new_empty(len(self.updates))
        out[self.a_slots], out[self.g_slots] = a_values, g_values
        return out


block_sizes = st.builds(
    BlockSize,
    a=st.integers(1, 40),
    g=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    device=st.just(CPU),
)
blocks_of_a_model = st.lists(block_sizes, min_size=1, max_size=12)


@given(st.integers(1, 10_000))
def test_padded_is_the_next_multiple(size: int) -> None:
    side = padded(size)
    assert side % ALIGNMENT == 0
    assert size <= side < size + ALIGNMENT


@settings(deadline=None)
@given(blocks_of_a_model)
def test_every_factor_has_a_slot_of_its_own(blocks: list[BlockSize]) -> None:
    """Slots are numbered through all stacks; a view has the factor's size and writes to the stack, and only there."""
    bank = Bank(blocks)
    slots = bank.a_slots.tolist() + bank.g_slots.tolist()
    assert sorted(slots) == list(range(2 * len(blocks)))
    assert bank.sizes[bank.a_slots].tolist() == [b.a for b in blocks]
    assert bank.sizes[bank.g_slots].tolist() == [b.g for b in blocks]
    for slot in slots:
        bank.view(slot).fill_(slot + 1)
    for index, block in enumerate(blocks):
        pair = bank.block(index)
        for view, slot, size in zip(pair, (bank.a_slots[index], bank.g_slots[index]), (block.a, block.g), strict=True):
            assert view.shape == (size, size)
            assert view.dtype == block.dtype
            assert (view == slot + 1).all()
    for stack, run in zip(bank.stacks, bank.runs(), strict=True):
        for factor, size, slot in zip(stack.factors, stack.sizes, range(run.start, run.stop), strict=True):
            assert factor.sum() == (slot + 1) * size**2  # the pad is still zero


@settings(deadline=None)
@given(blocks_of_a_model)
def test_stacks_hold_one_padded_size_and_type_each(blocks: list[BlockSize]) -> None:
    bank = Bank(blocks)
    kinds = [(s.factors.shape[1], s.factors.shape[2], s.factors.dtype) for s in bank.stacks]
    assert len(set(kinds)) == len(kinds)
    assert set(kinds) == {(padded(n), padded(n), b.dtype) for b in blocks for n in (b.a, b.g)}
    assert all(padded(size) == stack.factors.shape[1] for stack in bank.stacks for size in stack.sizes)
    assert [len(stack) for stack in bank.stacks] == [len(stack.factors) for stack in bank.stacks]
    runs = bank.runs()
    assert [run.stop - run.start for run in runs] == [len(stack) for stack in bank.stacks]
    assert [slot for run in runs for slot in range(run.start, run.stop)] == list(range(2 * len(blocks)))


@settings(deadline=None)
@given(blocks_of_a_model)
def test_groups_are_contiguous_runs_of_two_stacks(blocks: list[BlockSize]) -> None:
    """One launch a group: the k-th block of a group has the k-th factor of both runs."""
    bank = Bank(blocks)
    assert sorted(i for group in bank.groups for i in group.tiles) == list(range(len(blocks)))
    shapes = {(padded(b.g), padded(b.a), b.dtype) for b in blocks}
    assert len(bank.groups) == len(shapes)
    starts = [run.start for run in bank.runs()]
    for group in bank.groups:
        assert len({(padded(blocks[i].g), padded(blocks[i].a), blocks[i].dtype) for i in group.tiles}) == 1
        for slots, side in ((bank.a_slots, group.a), (bank.g_slots, group.g)):
            assert side.run is not None
            expected = [starts[side.store] + i for i in range(side.run.start, side.run.stop)]
            assert slots[list(group.tiles)].tolist() == expected


@settings(deadline=None)
@given(blocks_of_a_model, st.integers(0, 2**32))
def test_traces_go_by_slot(blocks: list[BlockSize], seed: int) -> None:
    torch.manual_seed(seed)
    bank = Bank(blocks)
    for stack in bank.stacks:
        for factor, size in zip(stack.factors, stack.sizes, strict=True):
            factor[:size, :size] = torch.randint(-3, 4, (size, size))
    traces = bank.traces()
    a_values, g_values = torch.randn(len(blocks)), torch.randn(len(blocks))
    values = bank.scatter(a_values, g_values)
    for index in range(len(blocks)):
        for factor, slot, value in zip(
            bank.block(index), (bank.a_slots[index], bank.g_slots[index]), (a_values[index], g_values[index]), strict=True
        ):
            assert traces[slot] == factor.trace()
            assert values[slot] == value


def test_two_types_do_not_share_a_stack() -> None:
    bank = Bank([BlockSize(5, 5, torch.float32, CPU), BlockSize(5, 5, torch.float64, CPU)])
    assert [len(s) for s in bank.stacks] == [2, 2]
    assert len(bank.groups) == 2


def sums_of(blocks: list[BlockSize]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums in the padded size, zero in the pad."""

    def one(size: int, dtype: torch.dtype) -> Tensor:
        total = torch.zeros(padded(size), padded(size), dtype=dtype)
        total[:size, :size] = torch.randn(size, size, dtype=dtype)
        return total

    return [one(b.a, b.dtype) for b in blocks], [one(b.g, b.dtype) for b in blocks]


def update(bank: Bank, a_sums: list[Tensor], g_sums: list[Tensor], scale: Tensor, accept: Tensor, decay: float) -> None:
    """One step of the moving average from sums that backward passes would have left in the bank."""
    for i, (a, g) in enumerate(zip(a_sums, g_sums, strict=True)):
        for place, value in zip((bank.sum_of(bank.slots[2 * i]), bank.sum_of(bank.slots[2 * i + 1])), (a, g), strict=True):
            place.copy_(value)
    rate = bank.weights(accept, decay)
    bank.blend(1 - rate, rate * scale, accept, torch.ones_like(accept))


@settings(max_examples=50, deadline=None)
@given(
    decay=st.sampled_from([0.0, 0.5, 0.95, 0.999]) | st.floats(0, 0.999),
    schedule=st.lists(st.tuples(*[st.booleans()] * 3), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_the_moving_average_is_the_weighted_mean(decay: float, schedule: list[tuple[bool, ...]], seed: int) -> None:
    """The sum of decay^(t-i) x_i over that of decay^(t-i), i over the accepted updates alone; what is skipped may be NaN."""
    torch.manual_seed(seed)
    blocks = [BlockSize(3, 5, torch.float64, CPU), BlockSize(17, 5, torch.float64, CPU), BlockSize(3, 5, torch.float64, CPU)]
    bank = Bank(blocks)
    scale = bank.scatter(torch.tensor([0.5, 2.0, 0.1]).double(), torch.tensor([3.0, 0.25, 7.0]).double())
    history: list[list[tuple[Tensor, Tensor]]] = [[], [], []]
    for flags in schedule:
        a_sums, g_sums = sums_of(blocks)
        for i, flag in enumerate(flags):
            if flag:
                history[i].append((a_sums[i].clone(), g_sums[i].clone()))
            else:
                a_sums[i].fill_(torch.nan)
                g_sums[i].fill_(torch.inf)
        accept = torch.tensor(flags)
        update(bank, a_sums, g_sums, scale, bank.scatter(accept, accept), decay)
    for i, block in enumerate(blocks):
        weights = [decay ** (len(history[i]) - 1 - j) for j in range(len(history[i]))]
        for side, slot, size in ((0, bank.a_slots[i], block.a), (1, bank.g_slots[i], block.g)):
            truth = sum((w * pair[side] for w, pair in zip(weights, history[i], strict=True)), torch.zeros(()).double())
            truth = (scale[slot] * truth / max(math.fsum(weights), 1e-300)).expand(padded(size), padded(size))
            run = bank.runs()
            stack = next(k for k, r in enumerate(run) if r.start <= slot < r.stop)
            stored = bank.stacks[stack].factors[int(slot) - run[stack].start]
            torch.testing.assert_close(stored, truth, rtol=1e-10, atol=1e-12)
            assert (stored[size:] == 0).all()
            assert (stored[:, size:] == 0).all()
            assert bank.updates[slot] == len(history[i])


def test_the_first_update_is_the_sum_itself() -> None:
    """Bias correction: no trace of the zeros that the average starts from."""
    blocks = [BlockSize(4, 3, torch.float64, CPU)]
    bank = Bank(blocks)
    a_sums, g_sums = sums_of(blocks)
    update(bank, a_sums, g_sums, torch.ones(2).double(), torch.tensor([True, True]), 0.95)
    a, g = bank.block(0)
    assert torch.equal(a, a_sums[0][:4, :4])
    assert torch.equal(g, g_sums[0][:3, :3])
