"""nn.Embedding: A is the diagonal matrix of token frequencies."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from .base import Layer
from .rows import Rows


class EmbeddingLayer(Layer):
    """y = W a with W = weight^T (dimensions, tokens) and a the one-hot vector of an index.

    Expand: a a^T has a single entry 1, on the diagonal, so E[a a^T] = diag(frequencies) exactly. Reduce (Eschenhagen et al.
    2023): a is the mean of an example's one-hot vectors, and only the diagonal of E[a a^T] is kept. G is that of a Linear.
    """

    module_type = nn.Embedding
    diagonal_inputs = True
    weight_is_transposed = True
    can_be_tied = True

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """As in `Layer`, and because its gradient is sparse or rescaled, or its forward changes the weight."""
        embedding = cast(nn.Embedding, module)
        if embedding.sparse:
            return "its gradient is sparse"
        if embedding.scale_grad_by_freq:
            return "its gradient is scaled by token frequencies (scale_grad_by_freq), so it is not that of the loss"
        if embedding.max_norm is not None:
            return "its forward renormalizes the weight (max_norm)"
        return super().why_not(module)

    @property
    def feature_dims(self) -> int | None:
        """Zero: a position has one index."""
        return 0

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every index is a row. Reduce: the indices of an example are one row, and their gradients are summed."""
        indices = x.reshape(len(x) if x.dim() else 1, x.shape[1:].numel()).long()
        examples, positions = indices.shape
        gradients = gradient.reshape(examples, positions, gradient.shape[-1])
        if self.reduce:
            return self.make_rows([indices], [gradients.sum(1)], examples, positions)
        return self.make_rows([indices.flatten()], [gradients.flatten(0, 1)], examples, positions)
