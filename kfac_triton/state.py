"""Factors in and out of checkpoints: plain tensors in the state of each covered weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import Engine

if TYPE_CHECKING:
    from torch.optim import Optimizer

KEYS = ("kfac_A", "kfac_G", "kfac_updates", "kfac_steps")


def export_factors(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Module name -> factors (groups, n, n), accepted updates (groups, 2) of A and G, and the engine's step."""
    result = {}
    first = 0
    for layer in engine.layers:
        blocks = list(range(first, first + layer.groups))
        first += layer.groups
        pairs = [engine.bank.block(block) for block in blocks]
        updates = torch.stack([engine.bank.updates[s[blocks]] for s in (engine.bank.a_slots, engine.bank.g_slots)], 1)
        values = (
            torch.stack([a for a, _ in pairs]),
            torch.stack([g for _, g in pairs]),
            updates,
            torch.tensor(engine.steps),
        )
        result[layer.name] = dict(zip(KEYS, values, strict=True))
    return result


def check_factors(engine: Engine, factors: dict[str, dict[str, Tensor]]) -> None:
    """Whether `restore_factors` could use them.

    Raises:
        ValueError: if a factor has the wrong shape or is not finite.
    """
    for layer in engine.layers:
        values = factors.get(layer.name)
        if values is None:
            continue
        name = layer.name
        for key, size in (("kfac_A", layer.input_size), ("kfac_G", layer.output_size)):
            expected = (layer.groups, size, size)
            if tuple(values[key].shape) != expected:
                raise ValueError(f"{key} of layer {name!r} must have shape {expected}, but has {tuple(values[key].shape)}")
            if not bool(torch.isfinite(values[key]).all()):
                raise ValueError(f"{key} of layer {name!r} has values that are not finite; load another checkpoint")


def restore_factors(engine: Engine, factors: dict[str, dict[str, Tensor]]) -> None:
    """Writes factors that passed `check_factors`; layers without any keep theirs. Inverses follow at the next step."""
    first = 0
    for number, layer in enumerate(engine.layers):
        start, first = first, first + layer.groups
        values = factors.get(layer.name)
        if values is None:
            continue
        for group in range(layer.groups):
            block = start + group
            a, g = engine.bank.block(block)
            a.copy_(values["kfac_A"][group])
            g.copy_(values["kfac_G"][group])
            engine.bank.updates[engine.bank.a_slots[block]] = values["kfac_updates"][group, 0].to(engine.bank.updates)
            engine.bank.updates[engine.bank.g_slots[block]] = values["kfac_updates"][group, 1].to(engine.bank.updates)
        if bool((values["kfac_updates"] > 0).all()):
            engine.mark_restored(number)
        engine.steps = int(values["kfac_steps"])
    engine.gate.open = engine.steps % engine.settings.statistics_every == 0


def _weight_indices(optimizer: Optimizer, engine: Engine) -> dict[str, int]:
    """Module name -> the number of its weight in the optimizer's state dict."""
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    return {layer.name: order[id(layer.weight)] for layer in engine.layers if id(layer.weight) in order}


def with_factors(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The optimizer's state dict with the factors added."""
    factors = export_factors(optimizer.engine)
    state = {index: dict(values) for index, values in state_dict["state"].items()}
    for name, index in _weight_indices(optimizer, optimizer.engine).items():
        state.setdefault(index, {}).update(factors[name])
    return {**state_dict, "state": state}


def without_factors(state_dict: dict[str, Any]) -> tuple[dict[str, Any], dict[int, dict[str, Tensor]]]:
    """(state dict, factors by number of the weight): the base class would cast factors to the weight's type."""
    plain, factors = {}, {}
    for index, values in state_dict["state"].items():
        plain[index] = {key: value for key, value in values.items() if key not in KEYS}
        if all(key in values for key in KEYS):
            factors[index] = {key: values[key] for key in KEYS}
    return {**state_dict, "state": plain}, factors


def factors_by_layer(optimizer: Any, factors: dict[int, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Factors by module name from factors by number of the weight."""
    indices = _weight_indices(optimizer, optimizer.engine)
    return {name: factors[index] for name, index in indices.items() if index in factors}
