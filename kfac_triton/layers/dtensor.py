"""Tensors that are spread over processes."""

from __future__ import annotations

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """The rank's own part of a DTensor; another tensor as it is, detached."""
    own = tensor.detach()
    return own if type(own) is Tensor or not hasattr(own, "to_local") else own.to_local()
