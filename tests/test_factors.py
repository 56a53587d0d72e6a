"""FactorBank: where factors live, and their moving average."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_triton.factors import ALIGNMENT, BlockSize, FactorBank, padded

CPU = torch.device("cpu")


def _bank(sizes: list[tuple[int, int]], dtype: torch.dtype = torch.float64) -> FactorBank:
    return FactorBank([BlockSize(a, g, dtype, CPU) for a, g in sizes])


SIZES = [(5, 3), (20, 17), (17, 20), (5, 3), (33, 5), (16, 16), (20, 30)]


@pytest.mark.parametrize(("size", "side"), [(1, 16), (16, 16), (17, 32), (785, 800)])
def test_padding(size: int, side: int) -> None:
    assert padded(size) == side
    assert side % ALIGNMENT == 0


def test_every_factor_has_its_own_place_in_the_stack_of_its_size() -> None:
    bank = _bank(SIZES)
    for number, (a_size, g_size) in enumerate(SIZES):
        a, g = bank.block(number)
        assert a.shape == (a_size, a_size)
        assert g.shape == (g_size, g_size)
        a.fill_(2 * number + 1)
        g.fill_(2 * number + 2)
    for number in range(len(SIZES)):
        a, g = bank.block(number)
        assert (a == 2 * number + 1).all()
        assert (g == 2 * number + 2).all()
    assert len({stack.factors.shape[-1] for stack in bank.stacks}) == len(bank.stacks)
    assert sum(len(stack) for stack in bank.stacks) == 2 * len(SIZES)


def test_groups_are_runs_of_their_stacks_in_the_order_of_their_blocks() -> None:
    bank = _bank(SIZES)
    for number in range(len(SIZES)):
        a, g = bank.block(number)
        a.fill_(number)
        g.fill_(-number)
    seen: list[int] = []
    for group in bank.groups:
        seen += group.blocks
        for stack, run, sign in ((group.a_stack, group.a_run, 1), (group.g_stack, group.g_run, -1)):
            assert bank.stacks[stack].factors[run, 0, 0].tolist() == [sign * i for i in group.blocks]
    assert sorted(seen) == list(range(len(SIZES)))


def test_precisions_do_not_share_a_stack() -> None:
    bank = FactorBank([BlockSize(5, 5, torch.float32, CPU), BlockSize(5, 5, torch.float64, CPU)])
    assert sorted(str(stack.factors.dtype) for stack in bank.stacks) == ["torch.float32", "torch.float64"]


def _padded_square(size: int) -> Tensor:
    out = torch.zeros(padded(size), padded(size), dtype=torch.float64)
    rows = torch.randn(4, size, dtype=torch.float64)
    out[:size, :size] = rows.T @ rows
    return out


@pytest.mark.parametrize("blend", ["host", "device"])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.95])
def test_moving_average_with_skipped_updates(decay: float, blend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each factor is the mean of what it accepted, weighted by decay to the power of its age in accepted updates."""
    if blend == "device":
        import kfac_triton.factors as module

        monkeypatch.setattr(module, "_blend_on_host", module._blend_on_device)
    sizes = [(5, 3), (20, 17)]
    bank = _bank(sizes)
    accepted: list[list[Tensor]] = [[] for _ in range(4)]  # A and G of both blocks
    for step in range(6):
        a_sums, g_sums = [_padded_square(a) for a, _ in sizes], [_padded_square(g) for _, g in sizes]
        scale = torch.rand(4, dtype=torch.float64) + 0.5
        accept = torch.tensor([step != 2, True, step % 2 == 0, step != 0])
        for i, block in enumerate(range(2)):
            for j, sums in enumerate((a_sums, g_sums)):
                slot = int((bank.a_slots, bank.g_slots)[j][block])
                if accept[slot]:
                    accepted[2 * i + j].append(scale[slot] * sums[block])
                else:
                    sums[block] = torch.full_like(sums[block], torch.nan)
        bank.update(a_sums, g_sums, scale, accept, decay)
    for i, block in enumerate(range(2)):
        for j, factor in enumerate(bank.block(block)):
            values = accepted[2 * i + j]
            weights = [decay ** (len(values) - 1 - age) for age in range(len(values))]
            mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
            torch.testing.assert_close(factor, mean[: len(factor), : len(factor)])
            assert int(bank.updates[(bank.a_slots, bank.g_slots)[j][block]]) == len(values)
    for stack in bank.stacks:
        for size, factor in zip(stack.sizes, stack.factors, strict=True):
            assert (factor[size:] == 0).all()
            assert (factor[:, size:] == 0).all()


def test_traces_and_scatter_use_slot_numbers() -> None:
    bank = _bank(SIZES)
    for number in range(len(SIZES)):
        for side, factor in enumerate(bank.block(number)):
            factor.fill_diagonal_(10.0 * number + side)
    expected_a = torch.tensor([a * 10.0 * i for i, (a, _) in enumerate(SIZES)], dtype=torch.float64)
    expected_g = torch.tensor([g * (10.0 * i + 1) for i, (_, g) in enumerate(SIZES)], dtype=torch.float64)
    traces = bank.traces()
    torch.testing.assert_close(traces[bank.a_slots], expected_a)
    torch.testing.assert_close(bank.scatter(expected_a, expected_g), traces)
    assert [run.stop - run.start for run in bank.runs()] == [len(stack) for stack in bank.stacks]
