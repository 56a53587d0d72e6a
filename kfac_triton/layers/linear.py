"""nn.Linear: rows of A are its inputs, rows of G the gradients of its outputs."""

from __future__ import annotations

from torch import Tensor, nn

from .base import Layer
from .rows import Rows


class LinearLayer(Layer):
    """Inputs (N, ..., in); every dimension between the first and the last shares the weight (Eschenhagen et al. 2023)."""

    module_type: type[nn.Module] = nn.Linear
    autocasts = True
    can_be_tied = True
    samples_tokens = True

    @property
    def unbatched_dim(self) -> int:
        """Features alone."""
        return 1

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every position is a row. Reduce: an example's mean input and summed gradient."""
        if x.dim() == 1:
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        if x.dim() == 2:
            return self.make_rows([x], [gradient], x.shape[0], 1)
        examples, positions = x.shape[0], x.shape[1:-1].numel()
        if self.reduce:
            inputs = x.reshape(examples, positions, x.shape[-1])
            gradients = gradient.reshape(examples, positions, gradient.shape[-1])
            return self.make_rows([inputs.mean(1)], [gradients.sum(1)], examples, positions)
        count, outer = examples * positions, 1
        if dim := self.dim_of_examples(x):  # back to where rows lie in memory: another order would be a copy
            outer = max(1, x.shape[1 : dim + 1].numel())
            x, gradient = x.movedim(0, dim), gradient.movedim(0, dim)
        inputs, gradients = x.reshape(count, x.shape[-1]), gradient.reshape(count, gradient.shape[-1])
        return self.make_rows([inputs], [gradients], examples, positions, outer=outer)
