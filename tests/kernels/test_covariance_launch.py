"""How the covariance launcher groups layers and shares out their rows, and how much it launches."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.launches import counted_launches

from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance import kernel
from kfac_triton.kernels.covariance import launch as covariance_launch
from kfac_triton.kernels.covariance.plan import programs_of


@settings(max_examples=200, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 400)), min_size=1, max_size=5),
    borders=st.lists(st.booleans(), min_size=5, max_size=5),
    block=st.sampled_from([16, 32, 128]),
    block_k=st.sampled_from([16, 64]),
    programs=st.sampled_from([1, 8, 264]),
)
def test_every_row_of_every_tile_is_summed_once(
    sizes: list[tuple[int, int]], borders: list[bool], block: int, block_k: int, programs: int
) -> None:
    indices, flags = range(10, 10 + len(sizes)), borders[: len(sizes)]
    rows, columns = zip(*sizes, strict=True)
    tiles, reductions, slots = programs_of(rows, columns, flags, indices, block, block_k, programs)
    shares: dict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for index, i, j, first, last, slot, *_ in tiles:
        shares[index, i, j].append((first, last, slot))
    wanted = set()
    for index, (_, n), border in zip(indices, sizes, flags, strict=True):
        side = -(-n // block)
        wanted |= {(index, i, j) for i in range(side) for j in range(i + 1)}
        if border:
            wanted |= {(index, i, kernel.BORDER) for i in range(-(-(n + 1) // block))}
    assert shares.keys() == wanted
    reduced = {(index, i, j): range(first, last) for index, i, j, first, last, *_ in reductions}
    used = []
    for key, parts in shares.items():
        parts.sort()
        assert [first for first, _, _ in parts] == [0, *(last for _, last, _ in parts[:-1])]
        assert parts[-1][1] == sizes[key[0] - 10][0]
        assert all(first % block_k == 0 or first == last for first, last, _ in parts)
        if len(parts) == 1:
            assert parts[0][2] == kernel.DIRECT
            assert key not in reduced
        else:
            used += [slot for _, _, slot in parts]
            assert list(reduced[key]) == [slot for _, _, slot in parts]  # summed in the order of the rows
    assert sorted(used) == list(range(slots))


@pytest.mark.parametrize("layers", [1, 7, 50])
def test_one_launch_serves_any_number_of_layers(layers: int) -> None:
    """And a second one where rows are shared out, because a few tiles would not fill a device."""
    for rows, kernels in ((20, {"covariance_kernel": 1}), (4000, {"covariance_kernel": 1, "covariance_reduce_kernel": 1})):
        factors = [torch.zeros(16, 16) for _ in range(layers if rows == 20 else 1)]
        inputs = [torch.ones(rows, 16) for _ in factors]
        ones = torch.ones(len(factors))
        with counted_launches() as counts:
            ops.covariance_ema(factors, inputs, ones, ones, [False] * len(factors), [ops.ROWS] * len(factors), backend="triton")
        assert counts == kernels


def test_layers_of_different_kinds_are_launched_apart() -> None:
    inputs = [torch.ones(4, 16), torch.ones(4, 15), torch.ones(4, 16).bfloat16(), torch.ones(2, 4, 3, 3)]
    factors = [torch.zeros(16, 16) for _ in inputs]
    windows = [ops.ROWS, ops.ROWS, ops.ROWS, ops.window((2, 2))]
    ones = torch.ones(4)
    with counted_launches(run=True) as counts:
        ops.covariance_ema(factors, inputs, ones, ones, [False] * 4, windows, backend="triton")
    assert counts["covariance_kernel"] == 4
    expected = [torch.zeros(16, 16) for _ in inputs]
    ops.covariance_ema(expected, inputs, ones, ones, [False] * 4, windows, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(factors, expected, strict=True))


def test_results_are_the_same_every_time() -> None:
    """Shares are summed in a fixed order: not one bit depends on which program is done first."""
    x, results = torch.randn(900, 40), []
    for _ in range(3):
        factor = torch.zeros(48, 48)
        ops.covariance_ema([factor], [x], torch.ones(1), torch.zeros(1), [True], [ops.ROWS], backend="triton")
        results.append(factor)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("shift", [0, 1, 4])
def test_misaligned_rows_are_read_as_they_are(shift: int) -> None:
    """A view that does not start at a multiple of 16 bytes must not be copied 16 bytes at a time."""
    x = torch.randint(-3, 4, (1, 20 * 16 + 8)).float().flatten()[shift : shift + 20 * 16].view(20, 16)
    factor = torch.zeros(16, 16)
    (group,) = covariance_launch.look_at([factor], [x], torch.ones(1), torch.ones(1), [False], []).plan.groups
    assert (group.layout.width > 1) == (x.data_ptr() % 16 == 0 and factor.data_ptr() % 16 == 0)
    ops.covariance_ema([factor], [x], torch.ones(1), torch.zeros(1), [False], [ops.ROWS], backend="triton")
    assert torch.equal(factor, x.T @ x)


@pytest.mark.parametrize(
    ("factor", "source", "message"),
    [
        (torch.zeros(4, 4).double(), torch.zeros(2, 4), r"factors\[0\] is torch.float64"),
        (torch.zeros(4, 4), torch.zeros(2, 4).double(), r"inputs\[0\] is torch.float64"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(2, 4), r"factors\[0\] has columns 2 elements apart"),
    ],
)
def test_what_the_kernel_cannot_do_is_said(factor: torch.Tensor, source: torch.Tensor, message: str) -> None:
    arguments = ([factor], [source], torch.ones(1), torch.ones(1), [False], [ops.ROWS])
    with pytest.raises(ValueError, match=message):
        ops.covariance_ema(*arguments, backend="triton")
