"""Conv1D of Hugging Face transformers (GPT-2): an nn.Linear whose weight is stored transposed."""

from __future__ import annotations

from torch import nn

from .linear import LinearLayer

# Where transformers has kept it. It is known by name, so that nothing has to be imported or installed.
_HOMES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class HFConv1DLayer(LinearLayer):
    """y = a W^T + bias with W = weight^T."""

    module_type: type[nn.Module] = nn.Module
    weight_is_transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether it is a Conv1D, or derived from it with its forward."""
        named = (base for base in type(module).__mro__ if base.__name__ == "Conv1D" and base.__module__ in _HOMES)
        return any(type(module).forward is base.__dict__.get("forward") for base in named)

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[LinearLayer] | None:
        """Those that share a weight are one module called several times."""
        return cls if all(cls.matches(module) for module in modules) else None
