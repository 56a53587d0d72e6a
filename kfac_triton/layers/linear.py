"""nn.Linear: rows of A are its inputs, rows of G the gradients of its outputs."""

from __future__ import annotations

from torch import Tensor, nn

from kfac_triton.kernels import ops

from .base import Layer, Rows


class LinearLayer(Layer):
    """Inputs (N, ..., in); every dimension between the first and the last shares the weight (Eschenhagen et al. 2023)."""

    module_type: type[nn.Module] = nn.Linear
    autocasts = True

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[Layer] | None:
        """Linear modules that share a weight are one module called several times."""
        return cls if all(type(module) is nn.Linear for module in modules) else None

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every position is a row. Reduce: an example's mean input and summed gradient."""
        if x.dim() == 1:
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        examples = x.shape[0]
        positions = x.shape[1:-1].numel()
        inputs = x.reshape(examples * positions, x.shape[-1])
        gradients = gradient.reshape(examples * positions, gradient.shape[-1])
        if self.reduce and x.dim() > 2:
            inputs = x.reshape(examples, positions, x.shape[-1]).mean(1)
            gradients = gradient.reshape(examples, positions, gradient.shape[-1]).sum(1)
        return Rows(
            inputs=[inputs],
            gradients=[gradients],
            input_window=ops.ROWS,
            gradient_window=ops.ROWS,
            input_count=inputs.shape[0],
            terms=examples * positions if self.tokens else examples,
            examples=examples,
        )
