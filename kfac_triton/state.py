"""Factors in and out of checkpoints: plain tensors in the state of each covered weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import Engine

if TYPE_CHECKING:
    from torch.optim import Optimizer

KEYS = ("kfac_A", "kfac_G", "kfac_updates", "kfac_steps")


def _slots(engine: Engine, number: int) -> tuple[list[list[int]], list[list[int]]]:
    """Slots of a layer's A and of its G, a list a group."""
    sides = [engine.partition.parts_of[block] for block in engine.partition.blocks_of(number)]
    return tuple([[engine.bank.slots[i] for i in side[k]] for side in sides] for k in (0, 1))  # type: ignore[return-value]


def _flat(engine: Engine, groups: list[list[int]]) -> Tensor:
    """Factors of one side: (groups, n, n), (groups, n) of diagonals, or (groups, numbers) of several blocks end to end."""
    views = [[engine.bank.view(slot) for slot in slots] for slots in groups]
    return torch.stack([x[0] if len(x) == 1 else torch.cat([view.flatten() for view in x]) for x in views])


def export_factors(engine: Engine) -> dict[str, dict[str, Tensor]]:
    """Module name -> factors (see `_flat`), accepted updates (groups, 2) of A and G, and the engine's step."""
    result = {}
    for number, layer in enumerate(engine.layers):
        a, g = _slots(engine, number)
        updates = torch.stack([engine.bank.updates[[slots[0] for slots in side]] for side in (a, g)], 1)
        values = (_flat(engine, a), _flat(engine, g), updates, torch.tensor(engine.steps))
        result[layer.name] = dict(zip(KEYS, values, strict=True))
    return result


def check_factors(engine: Engine, factors: dict[str, dict[str, Tensor]]) -> None:
    """Whether `restore_factors` could use them.

    Raises:
        ValueError: if a factor has the wrong shape or is not finite.
    """
    for number, layer in enumerate(engine.layers):
        values = factors.get(layer.name)
        if values is None:
            continue
        name = layer.name
        for key, groups in zip(KEYS[:2], _slots(engine, number), strict=True):
            expected = tuple(_flat(engine, groups).shape)
            if tuple(values[key].shape) != expected:
                raise ValueError(f"{key} of layer {name!r} must have shape {expected}, but has {tuple(values[key].shape)}")
            if not bool(torch.isfinite(values[key]).all()):
                raise ValueError(f"{key} of layer {name!r} has values that are not finite; load another checkpoint")


def restore_factors(engine: Engine, factors: dict[str, dict[str, Tensor]]) -> None:
    """Writes factors that passed `check_factors`; layers without any keep theirs. Inverses follow at the next step."""
    for number, layer in enumerate(engine.layers):
        values = factors.get(layer.name)
        if values is None:
            continue
        for side, (key, groups) in enumerate(zip(KEYS[:2], _slots(engine, number), strict=True)):
            for group, slots in enumerate(groups):
                views = [engine.bank.view(slot) for slot in slots]
                pieces = values[key][group].flatten().split([view.numel() for view in views])
                for view, piece in zip(views, pieces, strict=True):
                    view.copy_(piece.view_as(view))
                engine.bank.updates[slots] = values["kfac_updates"][group, side].to(engine.bank.updates)
        if bool((values["kfac_updates"] > 0).all()):
            engine.mark_restored(number)
        engine.restore_step(int(values["kfac_steps"]))


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
