"""EKFAC's moments against per-example gradients made one by one."""

from __future__ import annotations

import pytest
import torch
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton.capture.ekfac_moments import Moments, MomentTile
from kfac_triton.layers import find_layers
from kfac_triton.layers.base import Layer
from kfac_triton.layers.partition import Partition

DTYPE = torch.float64


def _orthogonal(n: int, side: int) -> Tensor:
    out = torch.zeros(side, side, dtype=DTYPE)
    out[:n, :n] = torch.linalg.qr(torch.randn(n, n, dtype=DTYPE))[0]
    return out


def _run(model: nn.Module, x: Tensor, weight_sharing: str = "expand") -> tuple[list[Layer], Partition, Tensor]:
    layers, _ = find_layers(model, weight_sharing)
    output = model(x)
    return layers, Partition(layers), torch.randn_like(output)


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["rows", "tokens", "images", "channel groups"])
def test_moments_are_squares_of_rotated_gradients(kind: str, bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backward passes add up; the gradient of an example is summed over its positions before it is squared."""
    monkeypatch.setattr("kfac_triton.capture.ekfac_moments._CHUNK", chunk)
    if kind in ("rows", "tokens"):
        model: nn.Module = nn.Linear(4, 3, bias=bias).double()
        x = torch.randn(5, 4, dtype=DTYPE) if kind == "rows" else torch.randn(5, 6, 4, dtype=DTYPE)
    else:
        groups = 2 if kind == "channel groups" else 1
        model = nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=1, bias=bias, groups=groups).double()
        x = torch.randn(5, 2, 6, 5, dtype=DTYPE)
    layers, partition, gradient = _run(model, x)
    (layer,) = layers
    tiles = []
    for number, tile in enumerate(partition.tiles):
        m, n = partition.parts[tile.g].size, partition.parts[tile.a].size
        total = torch.full((16, 32), torch.nan, dtype=DTYPE)  # what an earlier step left
        tiles.append(MomentTile(number, _orthogonal(n, 32), _orthogonal(m, 16), total))
    moments = Moments(partition, tiles)
    moments.add(layer.rows(x, gradient))
    assert not moments.fresh  # there is no basis yet
    moments.ready = True
    for _ in range(2):
        moments.add(layer.rows(x, gradient))
    assert moments.fresh
    for place in tiles:
        tile = partition.tiles[place.tile]
        group = partition.blocks[tile.block].group
        m, n = partition.parts[tile.g].size, partition.parts[tile.a].size
        expected = torch.zeros(m, n, dtype=DTYPE)
        for i in range(len(x)):
            model.zero_grad()
            model(x[i : i + 1]).backward(gradient[i : i + 1])
            weight, shift = layer.gradient(group)
            assert weight is not None
            columns = [weight.flatten(1)] + ([shift[:, None]] if shift is not None else [])
            rotated = place.g_vectors[:m, :m].T @ torch.cat(columns, 1) @ place.a_vectors[:n, :n]
            expected += 2 * rotated.square()
        assert relative_error(place.total[:m, :n], expected) <= 1e-12
        assert (place.total[m:] == 0).all()
        assert (place.total[:, n:] == 0).all()


def test_an_empty_batch_adds_nothing() -> None:
    model = nn.Linear(4, 3).double()
    layers, partition, _ = _run(model, torch.randn(2, 4, dtype=DTYPE))
    tile = MomentTile(0, _orthogonal(5, 16), _orthogonal(3, 16), torch.zeros(16, 16, dtype=DTYPE))
    moments = Moments(partition, [tile])
    moments.ready = True
    moments.add(layers[0].rows(torch.zeros(0, 4, dtype=DTYPE), torch.zeros(0, 3, dtype=DTYPE)))
    assert (tile.total == 0).all()
