"""nn.MultiheadAttention against an attention made of four nn.Linear with the same weights."""

from __future__ import annotations

import io
import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from curvlinops import FisherType, KFACLinearOperator, KFACType
from support.helpers import relative_error
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.layers import find_layers

EMBED, HEADS, TOLERANCE = 6, 2, 1e-10
PARTS = ("q", "k", "v", "out_proj")


class ByHand(nn.Module):
    """Attention as in the text books, examples first."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        biases: Any = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        weights = (
            attention.in_proj_weight.chunk(3)
            if attention.in_proj_weight is not None
            else (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        )
        pairs = [*zip(weights, biases, strict=True), (attention.out_proj.weight, attention.out_proj.bias)]
        for name, (weight, bias) in zip(PARTS, pairs, strict=True):
            linear = nn.Linear(weight.shape[1], EMBED, bias is not None, dtype=weight.dtype)
            linear.weight.data.copy_(weight.data)
            if bias is not None:
                linear.bias.data.copy_(bias.data)
            self.add_module(name, linear)
        self.extra = [None if b is None else b.detach().squeeze(0) for b in (attention.bias_k, attention.bias_v)]
        self.add_zero = attention.add_zero_attn

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q(query), self.k(key), self.v(value)
        if self.extra[0] is not None:
            k, v = (torch.cat([x, b.expand(len(x), 1, -1)], 1) for x, b in zip((k, v), self.extra, strict=True))
        if self.add_zero:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(F.pad(mask, (0, k.shape[2] - mask.shape[-1])), -math.inf)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def sources(kind: str, attention: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, examples first, identical where that is the kind."""
    query = torch.randn(3, 4, EMBED, dtype=torch.float64)
    if kind == "self":
        return query, query, query
    key = torch.randn(3, 5, attention.kdim, dtype=torch.float64)
    return query, key, key if kind == "memory" else torch.randn(3, 5, attention.vdim, dtype=torch.float64)


def call(attention: nn.MultiheadAttention, inputs: tuple[Tensor, ...], **options: Any) -> Tensor:
    """Examples first, whatever batch_first says."""
    if attention.batch_first:
        return attention(*inputs, **options)[0]
    query, key, value = inputs
    turned = {id(x): x.transpose(0, 1) for x in inputs}
    return attention(turned[id(query)], turned[id(key)], turned[id(value)], **options)[0].transpose(0, 1)


def loss_of(output: Tensor) -> Tensor:
    """A mean over examples, of which no gradient is a multiple of another."""
    weights = torch.linspace(0.5, 2.0, output[0].numel(), dtype=output.dtype).view_as(output[0])
    return (output.sin() * weights).sum((-1, -2)).mean()


def gradients(module: nn.Module, attention: nn.MultiheadAttention | None = None) -> dict[str, Tensor]:
    """Part -> [weight | bias] gradients, cut from what is packed."""
    if attention is None:
        linears = {part: getattr(module, part) for part in PARTS}
        pairs = {part: (x.weight.grad, None if x.bias is None else x.bias.grad) for part, x in linears.items()}
    else:
        packed = attention.in_proj_weight
        names = [f"{x}_proj_weight" for x in "qkv"]
        weights = packed.grad.chunk(3) if packed is not None else [getattr(attention, name).grad for name in names]
        bias = attention.in_proj_bias
        biases = (None,) * 3 if bias is None else bias.grad.chunk(3)
        pairs = dict(zip(PARTS, zip(weights, biases, strict=True), strict=False))
        out = attention.out_proj
        pairs["out_proj"] = (out.weight.grad, None if out.bias is None else out.bias.grad)
    return {part: w if b is None else torch.cat([w, b[:, None]], 1) for part, (w, b) in pairs.items()}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "self": ("self", {}),
    "memory": ("memory", {}),
    "three inputs": ("cross", {}),
    "own sizes": ("cross", {"kdim": 7, "vdim": 5}),
    "own sizes without bias": ("memory", {"kdim": 7, "vdim": 7, "bias": False}),
    "without bias": ("self", {"bias": False}),
    "bias_k": ("self", {"add_bias_kv": True}),
    "zero": ("memory", {"add_zero_attn": True, "add_bias_kv": True}),
}


def compare(
    attention: nn.MultiheadAttention,
    inputs: tuple[Tensor, ...],
    mask: Tensor | None = None,
    settings: Any = None,
    **call_with: Any,
) -> None:
    """Factors and preconditioned gradients of both."""
    settings = {"kl_clip": None, "damping": 1e-2, **(settings or {})}
    truth = ByHand(attention)
    theirs, ours = KFACPreconditioner(truth, **settings), KFACPreconditioner(attention, **settings)
    loss_of(truth(*inputs, mask)).backward()
    loss_of(call(attention, inputs, **call_with)).backward()
    expected_counts = [s.counts.tolist() for s in theirs.engine.statistics]
    assert [s.counts.tolist() for s in ours.engine.statistics] == expected_counts
    theirs.precondition_()
    ours.precondition_()
    assert ours.factors().keys() == theirs.factors().keys()
    for part, factors in theirs.factors().items():
        for value, true in zip(ours.factors()[part], factors, strict=True):
            # Softmax does not see a shift of all keys: of "reduce", which sums the keys' gradients, rounding is left.
            assert float((value - true).norm()) <= TOLERANCE * max(float(true.norm()), 1e-9)
    preconditioned, expected = gradients(attention, attention), gradients(truth)
    for part in PARTS:
        assert relative_error(preconditioned[part], expected[part]) <= TOLERANCE


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_is_four_linears(case: str, sharing: str, batch_first: bool, need_weights: bool) -> None:
    kind, options = CASES[case]
    attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, dtype=torch.float64, **options)
    nn.init.normal_(attention.out_proj.weight)
    if attention.in_proj_bias is not None:
        nn.init.normal_(attention.in_proj_bias)
    compare(attention, sources(kind, attention), settings={"weight_sharing": sharing}, need_weights=need_weights)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
def test_other_settings(loss_terms: str, curvature: str) -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    settings = {"loss_terms": loss_terms, "curvature": curvature, "max_factor_size": 4, "oversize": "block"}
    compare(attention, sources("memory", attention), settings=settings)


class Pooled(nn.Module):
    """Self-attention, averaged over tokens."""

    def __init__(self, a: nn.Module) -> None:
        super().__init__()
        self.a = a

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x, x, x).mean(1)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_factors_are_those_of_curvlinops(sharing: str) -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    model, loss = Pooled(ByHand(attention)), nn.CrossEntropyLoss()
    x, y = torch.randn(7, 4, EMBED, dtype=torch.float64), torch.randint(EMBED, (7,))
    oracle = KFACLinearOperator(
        model,
        loss,
        list(model.parameters()),
        [(x, y)],
        fisher_type=FisherType.EMPIRICAL,
        kfac_approx=KFACType.EXPAND if sharing == "expand" else KFACType.REDUCE,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    oracle.compute_kronecker_factors()
    with KFACPreconditioner(attention, weight_sharing=sharing) as ours:
        loss(attention(x, x, x)[0].mean(1), y).backward()
        ours.precondition_()
        for part, (a, g) in ours.factors().items():
            assert relative_error(a, oracle._input_covariances[f"a.{part}"]) <= TOLERANCE
            true = oracle._gradient_covariances[f"a.{part}"]
            assert float((g - true).norm()) <= TOLERANCE * max(float(true.norm()), 1e-9)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_masks(causal: bool, need_weights: bool) -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    inputs = sources("self", attention)
    if causal:
        mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
        compare(attention, inputs, mask, attn_mask=mask, need_weights=need_weights)
    else:
        padding = torch.zeros(3, 4, dtype=torch.bool)
        padding[1, 2:] = True
        compare(attention, inputs, padding[:, None, None], key_padding_mask=padding, need_weights=need_weights)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_input_without_batch_is_one_example(batch_first: bool) -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS, batch_first=batch_first, dtype=torch.float64)
    x = torch.randn(4, EMBED, dtype=torch.float64)
    results = []
    for inputs in (x, x[None] if batch_first else x[:, None]):
        attention.zero_grad()
        with KFACPreconditioner(attention, damping=1e-2) as ours:
            attention(inputs, inputs, inputs)[0].sin().sum().backward()
            assert all(s.counts.tolist() == [4, 1] for s in ours.engine.statistics)
            ours.precondition_()
            results.append([gradients(attention, attention)[part].clone() for part in PARTS])
    assert all(relative_error(one, other) <= TOLERANCE for one, other in zip(*results, strict=True))


def test_an_empty_batch() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    with KFACPreconditioner(attention) as ours:
        x = torch.zeros(4, 0, EMBED)
        attention(x, x, x)[0].sum().backward()
        assert all(s.counts.tolist() == [0, 0] for s in ours.engine.statistics)


def test_inputs_by_keyword_and_layers_by_name() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    model = nn.ModuleDict({"attention": attention})
    assert [x.name for x in find_layers(model)[0]] == [f"attention.{part}" for part in PARTS]
    x, y = torch.randn(4, 3, EMBED), torch.randn(5, 3, EMBED)
    with KFACPreconditioner(model) as ours:
        attention(query=x, key=y, value=y)[0].sum().backward()
        assert [s.counts.tolist() for s in ours.engine.statistics] == [[12, 3], [15, 3], [15, 3], [12, 3]]


def test_what_is_frozen_skipped_or_shared_is_left_out() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    attention.out_proj.weight.requires_grad_(False)
    assert [x.name for x in find_layers(attention)[0]] == ["q", "k", "v"]
    attention.requires_grad_(False)
    assert find_layers(attention) == ([], {"": "its weights are frozen"})
    attention.requires_grad_(True)
    model = nn.ModuleDict({"a": attention})
    layers, skipped = find_layers(model, skip="*.out_proj")
    assert ([x.name for x in layers], list(skipped)) == (["a.q", "a.k", "a.v"], ["a.out_proj"])
    assert find_layers(model, skip="a") == ([], {"a": "it is left out by skip or include"})
    other = nn.Linear(EMBED, EMBED)
    other.weight = attention.out_proj.weight
    layers, skipped = find_layers(nn.ModuleDict({"a": attention, "other": other}))
    assert layers == []
    assert skipped == dict.fromkeys(("a", "other"), "its weight is shared with another module")


def test_an_own_forward_that_calls_out_proj_is_its_own_affair() -> None:
    class Own(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(x)

    assert [x.name for x in find_layers(Own(EMBED, HEADS))[0]] == ["out_proj"]


def test_a_frozen_bias_is_no_column() -> None:
    attention = nn.MultiheadAttention(EMBED, HEADS)
    assert attention.in_proj_bias is not None
    attention.in_proj_bias.requires_grad_(False)
    assert [x.input_size for x in find_layers(attention)[0]] == [EMBED, EMBED, EMBED, EMBED + 1]


def test_rows_without_statistics_keep_their_gradient() -> None:
    """The keys' weights are a third of a parameter of which the rest is preconditioned."""
    attention = nn.MultiheadAttention(EMBED, HEADS, dtype=torch.float64)
    with KFACPreconditioner(attention, skip="k", damping=1e-2, kl_clip=None) as ours:
        loss_of(call(attention, sources("self", attention))).backward()
        before = gradients(attention, attention)["k"].clone()
        ours.precondition_()
        assert torch.equal(gradients(attention, attention)["k"], before)
        assert ours.factors().keys() == {"q", "v", "out_proj"}


def encoder(**options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 8, dropout=0.1, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2).double()


def test_a_whole_encoder_trains_without_a_warning() -> None:
    model = encoder()
    assert find_layers(model)[1] == {}
    x = torch.randn(16, 5, EMBED, dtype=torch.float64)
    target = torch.randn(16, 5, EMBED, dtype=torch.float64)
    losses = []
    with warnings.catch_warnings(), KFAC(model, lr=0.3, damping=1e-2) as optimizer:
        warnings.simplefilter("error")
        for _ in range(12):
            optimizer.zero_grad()
            loss = F.mse_loss(model(x), target)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert not optimizer.engine.progress.without_statistics
        assert len(optimizer.diagnostics()["layers"]) == len(optimizer.engine.layers)
        model.eval()
        with torch.no_grad():
            model(x)  # the fast path
    assert losses[-1] < 0.9 * losses[0]


def test_state_dict_carries_all_factors_of_a_packed_weight() -> None:
    model = encoder()
    x = torch.randn(4, 5, EMBED, dtype=torch.float64)
    first, second = KFAC(model), KFAC(model)
    loss_of(model(x)).backward()
    first.step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer))
    for name, factors in first.factors().items():
        assert all(torch.equal(a, b) for a, b in zip(second.factors()[name], factors, strict=True))
    assert relative_error(first.factors()["layers.0.self_attn.q"][1], first.factors()["layers.0.self_attn.v"][1]) > 0.1
    assert not second.engine.progress.without_statistics


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_factor(reentrant: bool) -> None:
    model = encoder().eval()  # without dropout
    x = torch.randn(4, 5, EMBED, dtype=torch.float64, requires_grad=True)
    found = []
    for run in (lambda: model(x), lambda: checkpoint(model, x, use_reentrant=reentrant)):
        with KFACPreconditioner(model) as ours:
            model.zero_grad()
            loss_of(run()).backward()
            counts = [s.counts.tolist() for s in ours.engine.statistics]
            ours.precondition_()
            found.append((counts, ours.factors()))
    assert found[0][0] == found[1][0]
    for name, factors in found[0][1].items():
        assert all(relative_error(a, b) <= 1e-12 for a, b in zip(found[1][1][name], factors, strict=True))
