"""Kinds of layers: how inputs are read, which lie too far apart for the kernel, and whose configuration a kind takes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kfac_triton.kernels import ops, tuning
from kfac_triton.kernels.covariance import kernel
from kfac_triton.kernels.covariance import launch as covariance_launch
from kfac_triton.kernels.covariance.layout import Layout
from kfac_triton.kernels.covariance.plan import Group, config_key, configuration, rows_at_a_time
from kfac_triton.kernels.covariance.window import flatten
from kfac_triton.kernels.runtime import Target
from kfac_triton.kernels.strides import collapsed

ANY = (torch.ones(1), torch.ones(1), [False])
BF16, FP32 = torch.bfloat16, torch.float32


def layout(source: Tensor, window: ops.Window, factor: Tensor | None = None) -> Layout:
    """How the launcher reads this input."""
    if factor is None:
        factor = torch.zeros(1, 4096, device=source.device)
    call = covariance_launch.look_at([factor], [source], *ANY, flatten([window]))
    assert call.obstacle is None
    return call.plan.groups[0].layout


def image(row_stride: int) -> Tensor:
    """One channel of two rows of two, this far apart; there is no memory behind it."""
    return torch.empty_strided((1, 1, 2, 2), (1, 1, row_stride, 1), device="meta")


@pytest.mark.parametrize(("padding", "largest"), [((0, 0), 2**31 - 2), ((1, 0), (2**31 - 2) // 3)])
def test_images_must_lie_within_32_bits(padding: tuple[int, int], largest: int) -> None:
    """Padding counts: a window that starts before the image reaches further behind its start."""
    factor, window = torch.empty(1, 1, device="meta"), flatten([ops.window((1, 1), padding=padding)])
    assert covariance_launch.can_use([factor], [image(largest)], *ANY, window) is None
    reason = covariance_launch.can_use([factor], [image(largest + 1)], *ANY, window)
    assert reason is not None
    assert reason.startswith("inputs[0] has images whose elements are further apart")


@pytest.mark.parametrize(("channel_stride", "fits"), [(2**28, True), (2**29, False)])
def test_channels_of_an_image_must_lie_within_32_bits(channel_stride: int, fits: bool) -> None:
    """Images themselves may lie anywhere; a transposed matrix that is too large for an image is read as a matrix."""
    images = torch.empty_strided((3, 8, 4, 2), (2**40, channel_stride, 2, 1), device="meta")
    factor, window = torch.empty(8, 8, device="meta"), flatten([ops.window((1, 1))])
    reason = covariance_launch.can_use([factor], [images], *ANY, window)
    assert (reason is None) == fits
    matrix = torch.empty_strided((8, 8), (1, channel_stride), device="meta")
    assert layout(matrix, ops.ROWS, factor)[:3] == ((0, True, 4) if fits else (0, False, 1))


ONE = ops.window((1, 1))
# The gradients and 1x1 inputs of ResNet-50, by their sizes; then other convolutions.
KINDS = {
    "56 x 56": (torch.empty(4, 64, 56, 56, dtype=BF16), ONE, (0, True, 8)),
    "28 x 28": (torch.empty(4, 512, 28, 28, dtype=BF16), ONE, (0, True, 8)),
    "14 x 14": (torch.empty(4, 1024, 14, 14, dtype=BF16), ONE, (0, True, 4)),
    "7 x 7": (torch.empty(4, 2048, 7, 7, dtype=BF16), ONE, (0, True, 1)),
    "14 x 14, float32": (torch.empty(4, 1024, 14, 14), ONE, (0, True, 4)),
    "7 x 7, float32": (torch.empty(4, 512, 7, 7), ONE, (0, True, 1)),
    "7 x 7, channels last": (
        torch.empty(4, 512, 7, 7, dtype=BF16).contiguous(memory_format=torch.channels_last),
        ONE,
        (0, False, 8),
    ),
    "one image": (torch.empty(1, 64, 8, 8, dtype=BF16), ONE, (0, True, 8)),
    "one position": (torch.empty(4, 64, 1, 1, dtype=BF16), ONE, (0, False, 8)),
    "second half of the channels": (torch.empty(4, 64, 8, 8, dtype=BF16)[:, 32:], ONE, (0, True, 8)),
    "second half, channels last": (
        torch.empty(4, 64, 8, 8, dtype=BF16).contiguous(memory_format=torch.channels_last)[:, 32:],
        ONE,
        (0, False, 8),
    ),
    "half of the channels, 8 bytes off": (
        torch.empty(4, 12, 6, 6, dtype=BF16)[:, 1:9],
        ONE,
        (0, True, 4),
    ),
    "one element off": (torch.empty(2049, dtype=BF16)[1:].view(4, 8, 8, 8), ONE, (0, True, 1)),
    "four elements off": (torch.empty(2052, dtype=BF16)[4:].view(4, 8, 8, 8), ONE, (0, True, 4)),
    "one element off, float32": (torch.empty(2049)[1:].view(4, 8, 8, 8), ONE, (0, True, 1)),
    "images an odd distance apart": (torch.empty(4, 513, dtype=BF16)[:, :512].view(4, 8, 8, 8), ONE, (0, True, 1)),
    "every other image": (torch.empty(4, 64, 8, 8, dtype=BF16)[1::2], ONE, (0, True, 8)),
    "every other image, channels last": (
        torch.empty(4, 64, 8, 8, dtype=BF16).contiguous(memory_format=torch.channels_last)[1::2],
        ONE,
        (2, False, 1),
    ),
    "crop": (torch.empty(4, 64, 8, 8, dtype=BF16)[:, :, :, 2:6], ONE, (2, False, 1)),
    "crop of the height": (torch.empty(4, 64, 8, 8, dtype=BF16)[:, :, 2:6], ONE, (0, True, 8)),
    "three channels": (torch.empty(4, 3, 8, 8, dtype=BF16), ONE, (0, True, 1)),
    "strided": (torch.empty(4, 64, 8, 8, dtype=BF16), ops.window((1, 1), (2, 2)), (2, False, 1)),
    "padded": (torch.empty(4, 64, 8, 8, dtype=BF16), ops.window((1, 1), padding=(1, 0)), (2, False, 1)),
    "3 x 3": (torch.empty(4, 64, 8, 8, dtype=BF16), ops.window((3, 3)), (2, False, 1)),
    "1 x 1 with a dilation": (torch.empty(4, 64, 8, 8, dtype=BF16), ops.window((1, 1), dilation=(2, 3)), (0, True, 8)),
    "one dimension": (torch.empty(4, 64, 40, dtype=BF16), ops.window((1,)), (0, True, 8)),
    "three dimensions": (torch.empty(4, 64, 2, 3, 4), ops.window((1, 1, 1)), (0, True, 4)),
    "matrix": (torch.empty(40, 64), ops.ROWS, (0, False, 8)),
    "transposed matrix": (torch.empty(64, 40, dtype=BF16).T, ops.ROWS, (0, True, 8)),
    "matrix with gaps": (torch.empty(40, 128)[:, ::2], ops.ROWS, (0, False, 1)),
    "expanded": (torch.empty(1, 1).expand(40, 64), ops.ROWS, (0, False, 1)),
}


@pytest.mark.parametrize("name", KINDS)
def test_inputs_are_read_as_they_lie_in_memory(name: str) -> None:
    source, window, expected = KINDS[name]
    assert layout(source, window)[:3] == expected


def test_a_factor_whose_rows_are_not_aligned_is_not_hinted_to_be() -> None:
    images = torch.empty(4, 64, 8, 8, dtype=BF16)
    storage = torch.zeros(66 * 72)
    for factor in (storage[: 64 * 66].view(64, 66), storage[1 : 1 + 64 * 72].view(64, 72)):
        assert layout(images, ONE, factor)[:3] == (0, True, 1)
        assert layout(torch.empty(40, 64), ops.ROWS, factor)[:3] == (0, False, 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), spatial=st.integers(1, 3), dtype=st.sampled_from([BF16, FP32]))
def test_what_the_compiler_is_told_is_true(data: st.DataObject, spatial: int, dtype: torch.dtype) -> None:
    """Rows come in runs of `width` neighbours in memory that start at a multiple of their size, by addresses of elements."""
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=spatial, max_size=spatial))
    images = torch.empty(data.draw(st.integers(1, 3)), data.draw(st.sampled_from([3, 8, 16])), *sizes, dtype=dtype)
    if data.draw(st.booleans()):
        images = images.movedim(1, -1).contiguous().movedim(-1, 1)
    if data.draw(st.booleans()):
        gap = [data.draw(st.integers(0, 4)) for _ in images.shape]
        images = F.pad(images, [n for size in reversed(gap) for n in (0, size)])[tuple(map(slice, images.shape))]
    factor = torch.empty(16, data.draw(st.sampled_from([16, 17])))
    found = layout(images, ops.window((1,) * spatial), factor)
    fields = found.fields
    if found.spatial:
        return
    rows, columns = fields[kernel.ROWS], fields[kernel.COLUMNS]
    assert (rows, columns) == (images.shape[0] * math.prod(sizes), images.shape[1])
    places = list(itertools.product(range(len(images)), *map(range, sizes)))
    address = [[images[(n, c, *at)].data_ptr() for c in range(columns)] for n, *at in places]
    bytes_ = dtype.itemsize
    positions = fields[kernel.POSITIONS] or 1
    step = 1 if found.images else 0
    for k, c in itertools.product(range(rows), range(columns)):
        offset = k // positions * fields[kernel.ROW_STRIDE] + k % positions * step + c * fields[kernel.COLUMN_STRIDE]
        assert address[k][c] == images.data_ptr() + offset * bytes_
        if found.width == 1:
            continue
        run = k if found.images else c
        if run % found.width == 0:
            assert address[k][c] % min(16, found.width * bytes_) == 0
            neighbours = [address[k + i][c] if found.images else address[k][c + i] for i in range(found.width)]
            assert neighbours == [address[k][c] + i * bytes_ for i in range(found.width)]
    if found.width > 1:
        assert (columns % 8, factor.stride(0) % 8, factor.data_ptr() % 16) == (0, 0, 0)
        assert fields[kernel.ROWS] % (found.width if found.images else 1) == 0


@pytest.mark.parametrize(
    ("sizes", "strides", "expected"),
    [((2, 3), (3, 1), 1), ((2, 3), (4, 1), None), ((2, 3), (6, 2), 2), ((1, 3), (99, 2), 2), ((2, 1, 3), (3, 99, 1), 1)],
)
def test_dimensions_are_one_if_each_continues_the_next(
    sizes: tuple[int, ...], strides: tuple[int, ...], expected: int | None
) -> None:
    assert collapsed(sizes, strides) == expected


@pytest.mark.parametrize(
    ("dtype", "kind", "key"),
    [
        (BF16, (0, False, 8), "covariance"),
        (torch.float16, (0, False, 8), "covariance"),
        (FP32, (0, False, 8), "covariance_fp32"),
        (FP32, (0, False, 1), "covariance_unaligned"),
        (BF16, (0, False, 1), "covariance_unaligned"),
        (BF16, (0, True, 8), "covariance_images"),
        (BF16, (0, True, 4), "covariance_images"),
        (FP32, (0, True, 4), "covariance_images_fp32"),
        (BF16, (0, True, 1), "covariance_unaligned"),
        (BF16, (2, False, 1), "covariance_patches"),
        (FP32, (3, False, 1), "covariance_patches"),
    ],
)
def test_each_kind_has_its_configuration(dtype: torch.dtype, kind: tuple[int, bool, int], key: str) -> None:
    assert config_key(dtype, Layout(*kind, ())) == key


def test_volumes_are_taken_half_as_many_rows_at_a_time() -> None:
    assert [rows_at_a_time(32, spatial) for spatial in range(4)] == [32, 32, 32, 16]


def blocks(rows: int, sizes: list[int], processors: int = 132) -> int:
    """The side of the tiles that an H200, or a card with this many processors, takes for bfloat16 rows."""
    layouts = [Layout(0, False, 8, (rows, n) + (0,) * (kernel.LAYER_FIELDS - 2)) for n in sizes]
    group = Group(BF16, layouts, [False] * len(sizes), range(len(sizes)))
    return configuration(group, Target("cuda", "sm_90", processors))["BLOCK"]


def test_few_tiles_are_small_unless_there_are_rows_to_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """As measured: 20 factors of sizes 128 to 512 with 1,024 rows are faster with tiles of 64, 64 of size 512 with 128."""
    monkeypatch.setenv("KFAC_TRITON_CONFIGS", "nowhere")
    tuning.lookup.cache_clear()
    assert blocks(1024, [128, 256, 384, 512] * 5) == 64
    assert blocks(1024, [512] * 64) == 128
    assert blocks(16384, [768, 768]) == 128  # 42 tiles, but seven shares of 2,340 rows
    assert blocks(1024, [768, 768]) == 64
    assert blocks(1024, [768, 768], processors=20) == 128
    assert blocks(1024, [256] * 500) == 64
    tuning.lookup.cache_clear()
