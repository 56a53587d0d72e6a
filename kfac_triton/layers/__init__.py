"""Layers that K-FAC covers: one small class per module type, and the registry of them."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from .base import Layer, Rows
from .conv import Conv1dLayer, Conv2dLayer, Conv3dLayer
from .linear import LinearLayer

__all__ = ["LAYER_TYPES", "Choice", "Layer", "Rows", "find_layers", "register"]

LAYER_TYPES: list[type[Layer]] = [LinearLayer, Conv1dLayer, Conv2dLayer, Conv3dLayer]

# Which modules: patterns for their names and classes, or a predicate of both.
Choice = str | Sequence[str] | Callable[[str, nn.Module], bool]


def register(layer_type: type[Layer]) -> type[Layer]:
    """Makes K-FAC cover a module type; a class decorator. What is registered later is asked first.

    Raises:
        TypeError: if layer_type is no `Layer` with a module type.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, Layer) and hasattr(layer_type, "module_type")):
        raise TypeError(f"layer_type must be a class derived from Layer with a module_type, but is {layer_type!r}")
    LAYER_TYPES.insert(0, layer_type)
    return layer_type


def _layer_type(module: nn.Module) -> type[Layer] | None:
    """The adapter for a module; a subclass that computes something else in forward is not the layer its base class is."""
    for layer_type in LAYER_TYPES:
        base = layer_type.module_type
        if isinstance(module, base) and type(module).forward is base.forward:
            return layer_type
    return None


def is_chosen(choice: Choice, name: str, module: nn.Module) -> bool:
    """Whether a module's name or class matches one of the patterns (as of file names: * and ?), or the predicate holds."""
    if callable(choice):
        return bool(choice(name, module))
    patterns = [choice] if isinstance(choice, str) else choice
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in (name, type(module).__name__))


def _why_not(layer_type: type[Layer], module: nn.Module, sharers: list[nn.Module]) -> str | None:
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
        raise ValueError("model holds a lazy module without weights yet; run one forward pass before making the optimizer")
    reason = layer_type.why_not(module)
    if reason is None and len(sharers) > 1 and layer_type.tie(sharers) is None:
        return "its weight is shared with another module"
    return reason


def find_layers(
    model: nn.Module,
    weight_sharing: str = "expand",
    loss_terms: str = "examples",
    *,
    skip: Choice = (),
    include: Choice = "*",
    **options: Any,
) -> tuple[list[Layer], dict[str, str]]:
    """Layers of the model that K-FAC covers, in module order, and the reason for each supported type that it does not.

    Args:
        model: any module; frozen or parametrized weights are left out, one that several modules share is one layer.
        weight_sharing: "expand" or "reduce" (Eschenhagen et al. 2023).
        loss_terms: what the loss averages over, "examples" or "tokens".
        skip: modules to leave out.
        include: modules to consider.
        options: for the adapters (see `Layer.cover`).

    Raises:
        ValueError: if a lazy module has no weights yet.
    """
    users: dict[int, dict[int, nn.Module]] = defaultdict(dict)
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)][id(module)] = module
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    done: set[int] = set()
    for name, module in model.named_modules():
        layer_type = _layer_type(module)
        if layer_type is None or id(module) in done:
            continue
        sharers = list(users[id(module._parameters.get("weight"))].values())
        reason = _why_not(layer_type, module, sharers)
        if reason is None and (is_chosen(skip, name, module) or not is_chosen(include, name, module)):
            reason = "it is left out by skip or include"
        if reason is not None:
            skipped[name] = reason
        elif len(sharers) > 1:
            tied = layer_type.tie(sharers)
            assert tied is not None
            layer = tied(name, sharers[0], weight_sharing, loss_terms)
            layer.share(sharers)
            done.update(map(id, sharers))
            layers.append(layer)
        else:
            layers += layer_type.cover(name, module, weight_sharing, loss_terms, **options)
    return layers, skipped
