"""Factors in and out of checkpoints: plain tensors in the state of each covered weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .auto import NUMBERS, PREVIOUS
from .engine import Engine

if TYPE_CHECKING:
    from torch.optim import Optimizer

AUTO_KEYS = (PREVIOUS, NUMBERS)
KEYS = ("kfac_A", "kfac_G", "kfac_updates", "kfac_steps")
# Raised with every change that an older reader would get wrong; what has no number is of format 1.
FORMAT, FORMAT_KEY = 1, "kfac_format"


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
                pieces = values[key][group].flatten().split([engine.bank.view(slot).numel() for slot in slots])
                for slot, piece in zip(slots, pieces, strict=True):
                    engine.bank.write(slot, piece)
                engine.bank.updates[slots] = values["kfac_updates"][group, side].to(engine.bank.updates)
        if bool((values["kfac_updates"] > 0).all()):
            engine.mark_restored(number)
        engine.restore_step(int(values["kfac_steps"]))


def _layers_by_weight(optimizer: Optimizer, engine: Engine) -> dict[int, list[str]]:
    """The number of a weight in the optimizer's state dict -> names of the layers that are made of it."""
    order = {id(p): i for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"])}
    result: dict[int, list[str]] = {}
    for layer in engine.layers:
        if id(layer.weight) in order:
            result.setdefault(order[id(layer.weight)], []).append(layer.name)
    return result


def _joined(layers: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The factors of layers on one weight, end to end along their groups; they are of one size."""
    if len(layers) == 1:
        return layers[0]
    return {**{key: torch.cat([layer[key] for layer in layers]) for key in KEYS[:3]}, KEYS[3]: layers[0][KEYS[3]]}


def _parted(values: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    """The reverse of `_joined`; a number of groups that does not fit is left to `check_factors`."""
    if count == 1:
        return [values]
    pieces = {key: values[key].tensor_split(count) for key in KEYS[:3]}
    return [{**{key: pieces[key][i] for key in KEYS[:3]}, KEYS[3]: values[KEYS[3]]} for i in range(count)]


def with_factors(
    state_dict: dict[str, Any], optimizer: Any, extra: Sequence[dict[str, Tensor]] = (), include_factors: bool = True
) -> dict[str, Any]:
    """The optimizer's state dict with the factors (or the engine's step alone), and what else belongs to each parameter."""
    engine = optimizer.engine
    factors = export_factors(engine) if include_factors else {}
    state = {index: dict(values) for index, values in state_dict["state"].items()}
    for index, names in _layers_by_weight(optimizer, engine).items():
        values = _joined([factors[name] for name in names]) if include_factors else {KEYS[3]: torch.tensor(engine.steps)}
        state.setdefault(index, {}).update({**values, FORMAT_KEY: torch.tensor(FORMAT)})
    for index, values in enumerate(extra):
        state.setdefault(index, {}).update(values)
    return {**state_dict, "state": state}


_ByNumber = dict[int, dict[str, Tensor]]


def without_factors(state_dict: dict[str, Any]) -> tuple[dict[str, Any], _ByNumber, _ByNumber]:
    """(state dict, factors, what lr="auto" keeps), the last two by number of the parameter.

    The base class would cast both to the parameter's type.

    Raises:
        ValueError: if a newer version wrote them.
    """
    newest = max((int(values.get(FORMAT_KEY, FORMAT)) for values in state_dict["state"].values()), default=FORMAT)
    if newest > FORMAT:
        raise ValueError(
            f"state_dict is of format {newest}, and this version of kfac_triton reads formats up to {FORMAT}; install a newer"
        )
    plain: dict[int, dict[str, Any]] = {}
    factors: _ByNumber = {}
    extra: _ByNumber = {}
    for index, values in state_dict["state"].items():
        plain[index] = {key: value for key, value in values.items() if key not in (*KEYS, *AUTO_KEYS, FORMAT_KEY)}
        extra[index] = {key: values[key] for key in AUTO_KEYS if key in values}
        if all(key in values for key in KEYS):
            factors[index] = {key: values[key] for key in KEYS}
    return {**state_dict, "state": plain}, factors, extra


def saved_step(state_dict: dict[str, Any]) -> int | None:
    """The engine's step in a state dict; None if K-FAC did not write it."""
    return next((int(values[KEYS[3]]) for values in state_dict["state"].values() if KEYS[3] in values), None)


def factors_by_layer(optimizer: Any, factors: dict[int, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Factors by module name from factors by number of the weight."""
    result: dict[str, dict[str, Tensor]] = {}
    for index, names in _layers_by_weight(optimizer, optimizer.engine).items():
        if index in factors:
            result.update(zip(names, _parted(factors[index], len(names)), strict=True))
    return result
