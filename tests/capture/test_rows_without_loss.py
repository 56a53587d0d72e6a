"""Rows that carry no loss are no rows of A: the factors are those of the packed batch, and otherwise they stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

TOLERANCE = 1e-12
LOSS = nn.CrossEntropyLoss()


def _factors(model: nn.Module, run: Callable[[KFACPreconditioner], Any], **settings: Any) -> dict[str, tuple[Tensor, Tensor]]:
    model.zero_grad()
    with KFACPreconditioner(model, damping=0.1, **{"stats_fraction": 1.0, **settings}) as ours:
        run(ours)
        ours.precondition_()
        return ours.factors()


def _mlp(width: int = 6) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 4)).double()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "blocks": {"max_factor_size": 3, "oversize": "block"},
    "diagonals": {"max_factor_size": 3},
    "EKFAC": {"curvature": "ekfac"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_nodes_outside_of_the_loss(name: str) -> None:
    """A node-wise model with a loss on some nodes has the factors of these nodes alone."""
    model, x, mask = _mlp(), torch.randn(50, 5, dtype=torch.float64), torch.arange(50) % 7 == 2
    settings = {"loss_reduction": "sum", "rows": "nonzero", **SETTINGS[name]}
    some = _factors(model, lambda _: model(x)[mask].square().sum().backward(), **settings)
    alone = _factors(model, lambda _: model(x[mask]).square().sum().backward(), **settings)
    every = _factors(model, lambda _: model(x)[mask].square().sum().backward(), **{**settings, "rows": "all"})
    for layer in some:
        assert relative_error(some[layer][0], alone[layer][0]) <= TOLERANCE
        assert relative_error(some[layer][1], alone[layer][1]) <= TOLERANCE
        assert relative_error(every[layer][0], alone[layer][0]) > 0.01


def test_moments_need_no_mask() -> None:
    """EKFAC: several steps, so that there is a basis; the update is that of the packed batch."""
    found = []
    x, mask = torch.randn(50, 5, dtype=torch.float64), torch.arange(50) % 7 == 2
    for packed in (False, True):
        torch.manual_seed(1)
        model = _mlp()
        with KFACPreconditioner(model, damping=0.1, curvature="ekfac", rows="nonzero", kl_clip=None) as ours:
            for _ in range(3):
                model.zero_grad()
                outputs = model(x[mask]) if packed else model(x)[mask]
                (outputs.square().sum() / len(outputs)).backward()
                ours.precondition_()
            found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        assert relative_error(one, other) <= 1e-9


class Tokens(nn.Module):
    """A token-wise language model: embedding, norm, Linear, head, which may share the embedding's weight."""

    def __init__(self, tied: bool = False, bias: bool = True) -> None:
        super().__init__()
        self.embedding, self.norm, self.middle = nn.Embedding(11, 5), nn.LayerNorm(5), nn.Linear(5, 5)
        self.head = nn.Linear(5, 11, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.norm(self.embedding(tokens)))))


def _labels(shape: tuple[int, ...], kept: int, classes: int = 11) -> Tensor:
    labels = torch.randint(classes, shape)
    out = torch.randperm(labels.numel())[kept:]
    labels.view(-1)[out] = -100
    return labels


def _fisher_pass(model: nn.Module, x: Tensor, y: Tensor, fisher: str) -> Callable[[KFACPreconditioner], None]:
    def run(ours: KFACPreconditioner) -> None:
        outputs = model(x)
        outputs = outputs.movedim(-1, 1) if y.dim() > 1 and outputs.dim() == 3 else outputs
        ours.accumulate_fisher(outputs, y)
        F.cross_entropy(outputs, y).backward()

    return run


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_ignored_tokens(fisher: str, tied: bool, flat: bool) -> None:
    """12 of 40 labels count: A, and for the GGN G, are those of the 12 tokens; labels may be flattened, as users do."""
    model, tokens, y = Tokens(tied), torch.randint(11, (5, 8)), _labels((5, 8), 12)
    kept = y != -100
    settings: dict[str, Any] = {"fisher": fisher, "loss": LOSS, "loss_terms": "tokens"}

    def whole(ours: KFACPreconditioner) -> None:
        outputs = model(tokens)
        outputs, labels = (outputs.flatten(0, 1), y.flatten()) if flat else (outputs.movedim(-1, 1), y)
        ours.accumulate_fisher(outputs, labels)

    some = _factors(model, whole, **settings)
    alone = _factors(model, lambda ours: ours.accumulate_fisher(model(tokens[kept]), y[kept]), **settings)
    for layer in some:
        a, g = (relative_error(x, y) for x, y in zip(some[layer], alone[layer], strict=True))
        if fisher == "ggn" or not tied:  # drawn labels enter the joined factors by their traces
            assert a <= TOLERANCE, layer
        if fisher == "ggn" and layer != "norm":  # the norm's gradients of an example are sums over its tokens
            assert g <= TOLERANCE, layer


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_without_ignored_labels_nothing_changes(fisher: str) -> None:
    """To the last bit those of rows="all", dead units or not."""
    found = []
    for rows in ("auto", "all"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4)).double()
        x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(4, (30,))
        found.append(_factors(model, _fisher_pass(model, x, y, fisher), fisher=fisher, loss=LOSS, rows=rows))
    for layer in found[0]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][layer], found[1][layer], strict=True))


def test_a_flag_on_the_device_that_nothing_is_left_out_changes_nothing() -> None:
    """As on a GPU, where the host does not read the flag: there is a mask, and it lets everything through."""
    found = []
    for flag in (None, torch.tensor(False)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 4)).double()
        x = torch.randn(30, 5, dtype=torch.float64)

        def run(ours: KFACPreconditioner, flag: Tensor | None = flag, model: nn.Module = model, x: Tensor = x) -> None:
            loss = model(x).square().mean()
            for call in ours.engine.gate.calls.alive:
                call.left_out = flag
            loss.backward()
            assert all(bool(s.masked) == isinstance(flag, Tensor) for s in ours.engine.statistics)

        found.append(_factors(model, run))
    for layer in found[0]:
        assert all(torch.equal(a, b) for a, b in zip(found[0][layer], found[1][layer], strict=True))


def test_a_class_that_cannot_occur_does_not_empty_the_rows() -> None:
    """The GGN's column of a class with the logit minus 10^9 is zero for all rows."""
    model, x, y = _mlp(), torch.randn(20, 5, dtype=torch.float64), _labels((20,), 8, 4)
    offset = torch.tensor([-1e9, 0, 0, 0], dtype=torch.float64)
    settings: dict[str, Any] = {"fisher": "ggn", "loss": LOSS}
    y[y == 0] = 1
    some = _factors(model, lambda ours: ours.accumulate_fisher(model(x) + offset, y), **settings)
    kept = y != -100
    alone = _factors(model, lambda ours: ours.accumulate_fisher(model(x[kept]) + offset, y[kept]), **settings)
    for layer in some:
        assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(some[layer], alone[layer], strict=True))


@pytest.mark.parametrize("fisher", ["mc", "ggn"])
def test_one_label_for_each_example_leaves_out_whole_examples(fisher: str) -> None:
    """Pooled positions and dead units of the others stay rows, as in the packed batch."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)
    ).double()
    x, y = torch.randn(10, 2, 8, 8, dtype=torch.float64), _labels((10,), 6, 4)
    x, kept = F.interpolate(x[..., :2, :2], size=8), y != -100  # so that whole examples are dead in the second convolution
    settings: dict[str, Any] = {"fisher": fisher, "loss": LOSS}
    some = _factors(model, lambda ours: ours.accumulate_fisher(model(x), y), **settings)
    alone = _factors(model, lambda ours: ours.accumulate_fisher(model(x[kept]), y[kept]), **settings)
    for layer in some:
        assert relative_error(some[layer][0], alone[layer][0]) <= TOLERANCE
        if fisher == "ggn" and layer == "6":
            assert relative_error(some[layer][1], alone[layer][1]) <= TOLERANCE


@pytest.mark.parametrize("rows", ["auto", "nonzero"])
def test_a_step_without_any_loss_keeps_the_factors(rows: str) -> None:
    model, x, y = _mlp(), torch.randn(12, 5, dtype=torch.float64), torch.randint(4, (12,))
    settings: dict[str, Any] = {"fisher": "ggn", "loss": LOSS} if rows == "auto" else {}
    with KFAC(model, lr=0.1, rows=rows, **settings) as optimizer:
        for labels in (y, torch.full_like(y, -100), y):
            before = optimizer.factors()
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.accumulate_fisher(outputs, labels) if settings else None
            F.cross_entropy(outputs, labels, reduction="sum").backward()
            optimizer.step()
            same = all(torch.equal(a, b) for k, v in optimizer.factors().items() for a, b in zip(v, before[k], strict=True))
            assert same == bool((labels < 0).all())
            assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_layer_without_any_loss_keeps_its_factors_beside_others() -> None:
    """One of two branches carries no loss in the second step."""
    model = nn.ModuleDict({"one": nn.Linear(5, 3), "two": nn.Linear(5, 3)}).double()
    x = torch.randn(12, 5, dtype=torch.float64)
    with KFACPreconditioner(model, damping=0.1, rows="nonzero") as ours:
        found = []
        for weight in (1.0, 0.0):
            model.zero_grad()
            (model["one"](x).square().mean() + weight * model["two"](2 * x).square().mean()).backward()
            ours.precondition_()
            found.append(ours.factors())
            x = torch.randn(12, 5, dtype=torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(found[0]["two"], found[1]["two"], strict=True))
    assert not torch.equal(found[0]["one"][0], found[1]["one"][0])
