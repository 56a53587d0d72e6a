"""Where K-FAC keeps tables, flags and counters does not depend on the default device (torch.set_default_device)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC


@contextmanager
def _default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def _trained(device: str, **settings: Any) -> list[Tensor]:
    """Parameters and counters after two steps of a model that was made before the default device was set."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    data = torch.randn(2, 8, 3), torch.randint(2, (2, 8))
    with _default_device(device):
        optimizer = KFAC(model, damping=0.1, **settings)
        for x, targets in zip(*data, strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), targets).backward()
            optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("inverse", ["cholesky", "factored"])
@pytest.mark.parametrize("tail", ["sgd", "adamw"])
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_any_default_device_gives_the_same_steps(backend: str, tail: str, inverse: str) -> None:
    """On "meta", tensors have no contents, so nothing that the host reads or copies may be there."""
    found, expected = (_trained(device, backend=backend, tail=tail, inverse=inverse) for device in ("meta", "cpu"))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
