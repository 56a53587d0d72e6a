"""An embedding and a decoder that share a weight, against the two uses by hand."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.helpers import relative_error
from support.tied import DIM, PICKS, TOKENS, TOLERANCE, Model, Recorder, best, factors_of, loss_of, product, tokens_of
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.layers import find_layers
from kfac_triton.layers.embedding import EmbeddingLayer
from kfac_triton.layers.linear import LinearLayer
from kfac_triton.layers.tied import TiedLayer


@pytest.mark.parametrize("pick", PICKS)
@pytest.mark.parametrize("decoder_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_factors_are_the_joined_ones(bias: bool, decoder_first: bool, pick: str) -> None:
    model = Model(bias, decoder_first, pick)
    recorder = Recorder(model)
    # The loss is a mean over the tokens that are picked, whose number the argument of the model does not tell.
    a, g = factors_of(model, tokens_of(), loss_terms="tokens" if pick == "masked" else "examples")
    k = recorder.kronecker(bias=bias)
    u = best(k)
    assert relative_error(a, k["C_d"] + u * k["C_e"]) <= TOLERANCE
    assert relative_error(g, k["r_d"] + k["r_e"] / u) <= TOLERANCE


@pytest.mark.parametrize("settings", [{"weight_sharing": "reduce"}, {"loss_terms": "tokens"}], ids=str)
def test_both_uses_follow_the_settings(settings: dict[str, str]) -> None:
    model = Model()
    recorder = Recorder(model)
    a, g = factors_of(model, tokens_of(), **settings)
    k = recorder.kronecker(reduce="weight_sharing" in settings, terms_are_tokens="loss_terms" in settings)
    u = best(k)
    assert relative_error(a, k["C_d"] + u * k["C_e"]) <= TOLERANCE
    assert relative_error(g, k["r_d"] + k["r_e"] / u) <= TOLERANCE


def test_they_bound_the_sum_from_above_and_no_other_does_so_more_closely() -> None:
    model = Model()
    recorder = Recorder(model)
    a, g = factors_of(model, tokens_of())
    k = recorder.kronecker()
    both = product(k["C_d"], k["r_d"]) + product(k["C_e"], k["r_e"])
    excess = product(a, g) - both
    assert float(torch.linalg.eigvalsh(excess).min()) >= -1e-12 * float(torch.linalg.matrix_norm(both, 2))
    assert float(torch.linalg.eigvalsh(excess).max()) > 0

    def excess_trace(u: float) -> float:
        return float((k["r_d"] + k["r_e"] / u).sum() * (k["C_d"] + u * k["C_e"]).trace() - both.trace())

    u = best(k)
    assert excess.trace() == pytest.approx(excess_trace(u))
    assert excess_trace(u) < min(excess_trace(0.9 * u), excess_trace(1.1 * u))


def test_the_update_is_that_of_the_joined_factors() -> None:
    model, batch = Model(), tokens_of()
    loss_of(model(batch[0]), batch[1]).backward()
    weight, bias = model.decoder.weight.grad, model.decoder.bias.grad
    assert weight is not None
    assert bias is not None
    gradient = torch.cat([weight, bias[:, None]], 1)
    model.zero_grad()
    with KFACPreconditioner(model, damping=1e-2, kl_clip=None) as ours:
        loss_of(model(batch[0]), batch[1]).backward()
        ours.precondition_()
        a, g = ours.factors()["embedding"]
        split = ours.engine.curvature.split
        assert split is not None
        expected = gradient / (g + split.g[0])[:, None] @ torch.linalg.inv(a + split.a[0] * torch.eye(DIM + 1).double())
        assert relative_error(torch.cat([model.decoder.weight.grad, model.decoder.bias.grad[:, None]], 1), expected) <= 1e-8


def test_units_do_not_depend_on_the_reduction_or_the_loss_scale() -> None:
    model, (tokens, targets) = Model(), tokens_of()
    expected = factors_of(model, (tokens, targets))
    found = factors_of(model, (tokens, targets), scale=1024.0)
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))
    with KFACPreconditioner(model, damping=1e-2, loss_reduction="sum") as ours:
        model.zero_grad()
        (loss_of(model(tokens), targets) * len(tokens)).backward()
        ours.precondition_()
        found = ours.factors()["embedding"]
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pick", ["all tokens", "last token"])
def test_accumulated_passes_are_one(pick: str) -> None:
    model, (tokens, targets) = Model(pick=pick), tokens_of(6)
    whole = factors_of(model, (tokens, targets))
    parts = factors_of(model, *((tokens[i : i + 2], targets[i : i + 2]) for i in (0, 2, 4)))
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(parts, whole, strict=True))


def test_the_second_step_does_not_see_the_first() -> None:
    """Sums are overwritten, never cleared; with no past (ema_decay 0) factors are those of the last step alone."""
    model, batches = Model(), [tokens_of(), tokens_of(4, 6)]
    with KFACPreconditioner(model, damping=1e-2, ema_decay=0.0) as ours:
        for tokens, targets in batches:
            model.zero_grad()
            loss_of(model(tokens), targets).backward()
            ours.precondition_()
        found = ours.factors()["embedding"]
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, factors_of(model, batches[1]), strict=True))


@pytest.mark.parametrize("earlier", [False, True], ids=["first step", "after both"])
@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
@pytest.mark.parametrize("use", ["embedding", "decoder"])
def test_one_use_alone(use: str, loss_terms: str, earlier: bool) -> None:
    """It is what the layer would be without the other, whatever an earlier step left."""
    model, (tokens, targets) = Model(), tokens_of()
    x = torch.randn(6, DIM, dtype=torch.float64)

    def loss() -> Tensor:
        return (
            model.embedding(tokens).sin().sum(1).mean()
            if use == "embedding"
            else F.cross_entropy(model.decoder(x), targets[:, 0])
        )

    with KFACPreconditioner(model, damping=1e-2, ema_decay=0.0, loss_terms=loss_terms) as ours, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if earlier:
            loss_of(model(tokens), targets).backward()
            ours.precondition_()
            model.zero_grad()
        loss().backward()
        ours.precondition_()
        a, g = ours.factors()["embedding"]
    alone = nn.ModuleDict({use: getattr(Model(), use)})
    alone[use].load_state_dict(getattr(model, use).state_dict())
    model = alone  # type: ignore[assignment]
    with KFACPreconditioner(alone, damping=1e-2, max_factor_size=8, loss_terms=loss_terms) as truth:
        loss().backward()
        truth.precondition_()
        true_a, true_g = truth.factors()[use]
    if use == "embedding":
        bordered = F.pad(true_g, (0, 1, 0, 1))
        assert relative_error(product(a, g), torch.kron(torch.diag(true_a), bordered)) <= TOLERANCE
    else:
        assert relative_error(product(a, g), product(true_a, true_g)) <= TOLERANCE


@pytest.mark.parametrize("oversize", ["diagonal", "block"])
def test_a_side_beyond_the_largest_size(oversize: str) -> None:
    model, batch = Model(), tokens_of()
    full, g = factors_of(model, batch)
    a, other_g = factors_of(model, batch, max_factor_size=4, oversize=oversize)
    expected = full.diagonal() if oversize == "diagonal" else torch.block_diag(full[:2, :2], full[2:, 2:])
    assert relative_error(a, expected) <= TOLERANCE
    assert relative_error(other_g, g) <= TOLERANCE


def test_fisher_by_columns_counts_tokens_once() -> None:
    """Of the columns of a GGN the tokens are the same, and the gradients of both uses sum up."""
    model, (tokens, targets) = Model(bias=False, pick="last token"), tokens_of()
    loss = nn.CrossEntropyLoss()
    with KFACPreconditioner(model, damping=1e-2, fisher="ggn", loss=loss) as ours:
        logits = model(tokens)
        ours.accumulate_fisher(logits, targets[:, 0])
        loss(logits, targets[:, 0]).backward()
        ours.precondition_()
        a, g = ours.factors()["embedding"]
    embedded = model.embedding(tokens).detach().requires_grad_()
    hidden = torch.tanh(model.middle(embedded))[:, -1]
    logits = model.decoder(hidden)
    p = logits.softmax(-1).detach()
    c_e, r_d = torch.zeros(DIM, DIM, dtype=torch.float64), torch.zeros(TOKENS, dtype=torch.float64)
    for c in range(TOKENS):
        column = p[:, c : c + 1].sqrt() * (F.one_hot(torch.tensor(c), TOKENS) - p)
        (e,) = torch.autograd.grad(logits, embedded, column, retain_graph=True)
        e = e.reshape(-1, DIM)
        c_e, r_d = c_e + e.T @ e / len(tokens), r_d + column.square().sum(0) / len(tokens)
    r_e = torch.bincount(tokens.flatten(), minlength=TOKENS).double() / tokens.numel()
    c_d = hidden.T.detach() @ hidden.detach() / len(tokens)
    u = best({"r_e": r_e, "r_d": r_d, "C_d": c_d, "C_e": c_e})
    assert relative_error(product(a, g), product(c_d + u * c_e, r_d + r_e / u)) <= TOLERANCE


@pytest.mark.parametrize("settings", [{"stats_fraction": 0.5}, {"max_stats_tokens": 6}], ids=str)
def test_sampled_rows_are_those_of_a_smaller_batch(settings: dict[str, Any]) -> None:
    """Every row of the batch twice in a row: half of the rows is all there is to know."""
    model, (tokens, targets) = Model(), tokens_of(6, 1)
    doubled = tokens.repeat_interleave(2, 0), targets.repeat_interleave(2, 0)
    expected = factors_of(model, (tokens, targets))
    found = factors_of(model, doubled, **settings)
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))


def test_sampled_rows_of_uses_that_have_different_numbers_of_them() -> None:
    """Two equal tokens an example: of the decoder's rows every third is taken, of the embedding's one in five."""
    model, (tokens, targets) = Model(pick="mean"), tokens_of(6, 1)
    tokens, targets = tokens.repeat_interleave(15, 0).expand(-1, 2), targets.repeat_interleave(15, 0)
    expected = factors_of(model, (tokens, targets))
    found = factors_of(model, (tokens, targets), max_stats_tokens=36)
    assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(found, expected, strict=True))


def test_a_diagonal_is_not_split() -> None:
    model, batch = Model(), tokens_of()
    expected = factors_of(model, batch)
    found = factors_of(model, batch, split={"embedding": TOKENS})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("decoder_first", [False, True])
def test_compiled_is_eager(decoder_first: bool) -> None:
    torch.compiler.reset()
    model, (tokens, targets) = Model(decoder_first=decoder_first), tokens_of()
    name = "decoder" if decoder_first else "embedding"
    found = []
    for compiled in (False, True):
        with KFACPreconditioner(model, damping=1e-2) as ours:
            model.zero_grad()
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            loss_of(run(tokens), targets).backward()
            ours.precondition_()
            found.append(ours.factors()[name])
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(*found, strict=True))


def test_not_finite_statistics_of_either_use_are_dropped() -> None:
    model, (tokens, targets) = Model(), tokens_of()
    with KFACPreconditioner(model, damping=1e-2) as ours:
        loss_of(model(tokens), targets).backward()
        ours.precondition_()
        before = ours.factors()["embedding"]
        output = model.embedding(tokens)
        output.backward(torch.full_like(output, math.nan))
        loss_of(model(tokens), targets).backward()
        ours.precondition_()
        assert ours.engine.dropped_statistics[0] == 1
        assert all(torch.equal(a, b) for a, b in zip(ours.factors()["embedding"], before, strict=True))
        model.zero_grad()
        loss_of(model(tokens), targets).backward()
        ours.precondition_()
        assert all(bool(torch.isfinite(x).all()) for x in ours.factors()["embedding"])


def tied(*modules: nn.Module) -> list[Any]:
    for module in modules[1:]:
        module.weight = modules[0].weight  # type: ignore[assignment]
    layers, skipped = find_layers(nn.ModuleList(modules))
    return [layers, skipped]


def test_what_can_be_tied() -> None:
    def decoder(bias: bool = False) -> nn.Linear:
        return nn.Linear(DIM, TOKENS, bias)

    def embedding(**options: Any) -> nn.Embedding:
        return nn.Embedding(TOKENS, DIM, **options)

    (layer,), _ = tied(embedding(), decoder(True))
    assert type(layer) is TiedLayer
    assert layer.has_bias
    assert (layer.input_size, layer.output_size) == (DIM + 1, TOKENS)
    (layer,), _ = tied(decoder(True), embedding(), decoder(True), embedding())
    assert type(layer) is TiedLayer
    assert not layer.has_bias
    assert [layer.uses_weight_transposed(i) for i in range(4)] == [False, True, False, True]
    (layer,), _ = tied(embedding(), embedding())
    assert type(layer) is EmbeddingLayer
    (layer,), _ = tied(decoder(), decoder())
    assert type(layer) is LinearLayer
    for options in ({"max_norm": 1.0}, {"sparse": True}, {"scale_grad_by_freq": True}):
        layers, skipped = tied(embedding(**options), decoder())
        assert layers == []
        assert "its weight is shared with another module" in skipped.values()

    class Own(nn.Linear):
        pass

    assert tied(embedding(), Own(DIM, TOKENS))[0] == []
    assert tied(embedding(), decoder(), Own(DIM, TOKENS))[0] == []
    assert TiedLayer.tie([embedding(), embedding()]) is None
    assert TiedLayer.tie([decoder(), decoder()]) is None


def train(model: nn.Module, steps: int = 25, **settings: Any) -> list[float]:
    """Losses of learning that a token's successor is the next one."""
    losses = []
    with KFAC(model, lr=0.5, damping=1e-2, loss_terms="tokens", **settings) as optimizer:
        for _ in range(steps):
            tokens = torch.randint(TOKENS, (8, 6))
            optimizer.zero_grad()
            loss = F.cross_entropy(model(tokens).movedim(-1, 1), (tokens + 1) % TOKENS)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("settings", [{}, {"curvature": "ekfac"}, {"weight_sharing": "reduce"}], ids=str)
def test_a_tied_language_model_trains(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses = train(Model(), **settings)
    assert losses[-1] < 0.5 * losses[0]


def test_a_functional_decoder_trains() -> None:
    """Its use of the weight is not seen, and the embedding's alone is the curvature."""

    class Functional(Model):
        def __init__(self) -> None:
            super().__init__()
            del self.decoder
            self.embedding.weight = nn.Parameter(self.embedding.weight.detach().clone())

        def forward(self, tokens: Tensor) -> Tensor:
            return F.linear(torch.tanh(self.middle(self.embedding(tokens))), self.embedding.weight)

    losses = train(Functional())
    assert losses[-1] < 0.7 * losses[0]


def test_a_use_in_some_of_the_calls_has_loss_terms_of_its_own() -> None:
    """Both calls embed, and only one decodes: the decoder has the terms of that call, the embedding those of both."""

    class Either(Model):
        def forward(self, tokens: Tensor, decodes: bool = True) -> Tensor:
            hidden = torch.tanh(self.middle(self.embedding(tokens)))
            return self.decoder(hidden) if decodes else hidden

    model = Either(bias=False)
    first, second = torch.randint(TOKENS, (10, 4)), torch.randint(TOKENS, (20, 4))
    kept: dict[str, list[tuple[Tensor, Tensor]]] = {"embedding": [], "decoder": []}
    handles = [
        getattr(model, name).register_forward_hook(lambda m, args, out, uses=uses: uses.append((args[0].detach(), out)))
        for name, uses in kept.items()
    ]

    def loss() -> Tensor:
        return model(first).square().sum((1, 2)).mean() + model(second, False).square().sum((1, 2)).mean()

    value = loss()
    for handle in handles:
        handle.remove()
    outputs = [out for uses in kept.values() for _, out in uses]
    one, two, decoded = (g.flatten(0, 1) for g in torch.autograd.grad(value, outputs))
    hidden = kept["decoder"][0][0].flatten(0, 1)
    words = F.one_hot(torch.cat([first.flatten(), second.flatten()]), TOKENS).double()
    k = {
        "C_d": hidden.T @ hidden / len(hidden),
        "r_d": 10 * decoded.square().sum(0),
        "C_e": 10 * one.T @ one + 20 * two.T @ two,
        "r_e": words.sum(0) / len(words),
    }
    with KFACPreconditioner(model, damping=1e-2) as ours:
        loss().backward()
        ours.precondition_()
        a, g = next(pair for pair in ours.factors().values() if len(pair[1]) == TOKENS)
    u = best(k)
    assert relative_error(a, k["C_d"] + u * k["C_e"]) <= TOLERANCE
    assert relative_error(g, k["r_d"] + k["r_e"] / u) <= TOLERANCE
