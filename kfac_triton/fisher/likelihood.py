"""The distribution that a model's outputs parametrize, and the curvature of its negative log-likelihood.

A loss is the mean or the sum of terms l_n(f_n), one term for each image, token or row. K-FAC's true Fisher and the generalized
Gauss-Newton matrix (GGN) need the Hessian of each term with respect to the outputs,

    H_n = d^2 l_n / d f_n^2      so that, for a mean loss, GGN = (1 / terms) sum_n J_n^T H_n J_n,

as random s_n with E[s_n s_n^T] = H_n (one backward pass), as the columns of a square root S_n S_n^T = H_n (exact, with one
backward pass for each column), or as products H_n v_n. When the outputs are the natural parameters of an exponential family,
H_n does not depend on the label and is the Fisher information: the expected outer product of the gradient over labels drawn
from the model (Martens 2020, https://arxiv.org/abs/1412.1193). Square roots are as in Dangel et al. 2020,
https://arxiv.org/abs/1912.10985.

Results are detached and have the outputs' dtype; for float16 and bfloat16 the computation is in float32. Checks read shapes
and types but not values, so the host does not wait for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from .. import validation
from ..settings import LOSS_REDUCTIONS


class Likelihood(ABC):
    """The terms of a loss as functions of the outputs. Derive your own for a loss that `likelihood_of` does not support.

    Only `columns` has to be defined, and `term_dims` if the outputs of a term are not the last dimension. `sample` and
    `hessian_product` are computed from the columns; override them if there is a cheaper way. For example:

        class Poisson(Likelihood):
            '''nn.PoissonNLLLoss() of log rates f: l_n = (1/D) sum_d exp(f_d) - y_d f_d, so H_n = diag(exp(f)) / D.'''

            def columns(self, outputs, targets=None):
                rates = outputs.detach().exp() / outputs.shape[-1]
                for d in range(outputs.shape[-1]):
                    column = torch.zeros_like(rates)
                    column[..., d] = rates[..., d].sqrt()
                    yield column

    Args:
        reduction: "mean" or "sum": whether the loss is the mean or the sum of its terms. The methods do not depend on it.

    Raises:
        TypeError, ValueError: if reduction is neither.
    """

    reduction: str = "mean"

    def __init__(self, reduction: str = "mean") -> None:
        self.reduction = validation.choice("reduction", reduction, LOSS_REDUCTIONS)

    def term_dims(self, outputs: Tensor) -> tuple[int, ...]:
        """Dimensions of outputs that hold the parameters of one term: the last one, none if it is the only one."""
        return (outputs.ndim - 1,) if outputs.ndim > 1 else ()

    def check(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Refuses outputs and targets that the other methods cannot use.

        Raises:
            TypeError: if outputs are no tensor, or targets neither a tensor nor None.
            ValueError: if a shape, dtype or device does not fit, or targets are needed and None.
        """
        if not isinstance(outputs, Tensor):
            raise TypeError(f"outputs must be a tensor, but is {outputs!r}; pass the tensor that the loss takes")
        if not outputs.is_floating_point() or outputs.ndim == 0:
            raise ValueError(
                f"outputs must be floating point with at least one dimension, but are {outputs.dtype} of shape "
                f"{tuple(outputs.shape)}; pass the tensor that the loss takes, for a single term outputs[None]"
            )
        if not isinstance(targets, Tensor | None):
            raise TypeError(f"targets must be a tensor or None, but is {targets!r}; pass the targets that the loss takes")
        if targets is not None and targets.device != outputs.device:
            raise ValueError(f"targets must be on the device of outputs, {outputs.device}, but are on {targets.device}")

    def terms(self, outputs: Tensor, targets: Tensor | None = None) -> int | Tensor:
        """Number of loss terms, or their total weight: what a mean loss divides by. A tensor () if it depends on targets."""
        self.check(outputs, targets)
        return math.prod(self.term_shape(outputs))

    def left_out(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Flags in the shape `term_shape`: terms that the targets leave out of the loss and of the number of terms.

        None if all terms count, whatever the targets are. A row of a layer that carries no term is no row of A.
        """
        return None

    def terms_per_example(self, outputs: Tensor) -> int:
        """Loss terms for each entry of dimension 0: 1 for (N, C), T for T tokens; 1 if the outputs are a single term."""
        return math.prod(self.term_shape(outputs)[1:])

    @abstractmethod
    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """The columns s_c, each of the shape of outputs, with sum_c s_{n,c} s_{n,c}^T = H_n for every term n."""

    def sample(self, outputs: Tensor, targets: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Random s of the shape of outputs with E[s_n s_n^T] = H_n, independent between terms.

        Here it is sum_c e_{n,c} s_{n,c} with random signs e. A likelihood that can draw labels returns the gradient at one.
        """
        f, y = self._prepared(outputs, targets)
        total = torch.zeros_like(f)
        for column in self._checked_columns(outputs, y):
            signs = torch.randint(2, self.term_shape(f), dtype=f.dtype, device=f.device, generator=generator) * 2 - 1
            total.addcmul_(column, signs)
        return total.to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """H_n v_n for every term, of the shape of outputs. For a mean loss, divide by `terms`.

        Raises:
            ValueError: if vector is not of the outputs' shape.
        """
        f, y = self._prepared(outputs, targets)
        v, dims, total = like("vector", vector, outputs), self.term_dims(f), torch.zeros_like(f)
        for column in self._checked_columns(outputs, y):
            inner = (column * v).sum(dims, keepdim=True) if dims else column * v  # sum(()) would sum over all
            total.addcmul_(column, inner)
        return total.to(outputs.dtype)

    def term_shape(self, outputs: Tensor) -> list[int]:
        """Shape of outputs with 1 for a term's own dimensions."""
        own = {dim % outputs.ndim for dim in self.term_dims(outputs)}
        return [1 if dim in own else size for dim, size in enumerate(outputs.shape)]

    def _prepared(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checked and detached; the outputs in at least float32."""
        self.check(outputs, targets)
        return working(outputs), None if targets is None else targets.detach()

    def _checked_columns(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        return (like("a column", column, outputs) for column in self.columns(outputs.detach(), targets))


class Exponential(Likelihood):
    """H_n is the weight m_n of a term times the Hessian of the negative log-likelihood of one label."""

    def sample(self, outputs: Tensor, targets: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """The gradient at a label drawn from the predictive distribution, times sqrt(m_n)."""
        f, y = self._prepared(outputs, targets)
        return (self._masses(f, y).sqrt() * self._gradient(f, generator)).to(outputs.dtype)

    @abstractmethod
    def _masses(self, f: Tensor, targets: Tensor | None) -> Tensor:
        """All m_n, in a shape that broadcasts to that of f."""

    @abstractmethod
    def _gradient(self, f: Tensor, generator: Generator | None) -> Tensor:
        """The gradient of the negative log-likelihood of one label, at labels drawn from the model."""


def working(tensor: Tensor) -> Tensor:
    """Detached, in at least float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def like(name: str, tensor: Tensor, outputs: Tensor) -> Tensor:
    """The tensor, detached and in at least float32, if it has the outputs' shape.

    Raises:
        ValueError: if it has another shape.
    """
    if tensor.shape != outputs.shape:
        raise ValueError(f"{name} must have the outputs' shape {tuple(outputs.shape)}, but has {tuple(tensor.shape)}")
    return working(tensor)
