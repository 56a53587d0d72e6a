"""The distributions of the usual losses: categorical, Gaussian with a fixed variance, and independent Bernoulli."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Generator, Tensor

from .. import validation
from ..settings import LOSS_REDUCTIONS
from .likelihood import Exponential, like


class Categorical(Exponential):
    """Class probabilities p = softmax(f), as in `nn.CrossEntropyLoss`.

    Outputs (N, C), (N, C, d1, ...) or (C,) are logits, with one term for each entry of (N, d1, ...). Because
    l_n = -sum_c y_c log p_c = (sum_c y_c) logsumexp(f) - y^T f, in which only logsumexp is not linear,

        H_n = m_n (diag(p) - p p^T),    columns sqrt(m_n p_c) (e_c - p),    s_n = sqrt(m_n) (p - e_k) with k drawn from p,

    with m_n the sum of the labels: 1 for a class index (smoothed or not) and for probabilities; the weight of the class if
    there are weights; 0 if the target is ignore_index. A mean loss divides by the sum of the m_n (for probabilities, by the
    number of terms).

    Args:
        reduction: "mean" or "sum".
        weight: (C,) weights of the classes, or None. With weights, targets must be class indices, and be passed.
        ignore_index: the target of outputs that are not a term. Without targets nothing is ignored.
        label_smoothing: that of the loss. It matters only for probability targets that do not sum to one.

    Raises:
        TypeError, ValueError: if a value is of the wrong type, shape or range, or weight and label_smoothing are both given.
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
        """As in `Likelihood`; targets must be class indices or probabilities."""
        super().check(outputs, targets)
        shape, dim = tuple(outputs.shape), self.term_dims(outputs)[0]
        if self.weight is not None and len(self.weight) != shape[dim]:
            raise ValueError(
                f"weight must have a number for each of the {shape[dim]} classes of outputs {shape}, but has {len(self.weight)}"
            )
        if self.weight is not None and targets is None:
            raise ValueError("targets is None, but with class weights the weight of a term is that of its target: pass targets")
        if targets is None:
            return
        if targets.is_complex() or targets.dtype == torch.bool:
            raise ValueError(f"targets must be class indices (int64) or probabilities, but are {targets.dtype}; convert them")
        if self.weight is not None and targets.is_floating_point():
            raise ValueError(f"targets must be class indices (int64) with weight, but are {targets.dtype}; convert them")
        expected = shape if targets.is_floating_point() else shape[:dim] + shape[dim + 1 :]
        if tuple(targets.shape) != expected:
            raise ValueError(
                f"targets must be probabilities of shape {shape}, as the outputs, or class indices of shape "
                f"{shape[:dim] + shape[dim + 1 :]}, but are {targets.dtype} of shape {tuple(targets.shape)}"
            )

    def terms(self, outputs: Tensor, targets: Tensor | None = None) -> int | Tensor:
        """Number of terms that are not ignored, or the sum of their weights."""
        f, y = self._prepared(outputs, targets)
        if y is None or y.is_floating_point():
            return super().terms(outputs)
        return (y.long() != self.ignore_index).sum() if self.weight is None else self._masses(f, y).sum()

    def left_out(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor | None:
        """Terms whose target is ignore_index, or a class of weight 0."""
        f, y = self._prepared(outputs, targets)
        if y is None or y.is_floating_point():
            return None
        return self._masses(f, y) == 0

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
        v, dim = like("vector", vector, outputs), self.term_dims(f)[0]
        p = f.softmax(dim)
        return (self._masses(f, y) * p * (v - (p * v).sum(dim, keepdim=True))).to(outputs.dtype)

    def _masses(self, f: Tensor, targets: Tensor | None) -> Tensor:
        if targets is None:
            return f.new_ones(())
        dim = self.term_dims(f)[0]
        if targets.is_floating_point():
            total = targets.to(f.dtype).sum(dim, keepdim=True)
            return 1 + (1 - self.label_smoothing) * (total - 1)  # smoothing blends in uniform labels, which sum to one
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


class _Independent(Exponential):
    """One variable for each output of (N, ..., D); over_outputs="mean" or "sum" of D outputs is one term. H_n is diagonal."""

    def __init__(self, reduction: str, over_outputs: str) -> None:
        super().__init__(reduction)
        self.over_outputs = validation.choice("over_outputs", over_outputs, LOSS_REDUCTIONS)

    def check(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """As in `Likelihood`; targets must have the shape of the outputs."""
        super().check(outputs, targets)
        if targets is not None and targets.shape != outputs.shape:
            raise ValueError(
                f"targets must have the outputs' shape {tuple(outputs.shape)}, but have {tuple(targets.shape)}; reshape them, "
                "because broadcasting would change the terms of the loss"
            )

    def columns(self, outputs: Tensor, targets: Tensor | None = None) -> Iterator[Tensor]:
        """The square root of the diagonal of H; each column has one entry for each term."""
        f, y = self._prepared(outputs, targets)
        root = self._diagonal(f, y).sqrt().to(outputs.dtype)

        def column(d: int) -> Tensor:
            full = torch.zeros_like(root)
            full[..., d] = root[..., d]
            return full

        return map(column, range(root.shape[-1])) if root.ndim > 1 else iter([root])

    def hessian_product(self, outputs: Tensor, vector: Tensor, targets: Tensor | None = None) -> Tensor:
        """The diagonal of H times v."""
        f, y = self._prepared(outputs, targets)
        return (self._diagonal(f, y) * like("vector", vector, outputs)).to(outputs.dtype)

    @abstractmethod
    def _diagonal(self, f: Tensor, targets: Tensor | None) -> Tensor:
        """The diagonals of all H_n, in the shape of f."""

    def _share(self, f: Tensor) -> float:
        """The weight of one output in the loss of its term."""
        return 1 / max(f.shape[-1], 1) if self.over_outputs == "mean" and f.ndim > 1 else 1.0


class Gaussian(_Independent):
    """Gaussians with means f and one variance; `nn.MSELoss` has variance 0.5 and over_outputs equal to its reduction.

    Outputs (N, ..., D) have one term for each entry of the leading dimensions; for outputs (N,), D = 1. With r = 1 / D for
    over_outputs="mean", else r = 1,

        l_n = r / (2 variance) |f - y|^2,    H_n = (r / variance) I.

    That is the negative log-likelihood of y ~ N(f, (variance / r) I), so the gradient s_n = (r / variance) (f - y) at a label
    drawn from it is N(0, (r / variance)^2 (variance / r) I) = N(0, H_n). `nn.MSELoss()`: y ~ N(f, D/2 I), s_n ~ N(0, 2/D I).

    Args:
        variance: the variance of every output, a positive number.
        reduction: "mean" or "sum": whether the loss is the mean or the sum of its terms.
        over_outputs: "mean" or "sum": whether a term is the mean or the sum over its D outputs.

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
    """Probabilities p = sigmoid(f), as in `nn.BCEWithLogitsLoss`, which has over_outputs equal to its reduction.

    Outputs (N, ..., D) have one term for each entry of the leading dimensions; for outputs (N,), D = 1. With r = 1 / D for
    over_outputs="mean", else r = 1, weights w and weights q of positive labels,

        l_n = -r sum_d w_d (q_d y_d log p_d + (1 - y_d) log(1 - p_d)).

    As log(p)'' = log(1 - p)'' = -p (1 - p), with m_d = r w_d (1 + (q_d - 1) y_d),

        H_n = diag(m p (1 - p)),    s_n = sqrt(m) (p - k) with k drawn from p.

    Without q, H_n does not depend on y, which may be a probability. s_n contains sqrt(m), because H_n contains m, not m^2.

    Args:
        reduction: "mean" or "sum": whether the loss is the mean or the sum of its terms.
        over_outputs: "mean" or "sum": whether a term is the mean or the sum over its D outputs.
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
        """As in `Likelihood`; targets must have the shape of the outputs, and weights must broadcast to it."""
        super().check(outputs, targets)
        for name, weight in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if weight is not None and not _broadcasts(weight.shape, outputs.shape):
                raise ValueError(f"{name} {tuple(weight.shape)} must broadcast to outputs {tuple(outputs.shape)}; reshape it")
        if self.pos_weight is not None and targets is None:
            raise ValueError("targets is None, but with pos_weight the weight of a term depends on its labels: pass targets")

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
