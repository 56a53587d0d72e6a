"""Conv1D of Hugging Face transformers (GPT-2): an nn.Linear whose weight is stored transposed."""

from __future__ import annotations

from torch import nn

from .linear import LinearLayer

# The modules of transformers that have defined it. It is recognized by name, so that transformers need not be installed.
_HOMES = ("transformers.pytorch_utils", "transformers.modeling_utils")


class HFConv1DLayer(LinearLayer):
    """y = a W^T + bias with W = weight^T."""

    module_type: type[nn.Module] = nn.Module
    weight_is_transposed = True

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether the module is a Conv1D, or derived from it with the same forward."""
        named = (base for base in type(module).__mro__ if base.__name__ == "Conv1D" and base.__module__ in _HOMES)
        return any(type(module).forward is base.__dict__.get("forward") for base in named)

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[LinearLayer] | None:
        """Modules that share a weight are one module that is called several times."""
        return cls if all(cls.matches(module) for module in modules) else None
