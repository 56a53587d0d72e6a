"""The KL clip."""

from __future__ import annotations

import torch

from kfac_triton.step_size import kl_clip_scale


def test_bound_is_met_exactly_or_not_touched() -> None:
    products, rates = torch.tensor([4.0, 5.0]), torch.tensor([0.5, 1.0])
    total = 0.25 * 4 + 5
    torch.testing.assert_close(kl_clip_scale(products, rates, 1.5), torch.tensor((1.5 / total) ** 0.5))
    assert kl_clip_scale(products, rates, 7.0) == 1
    assert kl_clip_scale(products, rates, None) == 1


def test_no_gradient_no_clip() -> None:
    assert kl_clip_scale(torch.zeros(3), torch.ones(3), 1e-3) == 1


def test_broken_layers_do_not_take_part() -> None:
    products = torch.tensor([4.0, torch.nan, torch.inf])
    torch.testing.assert_close(kl_clip_scale(products, torch.ones(3), 1.0), torch.tensor(0.5))
