"""Rows of inputs (T, B, n): which are sampled, where they lie in memory, and what kernels and EKFAC make of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.helpers import relative_error
from support.layouts import WIDTH, B, Model, T, assert_equal, batch, seeded, train
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.capture.ekfac_moments import Moments, MomentTile
from kfac_triton.kernels import ops
from kfac_triton.kernels.norm_fisher.layout import describe
from kfac_triton.layers import LAYER_TYPES, Layer, Rows, find_layers, register
from kfac_triton.layers.norm import NormPass
from kfac_triton.layers.partition import Partition

DTYPE = torch.float64


def layer_of(module: nn.Module, batch_dim: int = 1, **settings: Any) -> Layer:
    (layer,), _ = find_layers(module.to(DTYPE), batch_dim=batch_dim, **settings)
    return layer


@pytest.mark.parametrize("shape", [(5, 6), (5, 8), (2, 3), (1, 4), (4, 1), (3, 4, 2), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("every", [2, 3, 8])
def test_steps_sample_every_row_once_and_examples_alike(shape: tuple[int, ...], every: int) -> None:
    """The samples of as many steps as the stride says are all rows; one step has no favourite example."""
    place = torch.arange(torch.Size(shape).numel(), dtype=DTYPE).view(*shape, 1)
    layer = layer_of(nn.Linear(1, 1))
    rows = layer.rows_of_pass(place, place)
    examples, others = shape[1], place.numel() // shape[1]
    assert (rows.input_count, rows.examples, rows.terms) == (place.numel(), examples, examples)
    seen: list[int] = []
    step = 0
    while len(seen) < place.numel():
        part = rows.sample(every, step)
        assert part.share == len(part.inputs[0]) / place.numel()
        assert (part.input_count, part.terms, part.outer) == (place.numel(), examples, 1)
        taken = part.inputs[0].flatten().long().tolist()
        assert part.gradients[0].flatten().long().tolist() == taken
        times = Counter(i // (others // shape[0]) % examples for i in taken)
        if len(taken) >= examples:
            assert max(times.values()) - min(times[b] for b in range(examples)) <= max(1, others // shape[0])
        seen += taken
        step += 1
    assert sorted(seen) == list(range(place.numel()))
    assert step >= min(every, place.numel())


@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
def test_counts_of_sampled_rows(loss_terms: str) -> None:
    model = Model(False, pool=False)
    with KFACPreconditioner(model, batch_dim=1, stats_fraction=0.5, loss_terms=loss_terms, loss=nn.MSELoss()) as ours:
        model(batch()[0].T.contiguous()).square().mean().backward()
        for statistics in ours.engine.statistics:
            is_norm = statistics.layer.constant_input
            rows = B if is_norm and loss_terms == "examples" else B * T
            assert statistics.counts.tolist() == [rows, B if loss_terms == "examples" else B * T]
            assert 0 < statistics.rows_taken <= rows // 2
        ours.precondition_()
        for name in ("linear", "conv", "head"):
            assert ours.factors()[name][0][-1, -1] == 1  # the mean of the bias's ones


@pytest.mark.parametrize("shape", [(5, 6), (3, 4, 2)], ids=str)
def test_rows_that_expand_are_not_copied(shape: tuple[int, ...]) -> None:
    """They may wait for the end of the backward pass."""
    x, gradient = torch.randn(*shape, 4, dtype=DTYPE), torch.randn(*shape, 3, dtype=DTYPE)
    rows = layer_of(nn.Linear(4, 3)).rows_of_pass(x, gradient)
    for source, whole in zip((*rows.inputs, *rows.gradients), (x, gradient), strict=True):
        assert source.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 3, 2), (3, 0, 2)], ids=str)
@pytest.mark.parametrize("module", [nn.Linear(4, 4), nn.LayerNorm(4), nn.RMSNorm(4)], ids=lambda x: type(x).__name__)
def test_empty_inputs(module: nn.Module, shape: tuple[int, ...], weight_sharing: str) -> None:
    x = torch.zeros(*shape, 4, dtype=DTYPE)
    for curvature in ("kfac", "ekfac"):
        with KFACPreconditioner(module.to(DTYPE), batch_dim=1, weight_sharing=weight_sharing, curvature=curvature) as ours:
            module(torch.randn(2, 3, 4, dtype=DTYPE)).square().mean().backward()
            ours.precondition_()
            module(x).square().sum().backward()
            (statistics,) = ours.engine.statistics
            moved = x.movedim(1, 0)
            expected = statistics.layer.rows(moved, moved)
            assert statistics.counts.tolist() == [expected.input_count, expected.terms]


def _orthogonal(n: int) -> Tensor:
    out = torch.zeros(16, 16, dtype=DTYPE)
    out[:n, :n] = torch.linalg.qr(torch.randn(n, n, dtype=DTYPE))[0]
    return out


@pytest.mark.parametrize("chunk", [1, 1 << 24])
@pytest.mark.parametrize("shape", [(5, 3), (3, 4, 2), (2, 3, 4, 2)], ids=str)
@pytest.mark.parametrize("module", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False)], ids=["bias", "no bias"])
def test_moments_by_hand(module: nn.Module, shape: tuple[int, ...], chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of an example, from a backward pass of its own, is rotated and squared."""
    monkeypatch.setattr("kfac_triton.capture.ekfac_moments._CHUNK", chunk)
    dim = len(shape) - 2 if len(shape) > 3 else 1
    layer = layer_of(module, dim)
    x, gradient = torch.randn(*shape, 4, dtype=DTYPE), torch.randn(*shape, 3, dtype=DTYPE)
    total = torch.full((16, 16), torch.nan, dtype=DTYPE)
    tile = MomentTile(0, _orthogonal(layer.input_size), _orthogonal(3), total)
    moments = Moments(Partition([layer]), [tile])
    moments.ready = True
    moments.add(layer.rows_of_pass(x, gradient))
    expected = torch.zeros(3, layer.input_size, dtype=DTYPE)
    for one, g in zip(x.unbind(dim), gradient.unbind(dim), strict=True):
        module.zero_grad()
        module(one).backward(g)
        columns = torch.cat([p.grad.reshape(3, -1) for p in module.parameters()], 1)
        rotated = tile.g_vectors[:3, :3].T @ columns @ tile.a_vectors[: layer.input_size, : layer.input_size]
        expected += rotated.square()
    assert relative_error(total[:3, : layer.input_size], expected) <= 1e-12


WAYS: dict[str, dict[str, Any]] = {
    "examples": {},
    "tokens": {"loss_terms": "tokens"},
    "tokens, reduced": {"loss_terms": "tokens", "weight_sharing": "reduce"},
    "EKFAC": {"curvature": "ekfac"},
    "full matrices": {"norms": "full"},
    "one layer at a time": {"max_kept_bytes": 0},
}


@pytest.mark.parametrize("way", WAYS)
def test_kernels_train_as_the_batch_first_model_does_in_pytorch(way: str) -> None:
    pool = "loss_terms" not in WAYS[way]
    data = [batch(pool)]
    kernels = train(seeded(lambda: Model(False, pool).float()), data, False, batch_dim=1, backend="triton", **WAYS[way])
    pytorch = train(seeded(lambda: Model(True, pool).float()), data, True, backend="torch", **WAYS[way])
    assert_equal(kernels, pytorch, 1e-4)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(("shape", "copied"), [((5, 6), False), ((3, 4, 2), True)], ids=str)
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_the_kernel_of_norms_reads_sequence_first_tensors(
    kind: type[nn.Module], shape: tuple[int, ...], copied: bool, by_position: bool
) -> None:
    """Examples and positions have strides of their own; a copy is made only where positions have no common stride."""
    layer = layer_of(kind(WIDTH), loss_terms="tokens" if by_position else "examples")
    x, gradient = torch.randn(*shape, WIDTH), torch.randn(*shape, WIDTH)
    one = layer.rows_of_pass(x, gradient).make
    assert isinstance(one, NormPass)
    assert one.x.shape[0] == shape[1]
    read, _, _ = describe(one.x, one.gradient, one.norm, False)
    assert (read.data_ptr() != x.data_ptr()) == copied
    totals = [torch.full((layer.output_size,), torch.nan)]
    ops.norm_fisher_diagonal(
        totals, [one.x], [one.gradient], torch.ones(1), torch.zeros(1), [one.norm], [None], backend="triton"
    )
    x, gradient = x.double().movedim(1, 0), gradient.double().movedim(1, 0)
    xhat = layer.module.double()(x).detach()  # scale 1, shift 0
    columns = torch.cat([gradient * xhat, gradient], -1)[..., : layer.output_size].flatten(1, -2)
    truth = (columns if by_position else columns.sum(1, keepdim=True)).square().sum((0, 1))
    assert relative_error(totals[0].double(), truth) <= 1e-5


class Scaled(nn.Module):
    """A layer type of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x @ self.weight.T


@pytest.fixture
def scaled() -> Iterator[None]:
    before = list(LAYER_TYPES)

    @register
    class ScaledLayer(Layer):
        module_type = Scaled

        def rows(self, x: Tensor, gradient: Tensor) -> Rows:
            """As the page on layers has it: examples first."""
            count = x.shape[:-1].numel()
            inputs, gradients = [2 * x.flatten(0, -2)], [gradient.flatten(0, -2)]
            return Rows(inputs, gradients, ops.ROWS, ops.ROWS, count, count if self.tokens else len(x), len(x))

    yield
    LAYER_TYPES[:] = before


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_a_layer_type_of_the_user_gets_examples_first(curvature: str) -> None:
    data = [(torch.randn(B, T, 4, dtype=DTYPE), torch.randint(3, (B, T))) for _ in range(2)]
    results = [
        train(seeded(lambda: nn.Sequential(Scaled())), data, dim == 0, batch_dim=dim, curvature=curvature) for dim in (1, 0)
    ]
    assert_equal(*results)
