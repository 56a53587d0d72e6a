"""Likelihoods of losses against curvlinops; types, graphs, values; what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from curvlinops import FisherType, KFACLinearOperator, KFACType
from curvlinops.fisher import make_grad_output_sampler
from curvlinops.kfac_utils import loss_hessian_matrix_sqrt
from support.helpers import relative_error
from support.loss_cases import BCE, CASES, CE, DRAWS, MSE, TOLERANCE, WEIGHTS, Case, Poisson, every_case, hessian, moment_errors
from torch import Generator, Tensor, nn

from kfac_triton.fisher.distributions import Bernoulli, Categorical, Gaussian
from kfac_triton.fisher.likelihood import Likelihood
from kfac_triton.fisher.losses import likelihood_of

# curvlinops


@pytest.mark.parametrize("case", ["ce", "mse", "mse-sum", "bce", "bce-sum"])
def test_square_roots_of_curvlinops(case: str) -> None:
    loss, (outputs, targets) = CASES[case].loss, CASES[case].data()
    columns = torch.stack(list(likelihood_of(loss).columns(outputs, targets)), -1)
    for f, y, ours in zip(outputs.split(1), targets.split(1), columns, strict=True):
        torch.testing.assert_close(ours, loss_hessian_matrix_sqrt(f, y, loss), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", ["ce", "mse", "bce"])
def test_draws_of_curvlinops_differ_by_the_mean_over_outputs(case: str) -> None:
    """Its sampler leaves 1/D of "mean" to its caller, which divides the outer product by it."""
    loss, (outputs, targets) = CASES[case].loss, CASES[case].data()
    theirs = make_grad_output_sampler(loss)(outputs[:1], DRAWS, targets[:1], Generator().manual_seed(0))[:, 0].double()
    truth = hessian(Case(loss, (1, outputs.shape[1])), outputs[:1], targets[:1])
    ours = likelihood_of(loss).sample(outputs[:1].expand(DRAWS, -1))
    divisor = 1 if isinstance(loss, CE) else outputs.shape[1]
    assert moment_errors(theirs / divisor**0.5, theirs / divisor**0.5, truth).max() < 5
    assert moment_errors(ours, ours, truth).max() < 5


class _Tokens(nn.Module):
    """(N, T, in) to logits (N, classes, T)."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.head = nn.Linear(*sizes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x).movedim(-1, 1)


@pytest.mark.parametrize("fisher", [FisherType.TYPE2, FisherType.MC])
@pytest.mark.parametrize("case", ["ce", "ce-sum", "ce-tokens", "mse", "mse-sum", "mse-tokens", "bce", "bce-sum", "bce-tokens"])
def test_factor_of_curvlinops(case: str, fisher: FisherType) -> None:
    """G of a last layer is the mean over terms of H_n, of a sum loss the sum. Monte Carlo has the same scale."""
    loss, (outputs, targets) = CASES[case].loss, CASES[case].data()
    size = CASES[case].shape[CASES[case].class_dim if CASES[case].classes else -1]
    tokens = CASES[case].classes and outputs.ndim > 2
    model = (_Tokens if tokens else nn.Linear)(2, size).double()
    x = torch.randn(*(outputs.movedim(1, -1) if tokens else outputs).shape[:-1], 2, dtype=torch.float64)
    oracle = KFACLinearOperator(
        nn.Sequential(model),
        loss,
        list(model.parameters()),
        [(x, targets)],
        fisher_type=fisher,
        mc_samples=3000 if fisher == FisherType.MC else 1,
        kfac_approx=KFACType.EXPAND,
        check_deterministic=False,
    )
    oracle.compute_kronecker_factors()
    (theirs,) = oracle._gradient_covariances.values()
    likelihood, f = likelihood_of(loss), model(x)
    terms = likelihood.terms(f, targets) if loss.reduction == "mean" else 1
    flat = [(c.movedim(1, -1) if tokens else c).reshape(-1, size) for c in likelihood.columns(f, targets)]
    ours = sum((c.T @ c for c in flat), torch.zeros(size, size)) / terms
    assert relative_error(ours, theirs) <= (TOLERANCE if fisher == FisherType.TYPE2 else 0.05)


# Types, graphs, values


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_float32_rounded_once(case: Case, dtype: torch.dtype) -> None:
    outputs, targets = case.data()
    if targets.is_floating_point():
        targets = targets.to(dtype)
    half, vector, likelihood = outputs.to(dtype), torch.randn(case.shape).to(dtype), case.likelihood
    if case.own:
        assert likelihood.sample(half, targets).dtype == likelihood.hessian_product(half, vector, targets).dtype == dtype
        return

    def results(f: Tensor, v: Tensor) -> list[Tensor]:
        drawn = likelihood.sample(f, targets, Generator().manual_seed(0))
        return [drawn, likelihood.hessian_product(f, v, targets), *likelihood.columns(f, targets)]

    for low, full in zip(results(half, vector), results(half.float(), vector.float()), strict=True):
        assert low.dtype == dtype
        assert torch.equal(low, full.to(dtype))


@every_case
def test_results_have_no_graph_and_leave_no_gradient(case: Case) -> None:
    outputs, targets = case.data()
    outputs.requires_grad_()
    if targets.is_floating_point():
        targets.requires_grad_()  # a teacher's
    vector = torch.randn_like(outputs).requires_grad_()
    likelihood = case.likelihood
    before = outputs.detach().clone()
    results = [likelihood.sample(outputs, targets), likelihood.hessian_product(outputs, vector, targets)]
    results += [Likelihood.sample(likelihood, outputs, targets), *likelihood.columns(outputs, targets)]
    assert not any(x.requires_grad or x.grad_fn for x in results)
    assert outputs.grad is None
    assert torch.equal(outputs, before)
    terms = likelihood.terms(outputs, targets)
    assert isinstance(terms, int) or not terms.requires_grad
    columns = list(likelihood.columns(outputs, targets))
    assert len({x.data_ptr() for x in columns}) == len(columns)  # to be kept, not one buffer


@every_case
def test_no_value_is_read(case: Case) -> None:
    """On the meta device there is none: what would make the host wait for a device raises."""
    outputs, targets = (x.to("meta") for x in case.data())
    likelihood = case.likelihood
    likelihood.check(outputs, targets)
    likelihood.terms(outputs, targets)
    results = [likelihood.sample(outputs, targets), likelihood.hessian_product(outputs, outputs, targets)]
    results += [Likelihood.sample(likelihood, outputs, targets), *likelihood.columns(outputs, targets)]
    assert all(x.is_meta and x.shape == outputs.shape for x in results)


@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli()])
def test_a_nan_stays_where_it_is(likelihood: Likelihood) -> None:
    outputs = torch.randn(3, 4)
    outputs[1, 2] = torch.nan
    for result in [likelihood.sample(outputs), likelihood.hessian_product(outputs, outputs), *likelihood.columns(outputs)]:
        assert torch.isfinite(result[[0, 2]]).all()
    assert likelihood.sample(outputs)[1].isnan().any()


def test_extreme_outputs_are_finite() -> None:
    outputs = torch.tensor([[1e4, 0.0, -1e4, -torch.inf], [0.0, 0.0, -torch.inf, -torch.inf]])
    likelihood = Categorical()
    for result in [likelihood.sample(outputs), *likelihood.columns(outputs)]:
        assert torch.isfinite(result).all()
    assert torch.isfinite(likelihood.hessian_product(outputs, torch.ones(2, 4))).all()
    assert torch.isfinite(torch.stack(list(Bernoulli().columns(outputs.nan_to_num())))).all()


def test_confident_outputs_keep_their_curvature() -> None:
    """1 - sigmoid(f) would be zero in float32."""
    assert Bernoulli().hessian_product(torch.tensor([25.0]), torch.ones(1)).item() == pytest.approx(1.3888e-11, rel=1e-3)


# What is refused


class _Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class _Renamed(nn.CrossEntropyLoss):
    pass


def test_likelihood_of_a_likelihood_and_of_a_derived_loss() -> None:
    own = Poisson()
    assert likelihood_of(own) is own
    assert isinstance(likelihood_of(_Renamed(ignore_index=7)), Categorical)


@pytest.mark.parametrize("loss", [_Focal(), nn.L1Loss(), nn.functional.cross_entropy, CE, Categorical, "mse", None])
def test_a_loss_that_is_not_known(loss: object) -> None:
    with pytest.raises(
        TypeError, match=r"(?s)loss must be an nn.CrossEntropyLoss.*Likelihood, but is .*columns\(outputs, targets"
    ):
        likelihood_of(loss)


@pytest.mark.parametrize("kind", [CE, MSE, BCE])
def test_a_loss_without_reduction(kind: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"loss must have reduction 'mean' or 'sum'.*'none'; pass reduction='mean'"):
        likelihood_of(kind(reduction="none"))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: likelihood_of(CE(WEIGHTS, label_smoothing=0.1)), ValueError, "weight and label_smoothing=0.1 cannot be"),
        (lambda: Categorical("none"), ValueError, "reduction must be one of mean, sum, but is 'none'"),
        (lambda: Categorical(weight=torch.ones(2, 2)), ValueError, r"weight must have shape \(C,\).*\(2, 2\)"),
        (lambda: Categorical(weight=torch.tensor([1.0, -1.0])), ValueError, "weight must be finite and at least 0"),
        (lambda: Categorical(weight=torch.tensor([1.0, torch.nan])), ValueError, "weight must be finite and at least 0"),
        (lambda: Categorical(weight=[1.0]), TypeError, r"weight must be a floating-point tensor or None, but is \[1.0\]"),
        (lambda: Categorical(label_smoothing=-0.1), ValueError, "label_smoothing must be finite and at least 0"),
        (lambda: Categorical(ignore_index=None), TypeError, "ignore_index must be an integer"),
        (lambda: Gaussian(0.0), ValueError, "variance must be finite and greater than 0"),
        (lambda: Gaussian(over_outputs="max"), ValueError, "over_outputs must be one of mean, sum, but is 'max'"),
        (lambda: Bernoulli(pos_weight=torch.tensor([-1.0])), ValueError, "pos_weight must be finite and at least 0"),
    ],
)
def test_options_that_are_refused(make: Callable[[], Likelihood], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


_F = torch.zeros(4, 5)
_WEIGHTED = Categorical(weight=WEIGHTS)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets", "error", "message"),
    [
        (Categorical(), [0.0], None, TypeError, r"outputs must be a tensor, but is \[0.0\]"),
        (Categorical(), torch.zeros(3, 2).long(), None, ValueError, "outputs must be floating point.*torch.int64"),
        (Gaussian(), torch.tensor(1.0), None, ValueError, r"at least one dimension, but are torch.float32 of shape \(\)"),
        (Gaussian(), _F, 1.0, TypeError, "targets must be a tensor or None, but is 1.0"),
        (Gaussian(), _F, torch.zeros(4, 5, device="meta"), ValueError, "device of outputs, cpu, but are on meta"),
        (Categorical(), _F, torch.zeros(4, 1).long(), ValueError, r"class indices of shape \(4,\), but are .* \(4, 1\)"),
        (Categorical(), _F, torch.zeros(4), ValueError, r"probabilities of shape \(4, 5\), as .*float32 of shape \(4,\)"),
        (Categorical(), _F[..., None], torch.zeros(4, 5).long(), ValueError, r"indices of shape \(4, 1\), but are"),
        (Categorical(), _F, torch.zeros(4).bool(), ValueError, "targets must be class indices .* but are torch.bool"),
        (_WEIGHTED, _F, None, ValueError, "targets is None, but with class weights .* pass targets"),
        (_WEIGHTED, _F, torch.zeros(4, 5), ValueError, r"class indices \(int64\) with weight, but are torch.float32"),
        (_WEIGHTED, _F[:, :3], torch.zeros(4).long(), ValueError, r"each of the 3 classes .* \(4, 3\), but has 5"),
        (Gaussian(), _F, torch.zeros(4), ValueError, r"targets must have the outputs' shape \(4, 5\), but have \(4,\)"),
        (Bernoulli(), _F, torch.zeros(4, 1), ValueError, r"targets must have the outputs' shape \(4, 5\), but have \(4, 1\)"),
        (Bernoulli(weight=torch.ones(4)), _F, None, ValueError, r"weight \(4,\) must broadcast to outputs \(4, 5\)"),
        (Bernoulli(weight=torch.ones(2, 4, 5)), _F, None, ValueError, r"weight \(2, 4, 5\) must broadcast"),
        (Bernoulli(pos_weight=torch.ones(5)), _F, None, ValueError, "targets is None, but with pos_weight .* pass targets"),
    ],
)
def test_outputs_and_targets_that_are_refused(
    likelihood: Likelihood, outputs: Tensor, targets: Tensor, error: type[Exception], message: str
) -> None:
    """By check and by everything that reads them, at the call."""
    uses = [likelihood.check, likelihood.terms, likelihood.sample, likelihood.columns]
    for use in [*uses, lambda f, y: likelihood.hessian_product(f, f, y)]:
        with pytest.raises(error, match=message):
            use(outputs, targets)


@pytest.mark.parametrize("likelihood", [Categorical(), Gaussian(), Poisson()])
def test_a_vector_of_another_shape(likelihood: Likelihood) -> None:
    with pytest.raises(ValueError, match=r"vector must have the outputs' shape \(4, 5\), but has \(5,\)"):
        likelihood.hessian_product(_F, _F[0])


def test_columns_of_another_shape() -> None:
    class Short(Likelihood):
        def columns(self, outputs: Tensor, targets: Tensor | None = None) -> list[Tensor]:
            return [outputs[0]]

    for use in (Short().sample, lambda f: Short().hessian_product(f, f)):
        with pytest.raises(ValueError, match=r"a column must have the outputs' shape \(4, 5\), but has \(5,\)"):
            use(_F)


def test_weights_are_those_of_the_moment() -> None:
    weight = torch.ones(5)
    likelihood = likelihood_of(CE(weight))
    weight.mul_(7)
    assert likelihood.terms(_F, torch.zeros(4).long()) == 4
