"""Kinds of layers: which images lie too far apart for the covariance kernel, and whose configuration a kind takes."""

from __future__ import annotations

import pytest
import torch

from kfac_triton.kernels import ops
from kfac_triton.kernels.covariance import launch as covariance_launch
from kfac_triton.kernels.covariance.window import flatten

ANY = (torch.ones(1), torch.ones(1), [False])


def image(row_stride: int) -> torch.Tensor:
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


@pytest.mark.parametrize(
    ("dtype", "spatial", "aligned", "key"),
    [
        (torch.bfloat16, 0, True, "covariance"),
        (torch.float16, 0, True, "covariance"),
        (torch.float32, 0, True, "covariance_fp32"),
        (torch.float32, 0, False, "covariance_unaligned"),
        (torch.bfloat16, 0, False, "covariance_unaligned"),
        (torch.bfloat16, 2, False, "covariance_patches"),
        (torch.float32, 3, False, "covariance_patches"),
    ],
)
def test_each_kind_has_its_configuration(dtype: torch.dtype, spatial: int, aligned: bool, key: str) -> None:
    assert covariance_launch.config_key(dtype, spatial, aligned) == key


def test_volumes_are_taken_half_as_many_rows_at_a_time() -> None:
    assert [covariance_launch.rows_at_a_time(32, spatial) for spatial in range(4)] == [32, 32, 32, 16]
