"""Conv1D of Hugging Face transformers (GPT-2): an nn.Linear whose weight is stored transposed."""

from __future__ import annotations

from torch import Tensor, nn

from .linear import LinearLayer

# Where transformers has kept it. It is known by name, so that nothing has to be imported or installed.
_HOMES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class HFConv1DLayer(LinearLayer):
    """y = a W^T + bias with W = weight^T."""

    module_type: type[nn.Module] = nn.Module

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether it is a Conv1D, or derived from it with its forward."""
        named = (base for base in type(module).__mro__ if base.__name__ == "Conv1D" and base.__module__ in _HOMES)
        return any(type(module).forward is base.__dict__.get("forward") for base in named)

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[LinearLayer] | None:
        """Those that share a weight are one module called several times."""
        return cls if all(cls.matches(module) for module in modules) else None

    @property
    def input_size(self) -> int:
        """Columns of W and side of A, the bias included."""
        return self.weight.shape[0] + self.has_bias

    @property
    def output_size(self) -> int:
        """Rows of W and side of G."""
        return self.weight.shape[1]

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """That of the weight transposed, and of the bias."""
        weight, bias = self.weight.grad, None if self.bias is None else self.bias.grad
        return None if weight is None else weight.T, bias

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weight and bias with their parts."""
        columns = self.weight.shape[0]
        update = blocks[0][: self.output_size, : self.input_size]
        result = [(self.weight, update[:, :columns].T)]
        if self.bias is not None:
            result.append((self.bias, update[:, columns]))
        return result
