"""Layers that K-FAC covers: one small class per module type."""

from __future__ import annotations

from collections import Counter

from torch import nn

from .base import Layer, Rows
from .conv import Conv1dLayer, Conv2dLayer, Conv3dLayer
from .linear import LinearLayer

__all__ = ["LAYER_TYPES", "Layer", "Rows", "find_layers"]

LAYER_TYPES: tuple[type[Layer], ...] = (LinearLayer, Conv1dLayer, Conv2dLayer, Conv3dLayer)


def _layer_type(module: nn.Module) -> type[Layer] | None:
    """The adapter for a module; a subclass that computes something else in forward is not the layer its base class is."""
    for layer_type in LAYER_TYPES:
        base = layer_type.module_type
        if isinstance(module, base) and type(module).forward is base.forward:
            return layer_type
    return None


def _why_not(module: nn.Module, uses: Counter[int]) -> str | None:
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a parameter of its own (parametrized or replaced)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError("model holds a lazy module without weights yet; run one forward pass before making the optimizer")
    if not weight.requires_grad:
        return "its weight is frozen"
    if uses[id(weight)] > 1:
        return "its weight is shared with another module"
    return None


def find_layers(
    model: nn.Module, weight_sharing: str = "expand", loss_terms: str = "examples"
) -> tuple[list[Layer], dict[str, str]]:
    """Layers of the model that K-FAC covers, in module order, and the reason for each supported type that it does not.

    Args:
        model: any module; weights shared by several modules, frozen or parametrized ones are left out.
        weight_sharing: "expand" or "reduce" (Eschenhagen et al. 2023).
        loss_terms: what the loss averages over, "examples" or "tokens".

    Raises:
        ValueError: if a lazy module has no weights yet.
    """
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        layer_type = _layer_type(module)
        if layer_type is None:
            continue
        reason = _why_not(module, uses)
        if reason is None:
            layers.append(layer_type(name, module, weight_sharing, loss_terms))
        else:
            skipped[name] = reason
    return layers, skipped
