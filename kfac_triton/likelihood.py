"""The distribution that a model's outputs parametrize, and the curvature of its negative log-likelihood.

A loss is the mean or the sum of terms l_n(f_n), one term an image, a token, a row. K-FAC's true Fisher and the generalized
Gauss-Newton matrix (GGN) need of each term its Hessian with respect to the outputs,

    H_n = d^2 l_n / d f_n^2      so that, for a mean loss, GGN = (1 / terms) sum_n J_n^T H_n J_n,

as random s_n with E[s_n s_n^T] = H_n (one backward pass), as the columns of a square root S_n S_n^T = H_n (a backward pass a
column, exact), or as products H_n v_n. When the outputs are the natural parameters of an exponential family, H_n does not
depend on the label and is the Fisher information: the gradient's outer product, expected over labels that the model draws
(Martens 2020, https://arxiv.org/abs/1412.1193). Square roots as in Dangel et al. 2020, https://arxiv.org/abs/1912.10985.

Results are detached and have the outputs' dtype; float16 and bfloat16 are computed with in float32. Checks read shapes and
types, never values: the host does not wait for the device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from . import validation
from .fisher import LOSS_REDUCTIONS

_LOSSES = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)


class Likelihood(ABC):
    """What a loss term is, given the outputs. Derive your own for a loss that `likelihood_of` does not know.

    Only `columns` has to be written, and `term_dims` where a term's outputs are not the last dimension. `sample` and
    `hessian_product` follow from the columns; write them too where they can be cheaper. For example::

        class Poisson(Likelihood):
            '''nn.PoissonNLLLoss() of log rates f: l_n = (1/D) sum_d exp(f_d) - y_d f_d, so H_n = diag(exp(f)) / D.'''

            def columns(self, outputs, targets=None):
                rates = outputs.detach().exp() / outputs.shape[-1]
                for d in range(outputs.shape[-1]):
                    column = torch.zeros_like(rates)
                    column[..., d] = rates[..., d].sqrt()
                    yield column

    Args:
        reduction: "mean" or "sum": what the loss takes of its terms. The methods do not depend on it.

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
        """Refuses what the other methods could not read.

        Raises:
            TypeError: if outputs are no tensor, or targets neither a tensor nor None.
            ValueError: if a shape, dtype or device does not fit, or targets are needed and None.
        """
        if not isinstance(outputs, Tensor):
            raise TypeError(f"outputs must be a tensor, but is {outputs!r}; pass what the model returns to the loss")
        if not outputs.is_floating_point() or outputs.ndim == 0:
            raise ValueError(
                f"outputs must be floating point with at least one dimension, but are {outputs.dtype} of shape "
                f"{tuple(outputs.shape)}; pass what the model returns to the loss, one term as outputs[None]"
            )
        if not isinstance(targets, Tensor | None):
            raise TypeError(f"targets must be a tensor or None, but is {targets!r}; pass what the loss gets")
        if targets is not None and targets.device != outputs.device:
            raise ValueError(f"targets are on {targets.device}, outputs on {outputs.device}; move targets there")

    def terms(self, outputs: Tensor, targets: Tensor | None = None) -> int | Tensor:
        """Number of loss terms, or their total weight: what a mean loss divides by. A tensor () where targets decide it."""
        self.check(outputs, targets)
        return math.prod(self._term_shape(outputs))

    def terms_per_example(self, outputs: Tensor) -> int:
        """Loss terms an entry of dimension 0: 1 for (N, C), T for T tokens; 1 if the outputs are a single term."""
        return math.prod(self._term_shape(outputs)[1:])

    @abstractmethod
    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """S_c like outputs, one after the other, with sum_c s_{n,c} s_{n,c}^T = H_n for every term n."""

    def sample(self, outputs: Tensor, targets: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """Random s like outputs with E[s_n s_n^T] = H_n, independent between terms.

        Here sum_c e_{n,c} s_{n,c} with random signs e. A likelihood that can draw labels gives the gradient at one instead.
        """
        f, y = self._prepared(outputs, targets)
        total = torch.zeros_like(f)
        for column in self._checked_columns(outputs, y):
            signs = torch.randint(2, self._term_shape(f), dtype=f.dtype, device=f.device, generator=generator) * 2 - 1
            total.addcmul_(column, signs)
        return total.to(outputs.dtype)

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """H_n v_n for every term, like outputs. For a mean loss, divide by `terms`.

        Raises:
            ValueError: if vector is not of the outputs' shape.
        """
        f, y = self._prepared(outputs, targets)
        v, dims, total = _like("vector", vector, outputs), self.term_dims(f), torch.zeros_like(f)
        for column in self._checked_columns(outputs, y):
            inner = (column * v).sum(dims, keepdim=True) if dims else column * v  # sum(()) would sum over all
            total.addcmul_(column, inner)
        return total.to(outputs.dtype)

    def _term_shape(self, outputs: Tensor) -> list[int]:
        """Shape of outputs with 1 for a term's own dimensions."""
        own = {dim % outputs.ndim for dim in self.term_dims(outputs)}
        return [1 if dim in own else size for dim, size in enumerate(outputs.shape)]

    def _prepared(self, outputs: Tensor, targets: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checked and detached; the outputs in at least float32."""
        self.check(outputs, targets)
        return _working(outputs), None if targets is None else targets.detach()

    def _checked_columns(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        return (_like("a column", column, outputs) for column in self.columns(outputs.detach(), targets))


class _Exponential(Likelihood):
    """H_n is the mass m_n of the labels times the Hessian of one label's negative log-likelihood."""

    def sample(self, outputs: Tensor, targets: Tensor | None = None, generator: Generator | None = None) -> Tensor:
        """The gradient at a label drawn from the predictive distribution, times sqrt(m_n)."""
        f, y = self._prepared(outputs, targets)
        return (self._masses(f, y).sqrt() * self._gradient(f, generator)).to(outputs.dtype)

    @abstractmethod
    def _masses(self, f: Tensor, targets: Tensor | None) -> Tensor:
        """All m_n, broadcasting against f."""

    @abstractmethod
    def _gradient(self, f: Tensor, generator: Generator | None) -> Tensor:
        """Of one label's negative log-likelihood, at drawn labels."""


class Categorical(_Exponential):
    """Class probabilities p = softmax(f): `nn.CrossEntropyLoss`.

    Outputs (N, C), (N, C, d1, ...) or (C,) are logits, a term for each entry of (N, d1, ...). As
    l_n = -sum_c y_c log p_c = (sum_c y_c) logsumexp(f) - y^T f, where only logsumexp is not linear,

        H_n = m_n (diag(p) - p p^T),    columns sqrt(m_n p_c) (e_c - p),    s_n = sqrt(m_n) (p - e_k) with k drawn from p,

    with m_n the sum of the labels: 1 for a class, smoothed or not, and for probabilities; the class's weight if there are
    weights; 0 where the target is ignore_index. A mean loss divides by their sum (by the number of terms for probabilities).

    Args:
        reduction: "mean" or "sum".
        weight: (C,) weights of the classes, or None. With weights, targets must be class indices, and be passed.
        ignore_index: a target that makes no term. Without targets nothing is ignored.
        label_smoothing: of the loss. It matters only to probability targets that do not sum to one.

    Raises:
        TypeError, ValueError: if a value is of the wrong type, shape or range, or weight and label_smoothing come together.
    """

    def __init__(
        self, reduction: str = "mean", *, weight: Tensor | None = None, ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        super().__init__(reduction)
        self.label_smoothing = validation.real("label_smoothing", label_smoothing, high=1.0)
        self.ignore_index = validation.whole("ignore_index", ignore_index, low=-(2**63))
        self.weight = _weights("weight", weight)
        if self.weight is not None and self.weight.ndim != 1:
            raise ValueError(f"weight must have shape (C,), a number for each class, but has {tuple(self.weight.shape)}")
        if self.weight is not None and self.label_smoothing > 0:
            raise ValueError(
                f"weight and label_smoothing={label_smoothing} cannot be combined; drop one, or pass a Likelihood of your own"
            )

    def term_dims(self, outputs: Tensor) -> tuple[int, ...]:
        """The classes: dimension 1, or 0 if it is the only one."""
        return (min(1, outputs.ndim - 1),)

    def check(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """As of `Likelihood`: targets are class indices or probabilities."""
        super().check(outputs, targets)
        shape, dim = tuple(outputs.shape), self.term_dims(outputs)[0]
        if self.weight is not None and len(self.weight) != shape[dim]:
            raise ValueError(
                f"weight is for {len(self.weight)} classes, but outputs {shape} have {shape[dim]}; pass one for each"
            )
        if self.weight is not None and targets is None:
            raise ValueError("targets is None, but with class weights a term weighs what its target does: pass targets")
        if targets is None:
            return
        if targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"targets must be class indices (int64) or probabilities, but are {targets.dtype}")
        if self.weight is not None and targets.is_floating_point():
            raise ValueError(f"targets are probabilities ({targets.dtype}), but class weights need class indices (int64)")
        expected = shape if targets.is_floating_point() else shape[:dim] + shape[dim + 1 :]
        if tuple(targets.shape) != expected:
            raise ValueError(
                f"targets of outputs {shape} must have their shape (probabilities) or be class indices of shape "
                f"{shape[:dim] + shape[dim + 1 :]}, but are {targets.dtype} of shape {tuple(targets.shape)}"
            )

    def terms(self, outputs: Tensor, targets: Tensor | None = None) -> int | Tensor:
        """Number of terms that are not ignored, or the sum of their weights."""
        f, y = self._prepared(outputs, targets)
        if y is None or y.is_floating_point():
            return super().terms(outputs)
        return (y.long() != self.ignore_index).sum() if self.weight is None else self._masses(f, y).sum()

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """Sqrt(m_n p_c) (e_c - p) for every class c."""
        f, y = self._prepared(outputs, targets)
        dim = self.term_dims(f)[0]
        p = f.softmax(dim)
        roots = (p * self._masses(f, y)).sqrt()

        def column(c: int) -> Tensor:
            root = roots.narrow(dim, c, 1)
            full = -root * p
            full.narrow(dim, c, 1).add_(root)
            return full.to(outputs.dtype)

        return map(column, range(f.shape[dim]))

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """m_n p (v - p^T v)."""
        f, y = self._prepared(outputs, targets)
        v, dim = _like("vector", vector, outputs), self.term_dims(f)[0]
        p = f.softmax(dim)
        return (self._masses(f, y) * p * (v - (p * v).sum(dim, keepdim=True))).to(outputs.dtype)

    def _masses(self, f: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            return f.new_ones(())
        dim = self.term_dims(f)[0]
        if targets.is_floating_point():
            total = targets.to(f.dtype).sum(dim, keepdim=True)
            return 1 + (1 - self.label_smoothing) * (total - 1)  # smoothing mixes in uniform labels, which sum to one
        labels = targets.long().unsqueeze(dim)
        kept = labels != self.ignore_index
        if self.weight is None:
            return kept.to(f.dtype)
        self.weight = self.weight.to(f.device)  # copied once
        return self.weight.to(f.dtype)[labels.where(kept, 0)] * kept

    def _gradient(self, f: Tensor, generator: Generator | None) -> Tensor:
        dim = self.term_dims(f)[0]
        # argmax of f - log(E) with exponential E is a draw from softmax(f) (Gumbel-max); multinomial would wait for the device.
        drawn = (f - torch.empty_like(f).exponential_(generator=generator).log_()).argmax(dim, keepdim=True)
        return f.softmax(dim) - torch.zeros_like(f).scatter_(dim, drawn, 1.0)


class _Independent(_Exponential):
    """Outputs (N, ..., D) parametrize a variable each, over_outputs="mean" or "sum" makes them one term: H_n is diagonal."""

    def __init__(self, reduction: str, over_outputs: str) -> None:
        super().__init__(reduction)
        self.over_outputs = validation.choice("over_outputs", over_outputs, LOSS_REDUCTIONS)

    def check(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """As of `Likelihood`: targets have the outputs' shape."""
        super().check(outputs, targets)
        if targets is not None and targets.shape != outputs.shape:
            raise ValueError(
                f"targets must have the outputs' shape {tuple(outputs.shape)}, but have {tuple(targets.shape)}; reshape them, "
                "because a loss that broadcasts has other terms"
            )

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """The square root of H's diagonal, an entry of each term at a time."""
        f, y = self._prepared(outputs, targets)
        root = self._diagonal(f, y).sqrt().to(outputs.dtype)

        def column(d: int) -> Tensor:
            full = torch.zeros_like(root)
            full[..., d] = root[..., d]
            return full

        return map(column, range(root.shape[-1])) if root.ndim > 1 else iter([root])

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """H's diagonal times v."""
        f, y = self._prepared(outputs, targets)
        return (self._diagonal(f, y) * _like("vector", vector, outputs)).to(outputs.dtype)

    @abstractmethod
    def _diagonal(self, f: Tensor, targets: Tensor | None) -> Tensor:
        """Of all H_n, like f."""

    def _share(self, f: Tensor) -> float:
        """Of one output in its term's loss."""
        return 1 / max(f.shape[-1], 1) if self.over_outputs == "mean" and f.ndim > 1 else 1.0


class Gaussian(_Independent):
    """Means f of Gaussians of one variance: `nn.MSELoss` has variance 0.5, and with reduction "mean" over_outputs="mean".

    Outputs (N, ..., D), a term for each entry of the leading dimensions; for outputs (N,), D = 1. With r = 1 / D for
    over_outputs="mean", else r = 1,

        l_n = r / (2 variance) |f - y|^2,    H_n = (r / variance) I.

    That is the negative log-likelihood of y ~ N(f, (variance / r) I), so the gradient s_n = (r / variance) (f - y) at a label
    drawn from it is N(0, (r / variance)^2 (variance / r) I) = N(0, H_n). `nn.MSELoss()`: y ~ N(f, D/2 I), s_n ~ N(0, 2/D I).

    Args:
        variance: of every output, a positive number.
        reduction: "mean" or "sum": how the loss goes over its terms.
        over_outputs: "mean" or "sum": how a term goes over its D outputs.

    Raises:
        TypeError, ValueError: if a value is of the wrong type or outside its range.
    """

    def __init__(self, variance: float = 1.0, reduction: str = "mean", *, over_outputs: str = "sum") -> None:
        super().__init__(reduction, over_outputs)
        self.variance = validation.real("variance", variance, open_low=True)

    def _masses(self, f: Tensor, targets: Tensor | None) -> Tensor:
        return f.new_full((), self._share(f) / self.variance)

    def _gradient(self, f: Tensor, generator: Generator | None) -> Tensor:
        return torch.empty_like(f).normal_(generator=generator)

    def _diagonal(self, f: Tensor, targets: Tensor | None) -> Tensor:
        return self._masses(f, targets).expand_as(f)


class Bernoulli(_Independent):
    """Probabilities p = sigmoid(f): `nn.BCEWithLogitsLoss`, which with reduction "mean" has over_outputs="mean".

    Outputs (N, ..., D), a term for each entry of the leading dimensions; for outputs (N,), D = 1. With r = 1 / D for
    over_outputs="mean", else r = 1, weights w and weights q of positive labels,

        l_n = -r sum_d w_d (q_d y_d log p_d + (1 - y_d) log(1 - p_d)).

    As log(p)'' = log(1 - p)'' = -p (1 - p), with m_d = r w_d (1 + (q_d - 1) y_d),

        H_n = diag(m p (1 - p)),    s_n = sqrt(m) (p - k) with k drawn from p.

    Without q, H_n does not depend on y, which may be a probability. Weights go in by their square root, as H_n has m, not m^2.

    Args:
        reduction: "mean" or "sum": how the loss goes over its terms.
        over_outputs: "mean" or "sum": how a term goes over its D outputs.
        weight: weights that broadcast to the outputs, or None.
        pos_weight: weights of positive labels that broadcast to the outputs, or None. Then targets must be passed.

    Raises:
        TypeError, ValueError: if a value is of the wrong type or outside its range.
    """

    def __init__(
        self,
        reduction: str = "mean",
        *,
        over_outputs: str = "sum",
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
    ) -> None:
        super().__init__(reduction, over_outputs)
        self.weight = _weights("weight", weight)
        self.pos_weight = _weights("pos_weight", pos_weight)

    def check(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """As of `Likelihood`: targets have the outputs' shape, weights broadcast to it."""
        super().check(outputs, targets)
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is not None and not _broadcasts(weight.shape, outputs.shape):
                raise ValueError(f"{name} {tuple(weight.shape)} must broadcast to outputs {tuple(outputs.shape)}; reshape it")
        if self.pos_weight is not None and targets is None:
            raise ValueError("targets is None, but with pos_weight a term weighs what its labels do: pass targets")

    def _masses(self, f: Tensor, targets: Tensor | None) -> Tensor:
        masses = f.new_full((), self._share(f))
        if self.weight is not None:
            self.weight = self.weight.to(f.device)  # copied once
            masses = masses * self.weight.to(f.dtype)
        if self.pos_weight is not None and targets is not None:
            self.pos_weight = self.pos_weight.to(f.device)
            masses = masses * (1 + (self.pos_weight.to(f.dtype) - 1) * targets.to(f.dtype))
        return masses

    def _gradient(self, f: Tensor, generator: Generator | None) -> Tensor:
        p = f.sigmoid()
        return p - (torch.empty_like(f).uniform_(generator=generator) < p).to(f.dtype)  # torch.bernoulli raises on a NaN

    def _diagonal(self, f: Tensor, targets: Tensor | None) -> Tensor:
        return self._masses(f, targets) * f.sigmoid() * (-f).sigmoid()


def likelihood_of(loss: nn.Module | Likelihood) -> Likelihood:
    """The likelihood whose negative logarithm a loss is, up to scale.

    Args:
        loss: `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`, with reduction "mean" or "sum" and its weights as
            they are now; or a `Likelihood`, which is returned as it is.

    Raises:
        TypeError: if loss is anything else.
        ValueError: if its options do not make a mean or a sum of negative log-likelihoods.
    """
    if isinstance(loss, Likelihood):
        return loss
    # A derived loss that computes something else is another loss.
    if not any(isinstance(loss, x) and type(loss).forward is x.forward for x in _LOSSES):
        raise TypeError(
            "loss must be an nn.CrossEntropyLoss(), nn.MSELoss() or nn.BCEWithLogitsLoss() (not a derived class with another "
            f"forward), or a Likelihood, but is {loss!r}. For another loss derive from kfac_triton.likelihood.Likelihood and "
            "write its method columns(outputs, targets): the columns of a square root of each loss term's Hessian"
        )
    reduction = str(loss.reduction)
    if reduction not in LOSS_REDUCTIONS:
        raise ValueError(f"loss must have reduction 'mean' or 'sum', but {loss!r} has {reduction!r}; pass reduction='mean'")
    if isinstance(loss, nn.CrossEntropyLoss):
        return Categorical(reduction, weight=loss.weight, ignore_index=loss.ignore_index, label_smoothing=loss.label_smoothing)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return Bernoulli(reduction, over_outputs=reduction, weight=loss.weight, pos_weight=loss.pos_weight)
    return Gaussian(0.5, reduction, over_outputs=reduction)


def _working(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def _like(name: str, tensor: Tensor, outputs: Tensor) -> Tensor:
    if tensor.shape != outputs.shape:
        raise ValueError(f"{name} must have the outputs' shape {tuple(outputs.shape)}, but has {tuple(tensor.shape)}")
    return _working(tensor)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _weights(name: str, weight: Tensor | None) -> Tensor | None:
    if weight is None:
        return None
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor or None, but is {weight!r}")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError(
            f"{name} must be finite and at least 0 (there is no square root of a negative Hessian), but is {weight}"
        )
    return weight.detach().clone()
