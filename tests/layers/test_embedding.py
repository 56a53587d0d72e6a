"""Embeddings: A holds token frequencies; everything against one-hot matrices and dense systems in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import (
    DAMPING,
    Losses,
    assert_an_idle_expert_stays,
    assert_checkpoint_keeps_the_run,
    assert_close,
    kronecker_solve,
    preconditioned,
)
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.capture.diagonal_sums import squared_rows
from kfac_triton.kernels import ops
from kfac_triton.layers import Layer, Rows, find_layers

N, TOKENS, WIDTH, VOCABULARY, CLASSES = 6, 5, 4, 7, 3


class Net(nn.Module):
    """Embedding, something that mixes positions, a head."""

    def __init__(self, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH, dtype=dtype, **options)
        self.head = nn.Linear(WIDTH, CLASSES, dtype=dtype)
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embedding(x)
        self.seen = y.detach().requires_grad_() if not y.requires_grad else y
        return self.head(torch.tanh(self.seen.flatten(1, -2).sum(1) if x.dim() > 1 else self.seen))


def data(*shape: int) -> tuple[Tensor, Losses]:
    """Token 2 never comes, tokens repeat within an example."""
    x = torch.tensor([0, 1, 3, 4, 5, 6])[torch.randint(6, shape)]
    y = torch.randint(CLASSES, shape[:1])
    return x, lambda model: F.cross_entropy(model(x), y, reduction="none")


def frequencies(x: Tensor) -> Tensor:
    return torch.bincount(x.flatten(), minlength=VOCABULARY).double() / x.numel()


def output_gradients(model: Net, losses: Losses) -> Tensor:
    """Of single examples' losses, of which there is one an example: (N, T, WIDTH)."""
    gradient = torch.autograd.grad(losses(model).sum(), model.seen)[0]
    return gradient.reshape(N, -1, WIDTH)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(N,), (N, TOKENS), (N, 2, 3)], ids=str)
def test_factors_and_update(shape: tuple[int, ...], weight_sharing: str) -> None:
    x, losses = data(*shape)
    model = Net()
    one_hot = F.one_hot(x.reshape(N, -1), VOCABULARY).double()
    g = output_gradients(model, losses)
    if weight_sharing == "reduce":
        one_hot, g = one_hot.mean(1, keepdim=True), g.sum(1, keepdim=True)
    a_rows, g_rows = one_hot.flatten(0, 1), g.flatten(0, 1)
    a_truth, g_truth = a_rows.T @ a_rows / len(a_rows), g_rows.T @ g_rows / N
    if weight_sharing == "expand":  # nothing is lost with the rest of A
        assert_close(a_truth, torch.diag(frequencies(x)))
        assert_close(one_hot.flatten(0, 1).T @ g_rows, a_rows.T @ g_rows)
    preconditioner, before = preconditioned(model, losses, weight_sharing=weight_sharing)
    a, g_factor = preconditioner.factors()["embedding"]
    assert_close(a, a_truth.diagonal())
    assert_close(g_factor, g_truth)
    assert a[2] == 0
    expected = kronecker_solve(before[0].T, a_truth.diagonal(), g_truth).T
    assert_close(model.embedding.weight.grad, expected, 1e-10)
    assert (model.embedding.weight.grad[2] == 0).all()


@pytest.mark.parametrize("curvature", [{"exact_damping": True}, {"curvature": "ekfac"}], ids=["exact", "ekfac"])
def test_exact_damping(curvature: dict[str, Any]) -> None:
    model, losses = Net(), data(N, TOKENS)[1]
    preconditioner, before = preconditioned(model, losses, **curvature)
    a, g = preconditioner.factors()["embedding"]
    size = VOCABULARY * WIDTH
    fisher = torch.kron(torch.diag(a), g) + DAMPING * torch.eye(size, dtype=torch.float64)
    assert_close(model.embedding.weight.grad, torch.linalg.solve(fisher, before[0].flatten()).view_as(before[0]), 1e-10)


@pytest.mark.parametrize("oversize", ["diagonal", "block"])
def test_a_wide_embedding(oversize: str) -> None:
    """The vocabulary is no side to be cut; the dimension is."""
    model, losses = Net(), data(N, TOKENS)[1]
    g = output_gradients(model, losses).flatten(0, 1)
    g_truth = g.T @ g / N
    preconditioner, before = preconditioned(model, losses, max_factor_size=2, oversize=oversize, include="embedding")
    a, kept = preconditioner.factors()["embedding"]
    if oversize == "diagonal":
        assert_close(kept, g_truth.diagonal())
    else:
        assert_close(kept, torch.block_diag(g_truth[:2, :2], g_truth[2:, 2:]))
    assert a.shape == (VOCABULARY,)
    assert_close(model.embedding.weight.grad, kronecker_solve(before[0].T, a, kept).T, 1e-10)


def test_loss_terms_that_are_tokens() -> None:
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Tanh(), nn.Linear(WIDTH, CLASSES)).double()
    x, y = torch.randint(VOCABULARY, (N, TOKENS)), torch.randint(CLASSES, (N, TOKENS))
    outputs = []
    model[0].register_forward_hook(lambda module, args, out: outputs.append(out))

    def losses(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x).movedim(-1, 1), y, reduction="none")

    g = torch.autograd.grad(losses(model).sum(), outputs[-1])[0].flatten(0, 1)
    preconditioner, _ = preconditioned(model, losses, loss_terms="tokens")
    a, g_factor = preconditioner.factors()["0"]
    assert_close(a, frequencies(x))
    assert_close(g_factor, g.T @ g / len(g))


# Rows


def layer_of(module: nn.Module, weight_sharing: str = "expand", loss_terms: str = "examples") -> Layer:
    (layer,), _ = find_layers(module, weight_sharing, loss_terms)
    return layer


def diagonal(rows: Rows) -> Tensor:
    return squared_rows(rows.inputs[0], rows.input_window, VOCABULARY, torch.float64)


@settings(max_examples=60, deadline=None)
@given(shape=st.lists(st.integers(0, 5), max_size=3), reduce=st.booleans(), seed=st.integers(0, 2**32))
def test_diagonals_are_those_of_one_hot_rows(shape: list[int], reduce: bool, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.randint(VOCABULARY, shape[::-1]).permute(tuple(reversed(range(len(shape)))))  # not contiguous
    rows = layer_of(nn.Embedding(VOCABULARY, WIDTH), "reduce" if reduce else "expand").rows(x, torch.randn(*shape, WIDTH))
    one_hot = F.one_hot(x, VOCABULARY).double().reshape(shape[0] if shape else 1, torch.Size(shape[1:]).numel(), VOCABULARY)
    truth = one_hot.mean(1) if reduce else one_hot.flatten(0, 1)
    assert rows.input_count == len(truth)
    assert len(rows.inputs[0]) == len(rows.gradients[0]) == len(truth)
    torch.testing.assert_close(diagonal(rows), truth.nan_to_num().square().sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "weight_sharing", "loss_terms", "input_count", "terms"),
    [
        ((), "expand", "examples", 1, 1),
        ((), "reduce", "tokens", 1, 1),
        ((5,), "reduce", "tokens", 5, 5),
        ((3, 4), "expand", "examples", 12, 3),
        ((3, 4), "expand", "tokens", 12, 12),
        ((3, 4), "reduce", "examples", 3, 3),
        ((3, 4), "reduce", "tokens", 3, 12),
        ((3, 2, 4), "expand", "tokens", 24, 24),
        ((0, 4), "expand", "examples", 0, 0),
        ((0, 4), "reduce", "tokens", 0, 0),
    ],
)
def test_counts(shape: tuple[int, ...], weight_sharing: str, loss_terms: str, input_count: int, terms: int) -> None:
    layer = layer_of(nn.Embedding(VOCABULARY, WIDTH), weight_sharing, loss_terms)
    rows = layer.rows(torch.zeros(shape, dtype=torch.long), torch.randn(*shape, WIDTH))
    assert (rows.input_count, rows.terms) == (input_count, terms)
    assert rows.examples == (shape[0] if shape else 1)
    assert rows.input_window == rows.gradient_window == ops.ROWS


def test_rows_add_up_to_the_weight_gradient() -> None:
    module = nn.Embedding(VOCABULARY, WIDTH, dtype=torch.float64)
    x = torch.randint(VOCABULARY, (N, TOKENS))
    output = module(x)
    gradient = torch.randn_like(output)
    output.backward(gradient)
    rows = layer_of(module).rows(x, gradient)
    one_hot = F.one_hot(rows.inputs[0], VOCABULARY).double()
    assert_close(one_hot.T @ rows.gradients[0], module.weight.grad)


def test_reading_what_was_written_gives_the_gradients() -> None:
    module = nn.Embedding(VOCABULARY, WIDTH)
    module(torch.randint(VOCABULARY, (N,))).square().sum().backward()
    layer = layer_of(module)
    weight, bias = layer.gradient(0)
    assert bias is None
    assert weight is not None
    assert weight.shape == (layer.output_size, layer.input_size)
    ((parameter, update),) = layer.read_update([F.pad(weight, (0, 2, 0, 3))])
    assert parameter is module.weight
    assert torch.equal(update, module.weight.grad)


# Ways to run it


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("shape", [(), (N,), (N, TOKENS)], ids=str)
def test_indices_of_32_bits(shape: tuple[int, ...], weight_sharing: str) -> None:
    results = []
    x = torch.randint(VOCABULARY, shape)
    for dtype in (torch.int32, torch.int64):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, 2)).double()
        preconditioner = KFACPreconditioner(model, damping=DAMPING, weight_sharing=weight_sharing)
        model(x.to(dtype)).square().mean().backward()
        preconditioner.precondition_()
        results.append((model[0].weight.grad, *preconditioner.factors()["0"]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("padding", [0, 3])
def test_a_padding_token_counts_and_gets_no_update(padding: int) -> None:
    model = Net(padding_idx=padding)
    x, losses = data(N, TOKENS)
    x[:, 0] = padding
    preconditioner, before = preconditioned(model, losses)
    a, g = preconditioner.factors()["embedding"]
    assert_close(a, frequencies(x))
    assert (model.embedding.weight.grad[padding] == 0).all()
    assert_close(model.embedding.weight.grad, kronecker_solve(before[0].T, a, g).T, 1e-10)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_training_in_bfloat16(weight_sharing: str) -> None:
    model, losses = Net(torch.bfloat16), data(N, TOKENS)[1]
    preconditioner, before = preconditioned(model, losses, weight_sharing=weight_sharing)
    a, g = preconditioner.factors()["embedding"]
    assert a.dtype == g.dtype == torch.float32
    expected = kronecker_solve(before[0].T.double(), a.double(), g.double()).T
    assert_close(model.embedding.weight.grad.double(), expected, 1e-2)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_sampled_rows(weight_sharing: str) -> None:
    """Every second row of A and of G, the same ones."""
    x, losses = data(N, TOKENS)
    model = Net()
    g = output_gradients(model, losses)
    preconditioner, _ = preconditioned(model, losses, stats_fraction=0.5, weight_sharing=weight_sharing)
    one_hot = F.one_hot(x, VOCABULARY).double()
    rows, gradients = (one_hot.mean(1), g.sum(1)) if weight_sharing == "reduce" else (one_hot.flatten(0, 1), g.flatten(0, 1))
    a, g_factor = preconditioner.factors()["embedding"]
    assert_close(a, rows[::2].square().mean(0))
    assert_close(g_factor, gradients[::2].T @ gradients[::2] / N * 2)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_an_expert_without_tokens(weight_sharing: str) -> None:
    x = torch.randint(VOCABULARY, (N, TOKENS))
    pair = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
    assert_an_idle_expert_stays(*pair, x, weight_sharing=weight_sharing)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_checkpoints(weight_sharing: str) -> None:
    assert_checkpoint_keeps_the_run(Net, data(N, TOKENS)[1], weight_sharing=weight_sharing)


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
def test_compiled_training_is_eager_training(weight_sharing: str) -> None:
    x = torch.randint(VOCABULARY, (N, TOKENS))
    results = []
    for compiled in (False, True):
        torch.manual_seed(2)
        torch.compiler.reset()
        model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
        preconditioner = KFACPreconditioner(model, damping=DAMPING, weight_sharing=weight_sharing)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(x).square().mean().backward()
        preconditioner.precondition_()
        results.append(preconditioner.factors()["0"])
    torch.compiler.reset()
    for eager, other in zip(*results, strict=True):
        assert_close(other, eager)


# Which embeddings


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"sparse": True}, "sparse"), ({"scale_grad_by_freq": True}, "frequencies"), ({"max_norm": 1.0}, "max_norm")],
    ids=lambda value: str(value),
)
def test_embeddings_with_another_gradient_are_left_out(options: dict[str, Any], reason: str) -> None:
    layers, skipped = find_layers(Net(**options))
    assert [layer.name for layer in layers] == ["head"]
    assert reason in skipped["embedding"]


def test_frozen_and_bag_embeddings_are_left_out() -> None:
    model = nn.ModuleList([nn.Embedding(3, 2).requires_grad_(False), nn.EmbeddingBag(3, 2)])
    layers, skipped = find_layers(model)
    assert layers == []
    assert skipped == {"0": "its weight is frozen"}


def test_embeddings_that_share_a_weight_are_one_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.source, self.target = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
            self.target.weight = self.source.weight

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.source(x[:, 0])) * self.target(x[:, 1])

    model = Two().double()
    x = torch.randint(VOCABULARY, (N, 2))
    preconditioner = KFACPreconditioner(model, damping=DAMPING)
    model(x).square().mean().backward()
    preconditioner.precondition_()
    ((name, (a, _)),) = preconditioner.factors().items()
    assert name == "source"
    assert_close(a, frequencies(x))
    model.target.max_norm = 1.0
    assert find_layers(model)[0] == []
