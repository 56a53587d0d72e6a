"""The likelihood whose negative logarithm a loss is."""

from __future__ import annotations

from torch import nn

from ..settings import LOSS_REDUCTIONS
from .distributions import Bernoulli, Categorical, Gaussian
from .likelihood import Likelihood

_LOSSES = (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)


def likelihood_of(loss: nn.Module | Likelihood) -> Likelihood:
    """The likelihood whose negative logarithm a loss is, up to scale.

    Args:
        loss: `nn.CrossEntropyLoss`, `nn.MSELoss` or `nn.BCEWithLogitsLoss`, with reduction "mean" or "sum" and its present
            weights; or a `Likelihood`, which is returned unchanged.

    Raises:
        TypeError: if loss is anything else.
        ValueError: if with its options it is not a mean or a sum of negative log-likelihoods.
    """
    if isinstance(loss, Likelihood):
        return loss
    # A derived class with another forward is another loss.
    if not any(isinstance(loss, x) and type(loss).forward is x.forward for x in _LOSSES):
        raise TypeError(
            "loss must be an nn.CrossEntropyLoss(), nn.MSELoss() or nn.BCEWithLogitsLoss() (not a derived class with another "
            f"forward), or a Likelihood, but is {loss!r}. For another loss derive from kfac_triton.Likelihood and "
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
