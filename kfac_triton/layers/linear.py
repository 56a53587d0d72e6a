"""nn.Linear: rows of A are its inputs, rows of G the gradients of its outputs."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Layer, Rows


class LinearLayer(Layer):
    """Inputs (N, ..., in); every dimension between the first and the last shares the weight (Eschenhagen et al. 2023)."""

    module_type: type[nn.Module] = nn.Linear
    autocasts = True
    can_be_tied = True

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every position is a row. Reduce: an example's mean input and summed gradient."""
        if x.dim() == 1:
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        examples, positions = x.shape[0], x.shape[1:-1].numel()
        inputs = x.reshape(examples, positions, x.shape[-1])
        gradients = gradient.reshape(examples, positions, gradient.shape[-1])
        if self.reduce and x.dim() > 2:
            return self.make_rows([inputs.mean(1)], [gradients.sum(1)], examples, positions)
        return self.make_rows([inputs.flatten(0, 1)], [gradients.flatten(0, 1)], examples, positions)
