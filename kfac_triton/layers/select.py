"""The layers of a model that an engine covers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .. import validation
from ..kernels import runtime
from ..settings import Settings
from .base import Layer
from .hf_labels import has_token_labels
from .partition import factor_dtype
from .registry import find_layers, weights_of


def select_layers(
    model: nn.Module, settings: Settings, parameters: Iterable[nn.Parameter] | None
) -> tuple[list[Layer], dict[str, str]]:
    """Layers with a weight among the parameters (None: any), and why the other modules of supported types are not covered.

    Raises:
        ValueError: if there are none.
    """
    layers, skipped = find_layers(
        model,
        settings.weight_sharing,
        "tokens" if are_tokens(model, settings) else "examples",
        skip=settings.skip,
        include=settings.include,
        norms=settings.norms,
        split=settings.split,
        batch_dim=settings.batch_dim,
    )
    if parameters is not None:
        chosen = {id(p) for p in parameters}
        skipped |= {x.name: "its weight is not optimized" for x in layers if id(x.weight) not in chosen}
        layers = [layer for layer in layers if id(layer.weight) in chosen]
    # Factors of complex layers would have to be Hermitian. Ours are real, which would drop the imaginary parts.
    skipped |= {layer.name: "its weight is complex" for layer in layers if layer.weight.is_complex()}
    layers = [layer for layer in layers if not layer.weight.is_complex()]
    if settings.curvature == "adam":
        layers, partly = covered_as_a_whole(layers)
        skipped |= partly
    refuse_sharded(layers)
    if not layers:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "model has no layer that K-FAC covers (linear, convolution, embedding, norm, attention; with a trainable weight)"
            + (f": {reasons}" if reasons else "; use another optimizer")
        )
    return layers, skipped


def covered_as_a_whole(layers: list[Layer]) -> tuple[list[Layer], dict[str, str]]:
    """The layers without those of which other rows of a packed parameter are not covered, and why these are left out.

    A rule that keeps its averages for each layer cannot move some rows of a parameter by another rule.
    """
    rows: dict[int, int] = {}
    for layer in layers:
        for p in layer.parameters():
            part = layer.part_of(p)
            rows[id(p)] = rows.get(id(p), 0) + (len(p) if part is None else part.stop - part.start)
    partly = {layer.name for layer in layers if any(rows[id(p)] < len(p) for p in layer.parameters())}
    reasons = dict.fromkeys(sorted(partly), "other rows of its packed parameters are not covered")
    return [layer for layer in layers if layer.name not in partly], reasons


def are_tokens(model: nn.Module, settings: Settings) -> bool:
    """Whether each token has a loss term: if the user says so, or the model is a language model of Hugging Face."""
    return settings.loss_terms == "tokens" or (settings.loss_terms == "auto" and has_token_labels(model))


def batch_dim_of(model: nn.Module, settings: Settings) -> Callable[[nn.Module], int]:
    """The dimension that counts examples in the first tensor argument of a module of the model."""
    chosen = settings.batch_dim
    if not callable(chosen):
        return lambda module: chosen
    names = {module: name for name, module in model.named_modules()}
    return lambda module: validation.whole(
        f"batch_dim of module {names.get(module, '')!r}", chosen(names.get(module, ""), module), low=0
    )


def refuse_sharded(layers: Iterable[Layer]) -> None:
    """Refuses weights of which this process has only a part.

    Raises:
        NotImplementedError: if there are any.
    """
    sharded = [layer.name for layer in layers if hasattr(layer.weight, "to_local")]
    if sharded:
        raise NotImplementedError(
            f"weights of layers {', '.join(map(repr, sharded))} are DTensors (fully_shard, tensor parallelism), which K-FAC "
            "does not precondition yet; leave these layers out with skip=, or use DistributedDataParallel"
        )


def frozen_weights(model: nn.Module, parameters: Iterable[nn.Parameter] | None) -> list[nn.Parameter]:
    """Weights of supported layers among the parameters (None: any) that are not trained now, and may be later."""
    chosen = None if parameters is None else {id(p) for p in parameters}
    return [w for w in weights_of(model) if not w.requires_grad and (chosen is None or id(w) in chosen)]


def require_backend(backend: str, layers: list[Layer]) -> None:
    """Refuses backend="triton" if the kernels cannot be used, before anything is constructed."""
    if backend != "triton":
        return
    for layer in layers:
        reason = runtime.obstacle(layer.weight.device)
        if reason is None and factor_dtype(layer.weight) != torch.float32:
            reason = f"layer {layer.name!r} has {layer.weight.dtype} factors, and the kernels need float32"
        if reason is not None:
            raise ValueError(f"backend is 'triton', but {reason}; use backend='auto'")
