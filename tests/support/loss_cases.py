"""Losses on outputs of many shapes, with targets, for the tests of likelihoods."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from kfac_triton.fisher.likelihood import Likelihood
from kfac_triton.fisher.losses import likelihood_of

TOLERANCE = 1e-12
DRAWS = 200_000
WEIGHTS = torch.tensor([0.5, 2.0, 1.25, 0.0, 3.0], dtype=torch.float64)


def _poisson_of_the_docstring() -> type[Likelihood]:
    lines = (Likelihood.__doc__ or "").partition("For example:\n")[2].partition("\n    Args:")[0]
    names = {"Likelihood": Likelihood, "torch": torch}
    exec(textwrap.dedent(lines), names)
    return names["Poisson"]


Poisson = _poisson_of_the_docstring()


@dataclass
class Case:
    """A loss on outputs of a shape, and targets; `classes` for class indices, else targets like the outputs."""

    loss: nn.Module
    shape: tuple[int, ...]
    classes: bool = False
    soft: bool = False
    ignored: int | None = None
    own: Callable[[], Likelihood] | None = None
    dtype: torch.dtype = torch.long

    @property
    def likelihood(self) -> Likelihood:
        return self.own() if self.own else likelihood_of(self.loss)

    @property
    def class_dim(self) -> int:
        """Of a cross entropy."""
        return min(1, len(self.shape) - 1)

    def data(self) -> tuple[Tensor, Tensor]:
        outputs = 2 * torch.randn(self.shape, dtype=torch.float64)
        if self.classes:
            shape = self.shape[: self.class_dim] + self.shape[self.class_dim + 1 :]
            targets = torch.randint(self.shape[self.class_dim], shape)
            if self.ignored is not None:
                targets[torch.rand(shape) < 0.4] = self.ignored
                targets.flatten()[0] = self.ignored
            return outputs, targets.to(self.dtype)
        if isinstance(self.loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
            probabilities = torch.rand(self.shape, dtype=torch.float64)  # of classes they need not sum to one
            return outputs, probabilities if self.soft else probabilities.round()
        if isinstance(self.loss, nn.PoissonNLLLoss):
            return outputs, torch.randint(5, self.shape).double()
        return outputs, torch.randn(self.shape, dtype=torch.float64)

    def term_of_output(self) -> Tensor:
        """Number of the loss term, for each entry of the outputs."""
        if isinstance(self.loss, nn.CrossEntropyLoss):
            shape = [1 if i == self.class_dim else size for i, size in enumerate(self.shape)]
        else:
            shape = [*self.shape[:-1], 1] if len(self.shape) > 1 else list(self.shape)
        return torch.arange(torch.Size(shape).numel()).reshape(shape).expand(self.shape)


CE, MSE, BCE = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss
POSITIVE = torch.tensor([0.25, 4.0, 1.0], dtype=torch.float64)
CASES = {
    "ce": Case(CE(), (6, 5), True),
    "ce-sum": Case(CE(reduction="sum"), (6, 5), True),
    "ce-one-term": Case(CE(), (5,), True),
    "ce-tokens": Case(CE(), (3, 5, 4), True),
    "ce-pixels": Case(CE(), (2, 5, 3, 2), True),
    "ce-ignoring": Case(CE(), (9, 5), True, ignored=-100),
    "ce-ignoring-tokens-sum": Case(CE(reduction="sum"), (3, 5, 4), True, ignored=-100),
    "ce-ignoring-a-class": Case(CE(ignore_index=2), (9, 5), True, ignored=2),
    "ce-ignoring-bytes": Case(CE(ignore_index=3), (9, 5), True, ignored=3, dtype=torch.uint8),
    "ce-weights": Case(CE(WEIGHTS), (9, 5), True),
    "ce-weights-bytes": Case(CE(WEIGHTS, ignore_index=3), (9, 5), True, ignored=3, dtype=torch.uint8),
    "ce-weights-sum": Case(CE(WEIGHTS, reduction="sum"), (9, 5), True),
    "ce-weights-ignoring-tokens": Case(CE(WEIGHTS), (3, 5, 4), True, ignored=-100),
    "ce-smoothing": Case(CE(label_smoothing=0.3), (6, 5), True),
    "ce-smoothing-ignoring-tokens": Case(CE(label_smoothing=0.3), (3, 5, 4), True, ignored=-100),
    "ce-probabilities": Case(CE(), (6, 5), soft=True),
    "ce-probabilities-tokens-smoothing": Case(CE(label_smoothing=0.3), (3, 5, 4), soft=True),
    "mse": Case(MSE(), (6, 3)),
    "mse-sum": Case(MSE(reduction="sum"), (6, 3)),
    "mse-scalars": Case(MSE(), (6,)),
    "mse-tokens": Case(MSE(), (3, 4, 5)),
    "bce": Case(BCE(), (6, 3)),
    "bce-sum": Case(BCE(reduction="sum"), (6, 3)),
    "bce-scalars": Case(BCE(), (6,)),
    "bce-tokens": Case(BCE(), (3, 4, 5)),
    "bce-probabilities": Case(BCE(), (6, 3), soft=True),
    "bce-weights": Case(BCE(weight=POSITIVE), (6, 3)),
    "bce-weights-of-terms": Case(BCE(weight=torch.arange(1.0, 7.0)[:, None].double()), (6, 3)),
    "bce-positive": Case(BCE(pos_weight=POSITIVE), (6, 3)),
    "bce-positive-probabilities-sum": Case(BCE(pos_weight=POSITIVE, reduction="sum"), (4, 2, 3), soft=True),
    "bce-both": Case(BCE(weight=POSITIVE + 1, pos_weight=POSITIVE), (6, 3)),
    "poisson": Case(nn.PoissonNLLLoss(), (6, 3), own=Poisson),
    "poisson-tokens": Case(nn.PoissonNLLLoss(), (3, 4, 2), own=Poisson),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def hessian(case: Case, outputs: Tensor, targets: Tensor) -> Tensor:
    """Of the sum of terms, with respect to all outputs, from the whole loss: blocks H_n on the diagonal."""
    targets = targets if targets.is_floating_point() else targets.long()  # functorch takes no bytes
    hessian = torch.func.hessian(lambda flat: case.loss(flat.reshape(case.shape), targets))(outputs.flatten())
    return hessian * (case.likelihood.terms(outputs, targets) if case.loss.reduction == "mean" else 1)


def from_columns(likelihood: Likelihood, case: Case, outputs: Tensor, targets: Tensor) -> Tensor:
    flat = torch.stack([column.flatten() for column in likelihood.columns(outputs, targets)])
    terms = case.term_of_output().flatten()
    return flat.T @ flat * (terms[:, None] == terms)


def moment_errors(left: Tensor, right: Tensor, truth: Tensor) -> Tensor:
    """|E[l r^T] - truth| over rows, in standard deviations of the estimate."""
    products = left[:, :, None] * right[:, None, :]
    sigma = products.std(0) / len(products) ** 0.5
    return (products.mean(0) - truth).abs() / sigma.clamp_min(1e-12)
