"""Tile tables, and rounding to TF32 on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kfac_triton.kernels.runtime import tl, triton
from kfac_triton.kernels.tiles import count, lower_tiles, round_tf32


@pytest.mark.parametrize("tiles", [0, 1, 2, 7, 8, 9, 30])
def test_every_lower_tile_is_there_once(tiles: int) -> None:
    table = lower_tiles(tiles, torch.device("cpu"))
    assert table.dtype == torch.int32
    assert sorted(map(tuple, table.tolist())) == [(i, j) for i in range(tiles) for j in range(i + 1)]


@pytest.mark.parametrize(("size", "tiles"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2)])
def test_count(size: int, tiles: int) -> None:
    assert count(size, 16) == tiles


@triton.jit
def round_kernel(source, target, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(target + at, round_tf32(tl.load(source + at)))


def rounded(values: Tensor) -> Tensor:
    result = torch.empty_like(values)
    round_kernel[(1,)](values, result, BLOCK=len(values))
    return result


def test_tf32_is_the_nearest_of_ten_bits() -> None:
    values = torch.randn(1024) * 10.0 ** torch.randint(-30, 30, (1024,))
    spacing = 2.0 ** (values.abs().double().log2().floor() - 10)
    nearest = (values.double() / spacing).round() * spacing  # torch, too, rounds ties to even
    assert torch.equal(rounded(values).double(), nearest)


def test_ties_go_to_even() -> None:
    ulp = 2.0**-10
    values = torch.tensor([1 + 0.5 * ulp, 1 + 1.5 * ulp, -1 - 2.5 * ulp, 0.0])
    assert rounded(values).tolist() == [1.0, 1 + 2 * ulp, -1 - 2 * ulp, 0.0]


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_no_nan_becomes_a_number(bits: int) -> None:
    values = torch.full((4,), bits, dtype=torch.int32).view(torch.float32)
    assert rounded(values).isnan().all()


def test_infinities_stay() -> None:
    assert rounded(torch.tensor([torch.inf, -torch.inf])).tolist() == [torch.inf, -torch.inf]
