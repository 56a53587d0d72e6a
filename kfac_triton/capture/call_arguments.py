"""What the arguments of a call say about its examples, and what the user's function says about its loss terms."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from .. import validation


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first tensor with a dimension among the values, or inside of lists, tuples and dicts of them."""
    for value in values:
        found = value
        if isinstance(value, (list, tuple)):
            found = first_tensor(value)
        elif isinstance(value, dict):
            found = first_tensor(value.values())
        elif dataclasses.is_dataclass(value):
            found = first_tensor(vars(value).values())
        if isinstance(found, Tensor) and found.dim():
            return found
    return None


def own_batch_dim(module: nn.Module) -> int:
    """The dimension of the examples in the arguments of PyTorch's own sequence modules, where these are outermost."""
    while isinstance(module, (nn.TransformerEncoder, nn.TransformerDecoder)):
        module = module.layers[0]
    module = getattr(module, "self_attn", module)
    kinds = (nn.MultiheadAttention, nn.Transformer, nn.RNNBase)
    return int(isinstance(module, kinds) and not module.batch_first)


def checked_terms(terms: Any) -> float | Tensor:
    """A number of loss terms that the user's function has returned.

    Raises:
        TypeError: if it is neither a number nor a tensor of one number.
        ValueError: if it is negative or not finite.
    """
    if not isinstance(terms, Tensor):
        return validation.real("the result of loss_terms", terms)
    if terms.numel() != 1:
        raise TypeError(f"the result of loss_terms must be one number, but has shape {tuple(terms.shape)}; sum it")
    return terms.detach().reshape(()).clone()  # the user may overwrite it
