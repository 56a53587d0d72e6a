"""Likelihoods against Hessians of PyTorch's losses by brute force, and against their own draws."""

from __future__ import annotations

import copy

import pytest
import torch
from support.helpers import relative_error
from support.loss_cases import (
    BCE,
    CASES,
    CE,
    DRAWS,
    MSE,
    TOLERANCE,
    WEIGHTS,
    Case,
    Poisson,
    every_case,
    from_columns,
    hessian,
    moment_errors,
)
from torch import Generator, Tensor, nn

from kfac_triton.fisher.distributions import Bernoulli, Categorical, Gaussian
from kfac_triton.fisher.likelihood import Likelihood
from kfac_triton.fisher.losses import likelihood_of


@every_case
def test_columns_are_a_square_root_of_the_hessian(case: Case) -> None:
    outputs, targets = case.data()
    truth = hessian(case, outputs, targets)
    assert relative_error(from_columns(case.likelihood, case, outputs, targets), truth) <= TOLERANCE


@every_case
def test_products_are_those_of_the_hessian(case: Case) -> None:
    outputs, targets = case.data()
    vector = torch.randn_like(outputs)
    product = case.likelihood.hessian_product(outputs, vector, targets)
    truth = (hessian(case, outputs, targets) @ vector.flatten()).reshape(case.shape)
    assert relative_error(product, truth) <= TOLERANCE


@every_case
def test_a_default_product_is_that_of_the_columns(case: Case) -> None:
    """What a user's class inherits, with the columns of all likelihoods."""
    outputs, targets = case.data()
    vector = torch.randn_like(outputs)
    likelihood = case.likelihood
    product = Likelihood.hessian_product(likelihood, outputs, vector, targets)
    assert relative_error(product, likelihood.hessian_product(outputs, vector, targets)) <= TOLERANCE


@every_case
def test_the_loss_is_the_mean_or_sum_of_its_terms(case: Case) -> None:
    outputs, targets = case.data()
    each = copy.copy(case.loss)
    each.reduction = "none"
    terms = each(outputs, targets)
    if not isinstance(case.loss, CE) and outputs.ndim > 1:
        terms = terms.mean(-1) if case.loss.reduction == "mean" else terms.sum(-1)
    total = terms.sum() / case.likelihood.terms(outputs, targets) if case.loss.reduction == "mean" else terms.sum()
    torch.testing.assert_close(total, case.loss(outputs, targets), rtol=TOLERANCE, atol=0)
    assert case.likelihood.reduction == case.loss.reduction or case.own


@pytest.mark.parametrize(
    ("likelihood", "shape", "terms", "each"),
    [
        (Categorical(), (5,), 1, 1),
        (Categorical(), (6, 5), 6, 1),
        (Categorical(), (3, 5, 4, 2), 24, 8),
        (Gaussian(), (6,), 6, 1),
        (Bernoulli(), (6, 3), 6, 1),
        (Gaussian(), (3, 5, 4, 2), 60, 20),
        (Poisson(), (3, 5, 4), 15, 5),
    ],
)
def test_terms_from_shapes(likelihood: Likelihood, shape: tuple[int, ...], terms: int, each: int) -> None:
    assert likelihood.terms(torch.zeros(shape)) == terms
    assert isinstance(likelihood.terms(torch.zeros(shape)), int)
    assert likelihood.terms_per_example(torch.zeros(shape)) == each


def test_ignored_targets_are_not_counted_and_have_no_curvature() -> None:
    outputs, targets = torch.randn(4, 5), torch.tensor([1, -100, 0, -100])
    likelihood = likelihood_of(CE())
    terms = likelihood.terms(outputs, targets)
    assert isinstance(terms, Tensor)
    assert terms.shape == ()
    assert terms == 2
    assert likelihood.terms(outputs) == 4  # without targets nothing is ignored
    for rows in [likelihood.sample(outputs, targets), likelihood.hessian_product(outputs, outputs, targets)]:
        assert (rows[[1, 3]] == 0).all()
        assert (rows[[0, 2]] != 0).all()
    assert (likelihood.sample(outputs) != 0).all()
    weighted = likelihood_of(CE(WEIGHTS.float()))
    assert weighted.terms(outputs, targets) == 2.5
    byte = torch.tensor([156], dtype=torch.uint8)  # -100 in eight bits
    assert likelihood.terms(torch.zeros(1, 200), byte) == 1
    assert likelihood.sample(torch.zeros(1, 200), byte).any()


def test_the_likelihoods_of_losses_by_their_own_names() -> None:
    """A Gaussian of variance v is -log N(f, v), whatever D is; a mean over outputs divides by D."""
    f = torch.randn(4, 3, dtype=torch.float64)
    one = torch.ones_like(f)
    torch.testing.assert_close(Gaussian(0.2).hessian_product(f, one), one / 0.2)
    torch.testing.assert_close(Gaussian(0.2, over_outputs="mean").hessian_product(f, one), one / 0.6)
    p = f.sigmoid()
    torch.testing.assert_close(Bernoulli().hessian_product(f, one), p * (1 - p))
    torch.testing.assert_close(Bernoulli("sum", over_outputs="mean").hessian_product(f, one), p * (1 - p) / 3)
    density = torch.func.hessian(lambda m: -torch.distributions.Normal(m, 0.2**0.5).log_prob(one[0]).sum())(f[0])
    torch.testing.assert_close(density, torch.eye(3, dtype=torch.float64) / 0.2)


# Draws


@pytest.mark.parametrize("case", [CASES[name] for name in CASES if name != "ce-one-term"])  # which cannot be repeated
def test_the_second_moment_of_draws_is_the_hessian(case: Case) -> None:
    """A term is repeated, so that one call draws all: the repetitions must be independent. Within 5 sigma."""
    outputs, targets = case.data()
    outputs /= 4  # no class so rare that 5 sigma are another probability than a Gaussian's
    diagonal = hessian(case, outputs, targets).diagonal().reshape(case.shape)
    number = max(range(len(outputs)), key=lambda i: int(diagonal[i].count_nonzero()))  # not one that is ignored
    assert diagonal[number].any()
    loss, likelihood = copy.copy(case.loss), case.likelihood
    if isinstance(loss, BCE) and loss.weight is not None and loss.weight.ndim > 1:
        loss.weight = loss.weight[[number]]
        likelihood = likelihood_of(loss)
    f, y = outputs[[number]], targets[[number]]
    one = Case(loss, tuple(f.shape), own=lambda: likelihood)
    truth = hessian(one, f, y)  # of one example: blocks for its tokens, zeros between them
    n = DRAWS // (1 if f.numel() <= 6 else 4)
    draws = likelihood.sample(f.expand(n, *f.shape[1:]), y.expand(n, *y.shape[1:])).reshape(n, -1)
    assert moment_errors(draws, draws, truth).max() < 5
    assert moment_errors(draws[0::2], draws[1::2], torch.zeros_like(truth)).max() < 5
    assert (draws.mean(0).abs() <= 5 * draws.std(0) / n**0.5).all()


def test_default_draws_have_the_second_moment_of_columns() -> None:
    """What a user's class inherits, where H is not diagonal: one sign a term and column."""
    f = torch.randn(1, 4, 2, dtype=torch.float64)
    draws = Likelihood.sample(Categorical(), f.expand(DRAWS, 4, 2)).flatten(1)
    case = Case(CE(), (1, 4, 2), classes=True)
    truth = hessian(case, f, torch.zeros(1, 2).long())
    assert moment_errors(draws, draws, truth).max() < 5
    assert moment_errors(draws[0::2], draws[1::2], torch.zeros_like(truth)).max() < 5


def test_classes_are_drawn_with_their_probabilities() -> None:
    """From the draws themselves, s = p - e_k, and with a mass, which scales it by the root."""
    f = torch.tensor([1.0, -2.0, 0.5, 3.0, -6.0], dtype=torch.float64)
    p = f.softmax(0)
    for likelihood, root in ((Categorical(), 1.0), (Categorical(weight=4 * torch.ones(5)), 2.0)):
        draws = likelihood.sample(f.expand(DRAWS, 5), torch.zeros(DRAWS, dtype=torch.long))
        labels = draws.argmin(1)
        torch.testing.assert_close(draws, root * (p - nn.functional.one_hot(labels, 5)))
        frequency = torch.bincount(labels, minlength=5) / DRAWS
        assert ((frequency - p).abs() < 5 * (p * (1 - p) / DRAWS).sqrt()).all()


def test_yes_and_no_are_drawn_with_their_probabilities() -> None:
    f = torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64)
    p = f.sigmoid()
    draws = likelihood_of(BCE()).sample(f.expand(DRAWS, 3))
    yes = draws < 0
    torch.testing.assert_close(draws, (p - yes.double()) / 3**0.5)
    assert ((yes.double().mean(0) - p).abs() < 5 * (p * (1 - p) / DRAWS).sqrt()).all()


def test_draws_of_a_gaussian_are_gaussian() -> None:
    """Its fourth moment is thrice the squared variance; that of random signs is the squared variance."""
    draws = likelihood_of(MSE()).sample(torch.zeros(DRAWS, 2, dtype=torch.float64))
    assert draws.pow(4).mean().item() == pytest.approx(3.0, rel=0.05)


@every_case
def test_a_generator_determines_the_draws(case: Case) -> None:
    outputs, targets = case.data()
    likelihood = case.likelihood
    seeds = (3, 3, 4)
    same, again, other = (likelihood.sample(outputs, targets, Generator().manual_seed(seed)) for seed in seeds)
    state = torch.get_rng_state()
    likelihood.sample(outputs, targets, Generator())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(same, again)
    if outputs.shape[0] > 5 or outputs.ndim > 2:
        assert not torch.equal(same, other)
