"""The registry of layer types: which adapter covers a module, and the layers of a model."""

from __future__ import annotations

import fnmatch
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from .. import validation
from .attention import AttentionLayer
from .base import Layer
from .conv import ConvLayer
from .conv_transpose import ConvTransposeLayer
from .embedding import EmbeddingLayer
from .hf_conv1d import HFConv1DLayer
from .linear import LinearLayer
from .norm import BatchNormLayer, GroupNormLayer, LayerNormLayer, RMSNormLayer
from .tied import TiedLayer

LAYER_TYPES: list[type[Layer]] = [
    LinearLayer,
    ConvLayer,
    ConvTransposeLayer,
    EmbeddingLayer,
    LayerNormLayer,
    RMSNormLayer,
    BatchNormLayer,
    GroupNormLayer,
    HFConv1DLayer,
    AttentionLayer,
]

# Which modules: patterns for their names and classes, or a predicate of both.
Choice = str | Sequence[str] | Callable[[str, nn.Module], bool]
# The dimension of inputs that counts examples, or a function of a module's name and the module that returns it.
BatchDim = int | Callable[[str, nn.Module], int]


def register(layer_type: type[Layer]) -> type[Layer]:
    """Makes K-FAC cover a module type; a class decorator. Later registrations take precedence.

    Raises:
        TypeError: if layer_type is not a `Layer` with a module type.
    """
    if not (isinstance(layer_type, type) and issubclass(layer_type, Layer) and hasattr(layer_type, "module_type")):
        raise TypeError(f"layer_type must be a class derived from Layer with a module_type, but is {layer_type!r}")
    LAYER_TYPES.insert(0, layer_type)
    return layer_type


def _layer_type(module: nn.Module) -> type[Layer] | None:
    return next((layer_type for layer_type in LAYER_TYPES if layer_type.matches(module)), None)


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    """Weights of all modules of supported types, covered or not."""
    kinds = ((module, _layer_type(module)) for module in model.modules())
    return [w for module, kind in kinds if kind is not None for w in kind.weights(module) if w is not None]


def is_chosen(choice: Choice, name: str, module: nn.Module) -> bool:
    """Whether a module's name or class matches one of the patterns (as of file names: * and ?), or the predicate holds."""
    if callable(choice):
        return bool(choice(name, module))
    patterns = [choice] if isinstance(choice, str) else choice
    return any(fnmatch.fnmatchcase(text, pattern) for pattern in patterns for text in (name, type(module).__name__))


def find_layers(
    model: nn.Module,
    weight_sharing: str = "expand",
    loss_terms: str = "examples",
    *,
    skip: Choice = (),
    include: Choice = "*",
    split: Mapping[str, int] | None = None,
    batch_dim: BatchDim = 0,
    **options: Any,
) -> tuple[list[Layer], dict[str, str]]:
    """Layers of the model that K-FAC covers, in module order, and for each other module of a supported type the reason.

    Args:
        model: any module; frozen or parametrized weights are left out, and a weight that several modules share makes one layer.
        weight_sharing: "expand" or "reduce" (Eschenhagen et al. 2023).
        loss_terms: what the loss averages over, "examples" or "tokens".
        skip: modules to leave out.
        include: modules to consider.
        split: pattern of names or classes -> number of equal parts that G is divided into along the output.
        batch_dim: the dimension of inputs that counts examples, or a function of a module's name and the module.
        options: for the adapters (see `Layer.cover`).

    Raises:
        ValueError: if a lazy module has no weights yet, or split does not fit a layer, or fits none, or batch_dim is negative,
            or differs between modules that share a weight.
        TypeError: if batch_dim returns something that is not an integer.
    """
    users: dict[nn.Parameter | None, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in set(module._parameters.values()):
            users[parameter].append(module)
    layers: list[Layer] = []
    skipped: dict[str, str] = {}
    done: set[int] = set()
    for name, module in model.named_modules():
        layer_type = _layer_type(module)
        if layer_type is None or id(module) in done:
            continue
        done.update(map(id, layer_type.inner(module)))
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in module._parameters.values()):
            raise ValueError("model has a lazy module without weights; run one forward pass before making the optimizer")
        sharers = max((users[weight] for weight in layer_type.weights(module) if weight is not None), key=len, default=[])
        reason, tied = layer_type.why_not(module), None
        if reason is None and len(sharers) > 1:
            tied = layer_type.tie(sharers) or TiedLayer.tie(sharers)
            reason = None if tied is not None else "its weight is shared with another module"
        if reason is None and (is_chosen(skip, name, module) or not is_chosen(include, name, module)):
            reason = "it is left out by skip or include"
        if reason is not None:
            skipped[name] = reason
        elif tied is not None:
            layer = tied(name, sharers[0], weight_sharing, loss_terms)
            layer.share(sharers)
            done.update(map(id, sharers))
            layers.append(layer)
        else:
            for layer in layer_type.cover(name, module, weight_sharing, loss_terms, **options):
                if layer.name != name and is_chosen(skip, layer.name, module):
                    skipped[layer.name] = "it is left out by skip"
                else:
                    layers.append(layer)
    _split_outputs(layers, split or {})
    _set_batch_dims(layers, batch_dim, {module: name for name, module in model.named_modules()})
    return layers, skipped


def _split_outputs(layers: list[Layer], split: Mapping[str, int]) -> None:
    """Sets `output_parts` of the layers that the patterns name; the first pattern that matches counts."""
    unused = set(split)
    for layer in layers:
        matches = [pattern for pattern in split if is_chosen(pattern, layer.name, layer.module)]
        unused.difference_update(matches)
        if not matches:
            continue
        count, size = split[matches[0]], layer.output_size
        if size % count:
            good = ", ".join(str(n) for n in range(2, size + 1) if size % n == 0)
            raise ValueError(
                f"split divides the output of layer {layer.name!r} into {count} equal parts, but its size {size} is not a "
                f"multiple of {count}; pass one of {good}"
            )
        layer.output_parts = count
    if unused:
        raise ValueError(f"split must name layers that K-FAC covers, but {', '.join(map(repr, sorted(unused)))} matches none")


def _set_batch_dims(layers: list[Layer], batch_dim: BatchDim, names: Mapping[nn.Module, str]) -> None:
    """Sets `batch_dim` of the layers whose examples need not be in dimension 0."""
    for layer in layers:
        if layer.feature_dims is None:
            continue
        uses: dict[bool, dict[str, int]] = {False: {}, True: {}}  # an embedding that is tied to a decoder has one of its own
        for use, module in enumerate(layer.modules):
            name = names[module]
            found = batch_dim(name, module) if callable(batch_dim) else batch_dim
            uses[layer.uses_weight_transposed(use)][name] = validation.whole(f"batch_dim of module {name!r}", found, low=0)
        for dims in uses.values():
            if len(set(dims.values())) > 1:
                raise ValueError(
                    f"batch_dim must be the same for modules that share a weight, but is {dims}; pass skip for them"
                )
        layer.batch_dim = next(iter(uses[False].values()))
        if isinstance(layer, TiedLayer):
            layer.embedding_batch_dim = next(iter(uses[True].values()))
