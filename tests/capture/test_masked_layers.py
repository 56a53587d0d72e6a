"""Rows without a gradient in every kind of layer, by brute force from the layers' inputs and output gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.layers.tied import TiedLayer

TOLERANCE = 1e-12
Seen = dict[str, tuple[Tensor, Tensor]]


def _recorded(model: nn.Module) -> Seen:
    """Inputs and output gradients of the last backward pass, from hooks of its own."""
    seen: Seen = {}

    def keep(name: str, x: Tensor, output: Tensor) -> None:
        output.register_hook(lambda g: seen.__setitem__(name, (x.detach(), g.detach())))

    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, args, out, name=name: keep(name, args[0], out))
    return seen


def _masked(rows: Tensor, gradient: Tensor, bias: bool) -> Tensor:
    """A, over the rows that have a gradient."""
    kept = torch.tensor([i for i, row in enumerate(gradient) if row.abs().sum() > 0])
    assert 0 < len(kept) < len(rows)
    rows = rows[kept]
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if bias else rows
    return rows.T @ rows / len(rows)


def _step(model: nn.Module, loss: Callable[[], Tensor], **settings: Any) -> dict[str, tuple[Tensor, Tensor]]:
    model.zero_grad()
    with KFACPreconditioner(model, damping=0.1, **{"rows": "nonzero", "stats_fraction": 1.0, **settings}) as ours:
        loss().backward()
        ours.precondition_()
        return ours.factors()


def _of_blocks(a: Tensor, found: Tensor) -> Tensor:
    """What is stored of A: its diagonal, or blocks along it."""
    return a.diagonal() if found.dim() == 1 else torch.where(found != 0, a, 0.0)


STORED: dict[str, dict[str, Any]] = {
    "dense": {},
    "diagonal": {"max_factor_size": 2},
    "blocks": {"max_factor_size": 10, "oversize": "block"},
}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reduce", [False, True])
def test_pixels_outside_of_the_loss(groups: int, bias: bool, stored: str, reduce: bool) -> None:
    """Rows are output positions: patches of kept ones may overlap those that are left out."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=groups, bias=bias),
        nn.Tanh(),
        nn.Conv2d(4, 6, (2, 3), groups=groups, bias=bias, padding="same"),
        nn.Tanh(),
        nn.Conv2d(6, 4, 1, groups=groups, bias=bias),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 4, 2, stride=2, groups=groups, bias=bias),
    ).double()
    x, mask = torch.randn(3, 4, 6, 6, dtype=torch.float64), torch.rand(3, 1, 6, 6) < 0.15
    mask[1] = False
    seen = _recorded(model)
    settings = {**STORED[stored], "weight_sharing": "reduce" if reduce else "expand"}
    found = _step(model, lambda: (model(x).square() * mask).sum(), **settings)
    for name in ("0", "2", "4", "6"):
        layer = model[int(name)]
        inputs, gradient = seen[name]
        if name == "2":
            inputs = F.pad(inputs, (1, 1, 0, 1))
        if name == "6":  # z, and the flipped kernel that is applied to it
            z = inputs.new_zeros(3, 4, 7, 7)
            z[:, :, 1:7:2, 1:7:2] = inputs
            inputs = z
        g_rows = gradient.flatten(2).movedim(1, 2)
        g_rows = g_rows.sum(1) if reduce else g_rows.flatten(0, 1)
        for group, part in enumerate(inputs.chunk(groups, 1)):
            stride, padding = (layer.stride, layer.padding) if name == "0" else ((1, 1), (0, 0))
            rows = F.unfold(part, layer.kernel_size, stride=stride, padding=padding).movedim(1, 2)
            a = _masked(rows.mean(1) if reduce else rows.flatten(0, 1), g_rows, bias)
            ours = found[name][0] if groups == 1 else found[name][0][group]
            assert relative_error(ours, _of_blocks(a, ours)) <= TOLERANCE, name


class Attending(nn.Module):
    """Embedding, attention, head: positions outside of the loss carry a gradient below the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.middle, self.head = nn.Linear(4, 5), nn.Linear(5, 9)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(torch.tanh(self.middle(x)))


@pytest.mark.parametrize("reduce", [False, True])
def test_positions_below_attention_stay_rows(reduce: bool) -> None:
    torch.manual_seed(0)
    model, tokens = Attending(), torch.randint(9, (4, 6))
    mask = torch.rand(4, 6) < 0.4
    mask[1] = False  # an example without any loss
    mask[0, 0] = mask[2, 1] = mask[3, 2] = True
    seen = _recorded(model)

    def loss() -> Tensor:
        return model(tokens)[mask].square().sum()

    settings = {"weight_sharing": "reduce" if reduce else "expand", "loss_terms": 4}
    found = _step(model, loss, **settings)
    every = _step(model, loss, rows="all", **settings)
    for name in ("middle", "head"):
        x, g = seen[name]
        x, g = (x.mean(1), g.sum(1)) if reduce else (x.flatten(0, 1), g.flatten(0, 1))
        assert relative_error(found[name][0], _masked(x, g, True)) <= TOLERANCE
    one_hot = F.one_hot(tokens, 9).double()
    g = seen["embedding"][1]
    one_hot, g = (one_hot.mean(1), g.sum(1)) if reduce else (one_hot.flatten(0, 1), g.flatten(0, 1))
    assert relative_error(found["embedding"][0], _masked(one_hot, g, False).diagonal()) <= TOLERANCE
    # Queries of positions outside of the loss have no gradient; keys and values of an example have one if any position counts.
    x = model.embedding(tokens).detach()
    x = torch.cat([x, x.new_ones(4, 6, 1)], 2)
    for name, rows in (("attention.q", x[mask]), ("attention.v", x[mask.any(1)].flatten(0, 1))):
        if reduce:
            rows = x[mask.any(1)].mean(1)
        assert relative_error(found[name][0], rows.T @ rows / len(rows)) <= TOLERANCE
    for name, (_, g) in found.items():
        assert torch.equal(g, every[name][1])


@pytest.mark.parametrize("reduce", [False, True])
def test_both_uses_of_a_tied_weight_have_their_own_rows(reduce: bool) -> None:
    """Each use against a model in which it is alone, joined by the traces (`TiedLayer`)."""
    torch.manual_seed(0)
    embedding, decoder = nn.Embedding(9, 4).double(), nn.Linear(4, 9).double()
    tokens = torch.randint(9, (5, 6))
    mask = torch.rand(5, 6) < 0.3
    mask[0], mask[1, 0] = False, True

    def loss() -> Tensor:
        return decoder(torch.tanh(embedding(tokens)))[mask].square().sum()

    settings = {"weight_sharing": "reduce" if reduce else "expand"}
    model = nn.ModuleDict({"embedding": embedding, "decoder": decoder})
    embedding.weight.data.copy_(decoder.weight.data)
    apart = _step(model, loss, **settings)
    embedding.weight = decoder.weight
    model.zero_grad()
    with KFACPreconditioner(model, damping=0.1, rows="nonzero", **settings) as ours:
        loss().backward()
        ours.precondition_()
        name = next(x.name for x in ours.engine.layers if isinstance(x, TiedLayer))
        a, g = ours.factors()[name]
    c_d, r_d, r_e, c_e = apart["decoder"][0], apart["decoder"][1].diagonal(), *apart["embedding"]
    c_e = F.pad(c_e, (0, 1, 0, 1))
    u = (r_e.sum() * c_d.trace() / (r_d.sum() * c_e.trace())).sqrt()
    assert relative_error(a, c_d + u * c_e) <= TOLERANCE
    assert relative_error(g, r_d + r_e / u) <= TOLERANCE


def _tokens() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))
    return model, torch.randn(9, 7, 5), torch.rand(9, 7) < 0.3


@pytest.mark.parametrize("every", [2, 3])
def test_a_part_of_the_rows_is_a_mean_over_those_that_count(every: int) -> None:
    model, x, mask = _tokens()
    seen = _recorded(model.double())
    found = _step(model, lambda: model(x.double())[mask].square().sum(), stats_fraction=1 / every)
    for name in ("0", "3"):
        inputs, gradient = (t.flatten(0, 1)[::every] for t in seen[name])
        assert relative_error(found[name][0], _masked(inputs, gradient, True)) <= TOLERANCE
    assert float(found["1"][0]) == pytest.approx(1)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", ["tokens", "images", "indices"])
def test_compiled_passes(name: str, fraction: float) -> None:
    """One graph; all rows are those of the eager pass, and a part of them has ones whose mean is 1."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x, mask = _tokens()
    if name == "images":
        model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 3))
        x, mask = torch.randn(4, 2, 6, 6), torch.rand(4, 1, 4, 4) < 0.2
    if name == "indices":
        model, x = nn.Sequential(nn.Embedding(9, 5), *model), torch.randint(9, (9, 7))
    model = model.double()
    x, mask = x.double() if x.is_floating_point() else x, mask.double() if name == "images" else mask.unsqueeze(-1).double()
    run = torch.compile(model, backend="aot_eager", fullgraph=True)
    eager = _step(model, lambda: (model(x) * mask).square().sum(), stats_fraction=fraction)
    found = _step(model, lambda: (run(x) * mask).square().sum(), stats_fraction=fraction)
    every = _step(model, lambda: (model(x) * mask).square().sum(), stats_fraction=fraction, rows="all")
    for layer, (a, g) in found.items():
        if fraction == 1:
            assert relative_error(a, eager[layer][0]) <= TOLERANCE
            assert relative_error(g, eager[layer][1]) <= TOLERANCE
        elif a.dim() == 2:
            assert float(a[-1, -1]) == pytest.approx(1)
        elif layer == "0":
            assert float(a.sum()) == pytest.approx(1)  # frequencies
    assert any(relative_error(every[layer][0], eager[layer][0]) > 1e-3 for layer in found)


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
@pytest.mark.parametrize("compiled", [False, True])
def test_labels_of_pixels(fisher: str, compiled: bool) -> None:
    """A segmentation with ignored pixels: the second pass of a compiled model knows that each pixel has a label."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, padding=1)).double()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x, y = torch.randn(3, 2, 5, 5, dtype=torch.float64), torch.randint(4, (3, 5, 5))
    y[torch.rand(3, 5, 5) < 0.8] = -100
    with KFACPreconditioner(model, damping=0.1, fisher=fisher, loss=nn.CrossEntropyLoss(), ema_decay=0.0) as ours:
        for _ in range(2):
            model.zero_grad()
            outputs = run(x)
            ours.accumulate_fisher(outputs, y)
            F.cross_entropy(outputs, y).backward()
            ours.precondition_()
        found = ours.factors()
    hidden = torch.tanh(model[0](x)).detach()
    rows = F.unfold(hidden, 3, padding=1).movedim(1, 2).flatten(0, 1)[y.flatten() != -100]
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    assert relative_error(found["2"][0], rows.T @ rows / len(rows)) <= TOLERANCE
    # The first layer's rows are those that a kept pixel sees.
    near = F.max_pool2d((y != -100).double().unsqueeze(1), 3, stride=1, padding=1).flatten() > 0
    rows = F.unfold(x, 3, padding=1).movedim(1, 2).flatten(0, 1)[near]
    rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    assert relative_error(found["0"][0], rows.T @ rows / len(rows)) <= TOLERANCE


@pytest.mark.parametrize("limit", [0, 1 << 28])
@pytest.mark.parametrize("settings", [{}, {"max_factor_size": 4}, {"max_factor_size": 4, "oversize": "block"}], ids=str)
@pytest.mark.parametrize("images", [False, True])
def test_kernels(images: bool, settings: dict[str, Any], limit: int) -> None:
    """Of several layers in one launch, in steps that leave out rows and that do not."""
    found = []
    for backend in ("triton", "torch"):
        model, x, mask = _tokens()
        if images:
            model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2, bias=False))
            x, mask = torch.randn(4, 2, 5, 5), torch.rand(4, 1, 3, 3) < 0.3
            settings = {**settings, "max_factor_size": 9} if settings else {}
        weight = mask.float() if images else mask.unsqueeze(-1).float()
        options = {"backend": backend, "rows": "nonzero", "stats_fraction": 1.0, "max_kept_bytes": limit, **settings}
        with KFACPreconditioner(model, damping=0.1, **options) as ours:
            for factor in (weight, torch.ones_like(weight)):
                model.zero_grad()
                (model(x) * factor).square().sum().backward()
                ours.precondition_()
            found.append(ours.factors())
    for layer in found[0]:
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(found[0][layer], found[1][layer], strict=True))


@pytest.mark.parametrize("rows", ["auto", "all"])
def test_pooled_positions_are_rows_unless_they_are_to_be_left_out(rows: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double()
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    seen = _recorded(model)
    found = _step(model, lambda: model(x).square().mean(), rows=rows)
    patches = F.unfold(x, 3).movedim(1, 2).flatten(0, 1)
    ones = torch.cat([patches, patches.new_ones(len(patches), 1)], 1)
    assert relative_error(found["0"][0], ones.T @ ones / len(ones)) <= TOLERANCE
    fewer = _step(model, lambda: model(x).square().mean())
    assert (
        relative_error(fewer["0"][0], _masked(patches, seen["0"][1].flatten(2).movedim(1, 2).flatten(0, 1), True)) <= TOLERANCE
    )
