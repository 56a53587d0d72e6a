"""Sequence-first models: with batch_dim=1, factors and updates are those of the same weights run batch-first."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.layouts import CLASSES, TOKENS, WIDTH, B, Model, T, assert_equal, batch, seeded, train
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.settings import Settings


def both(make: Any, data: list[tuple[Tensor, Tensor]], **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Sequence-first with batch_dim=1, and batch-first."""
    first = train(seeded(lambda: make(False)), data, False, **{"batch_dim": 1} | settings)
    return first, train(seeded(lambda: make(True)), data, True, **settings)


@pytest.mark.parametrize("norms", ["diagonal", "full"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_it_trains_as_the_batch_first_model(
    weight_sharing: str, loss_terms: str, fisher: str, curvature: str, norms: str
) -> None:
    pool = loss_terms == "examples"
    found, expected = both(
        lambda batch_first: Model(batch_first, pool), [batch(pool) for _ in range(2)], weight_sharing=weight_sharing,
        loss_terms=loss_terms, fisher=fisher, curvature=curvature, norms=norms,
    )  # fmt: skip
    assert_equal(found, expected)


@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_factors_by_hand(weight_sharing: str, loss_terms: str) -> None:
    """One loop over examples, from the gradients of the layers' outputs."""
    reduce, tokens = weight_sharing == "reduce", loss_terms == "tokens"
    model = Model(False, pool=not tokens)
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda _, args, out, name=name: calls.update({name: (args[0].detach(), out)}))
        module.register_forward_hook(lambda _, args, out: out.retain_grad())
    x, y = batch(pool=not tokens)
    with KFACPreconditioner(model, batch_dim=1, norms="full", weight_sharing=weight_sharing, loss_terms=loss_terms) as ours:
        F.cross_entropy(model(x.T).flatten(0, -2), (y.T if tokens else y).flatten()).backward()
        ours.precondition_()
        factors = ours.factors()
    terms = B * T if tokens else B
    for name, (x, out) in calls.items():
        a_rows, g_rows = [], []
        for b in range(B):
            pooled = name == "head" and not tokens  # the only input without positions: (B, n)
            a, g = (t[b][None] if pooled else t[:, b] for t in (x, out.grad))  # its positions
            if name == "embedding":
                a = F.one_hot(a, TOKENS).double()
            elif name in ("norm", "rms"):
                xhat = F.layer_norm(a, (WIDTH,)) if name == "norm" else F.rms_norm(a, (WIDTH,), eps=0.1)
                a, g = a.new_ones(len(a), 1), torch.cat([g * xhat, g] if name == "norm" else [g * xhat], 1)
                g = g if tokens and not reduce else g.sum(0, keepdim=True)
            else:
                a = torch.cat([a, a.new_ones(len(a), 1)], 1)
            a_rows.append(a.mean(0, keepdim=True) if reduce else a)
            g_rows.append(g.sum(0, keepdim=True) if reduce else g)
        a, g = torch.cat(a_rows), torch.cat(g_rows)
        expected = [a.T @ a / len(a), g.T @ g * terms]
        for ours_, truth in zip(factors[name], expected, strict=True):
            truth = truth.diagonal() if ours_.dim() == 1 else truth
            torch.testing.assert_close(ours_, truth, rtol=0, atol=1e-12 * float(truth.abs().max()))


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
def test_a_tied_embedding_in_both_uses(loss_terms: str, weight_sharing: str) -> None:
    pool = loss_terms == "examples"
    found, expected = both(
        lambda batch_first: Model(batch_first, pool, tied=True), [batch(pool, TOKENS) for _ in range(2)],
        loss_terms=loss_terms, weight_sharing=weight_sharing,
    )  # fmt: skip
    assert_equal(found, expected)


class Deep(nn.Module):
    """Inputs of more dimensions: (B, T, S, n), or examples in dimension 1 or 2, with a norm of one or of two of them."""

    def __init__(self, dim: int, dims: int) -> None:
        super().__init__()
        self.dim = dim
        self.linear = nn.Linear(4, 5)
        self.norm = nn.LayerNorm((2, 5)[-dims:])
        self.last = nn.Linear(5, CLASSES)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.linear(x)))
        return self.last(x).movedim(self.dim, 0).flatten(1, -2).mean(1)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize(("dim", "dims"), [(1, 1), (1, 2), (2, 1)])
def test_inputs_of_more_dimensions(dim: int, dims: int, weight_sharing: str, curvature: str) -> None:
    x, y = torch.randn(B, T, 3, 2, 4, dtype=torch.float64), torch.randint(CLASSES, (B,))
    results = []
    for place in (dim, 0):
        model = seeded(lambda place=place: Deep(place, dims))
        moved = x.movedim(0, place).contiguous()
        options: dict[str, Any] = {
            "weight_sharing": weight_sharing,
            "curvature": curvature,
            "norms": "full",
            "batch_dim": place,
        }
        results.append(train(model, [(moved, y)] * 2, True, **options))
    assert_equal(*results)


class Fixed(nn.Module):
    """Layers whose layout PyTorch fixes or that say it themselves."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.up = nn.ConvTranspose1d(6, 6, 3, padding=1)
        self.batch, self.group = nn.BatchNorm1d(6), nn.GroupNorm(2, 6)
        self.layer = nn.LayerNorm((6, 5))  # of inputs (B, 6, 5), which have no positions
        self.attention = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.batch_first = batch_first
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(self.group(torch.tanh(self.batch(self.up(torch.tanh(self.conv(x)))))))
        x = x.mT if self.batch_first else x.permute(2, 0, 1)
        return self.attention(x, x, x)[0].mean(int(self.batch_first))


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_layers_with_a_layout_of_their_own_keep_it(batch_first: bool, weight_sharing: str) -> None:
    data = [(torch.randn(B, 4, 5, dtype=torch.float64), torch.randint(CLASSES, (B,))) for _ in range(2)]
    results = [
        train(seeded(lambda: Fixed(batch_first)), data, True, weight_sharing=weight_sharing, batch_dim=dim) for dim in (1, 0)
    ]
    assert all(torch.equal(x, results[1][name]) for name, x in results[0].items())
    assert {"conv, A", "up, A", "batch, G", "group, G", "layer, G", "attention.q, A"} <= results[0].keys()


class Encoder(nn.Module):
    """A recurrent layer, whose outputs a transformer layer takes in the default layout of both."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 8)
        self.recurrent = nn.LSTM(8, 8, batch_first=batch_first)
        self.transformer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=batch_first)
        self.head = nn.Linear(8, CLASSES)
        self.time = int(batch_first)
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x, _ = self.recurrent(self.embedding(tokens))
        return self.head(self.transformer(x).select(self.time, -1))


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_recurrent_and_transformer_layers_of_pytorch(weight_sharing: str) -> None:
    found, expected = both(Encoder, [batch() for _ in range(2)], weight_sharing=weight_sharing)
    assert {"transformer.self_attn.q, A", "transformer.linear1, A", "transformer.norm2, G", "head, A"} <= found.keys()
    assert_equal(found, expected)


class Mixed(nn.Module):
    """A batch-first encoder and a decoder that may be sequence-first, with a weight in both."""

    def __init__(self, batch_first: bool, tied: bool) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"embedding": nn.Embedding(TOKENS, WIDTH), "linear": nn.Linear(WIDTH, WIDTH)})
        decoder = {"linear": nn.Linear(WIDTH, WIDTH), "norm": nn.LayerNorm(WIDTH), "logits": nn.Linear(WIDTH, TOKENS)}
        self.decoder = nn.ModuleDict(decoder)
        self.time = int(batch_first)
        if tied:
            self.decoder["logits"].weight = self.encoder["embedding"].weight
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.encoder["linear"](self.encoder["embedding"](tokens)).cumsum(1)
        if not self.time:
            x = x.transpose(0, 1)
        x = self.decoder["norm"](torch.tanh(self.decoder["linear"](x)))
        return self.decoder["logits"](x).mean(self.time)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_function_tells_the_layouts_of_a_mixed_model(tied: bool, weight_sharing: str) -> None:
    data = [batch(classes=TOKENS) for _ in range(2)]
    asked: dict[str, type] = {}

    def batch_dim(name: str, module: nn.Module) -> int:
        asked[name] = type(module)
        return int(name.startswith("decoder"))

    found, expected = (
        train(seeded(lambda first=first: Mixed(first, tied)), data, True, weight_sharing=weight_sharing, batch_dim=dim)
        for first, dim in ((False, batch_dim), (True, 0))
    )
    assert_equal(found, expected)
    linears = dict.fromkeys(("encoder.linear", "decoder.linear", "decoder.logits"), nn.Linear)
    assert asked.pop("") is Mixed  # for its own argument
    assert asked == {**linears, "encoder.embedding": nn.Embedding, "decoder.norm": nn.LayerNorm}


@pytest.mark.parametrize(("weight_sharing", "loss_terms"), [("expand", "examples"), ("reduce", "tokens")])
def test_compiled(weight_sharing: str, loss_terms: str) -> None:
    pool = loss_terms == "examples"
    data = [batch(pool) for _ in range(2)]
    results = []
    for compiled in (True, False):
        torch.compiler.reset()
        model = seeded(lambda compiled=compiled: Model(not compiled, pool))
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        dim = int(compiled)
        results.append(
            train(model, data, not compiled, forward, batch_dim=dim, weight_sharing=weight_sharing, loss_terms=loss_terms)
        )
    torch.compiler.reset()
    assert_equal(*results)


@pytest.mark.parametrize("bad", [True, 1.0, "1", None, (1,)])
def test_wrong_types(bad: Any) -> None:
    with pytest.raises(TypeError, match=r"batch_dim must be 0, 1 for sequence-first .* but is "):
        Settings(batch_dim=bad)
    with pytest.raises(TypeError, match=r"batch_dim of module '0' must be an integer, but is "):
        KFAC(nn.Sequential(nn.Linear(2, 2)), batch_dim=lambda name, module: bad)


def test_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"batch_dim must be 0, .* but is -1; count dimensions from the front"):
        Settings(batch_dim=-1)
    with pytest.raises(ValueError, match=r"batch_dim of module '0' must be at least 0, but is -2"):
        KFACPreconditioner(nn.Sequential(nn.Linear(2, 2)), batch_dim=lambda name, module: -2)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"batch_dim must be the same for modules that share a weight, .*'0': 0, '1': 1"):
        KFAC(model, batch_dim=lambda name, module: int(name))
