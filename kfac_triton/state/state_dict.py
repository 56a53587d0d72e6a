"""Factors and inverses in the state dict of an optimizer: plain tensors in the state of each covered weight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..engine import Engine
from ..steps.controller import NUMBERS, PREVIOUS
from ..steps.param_groups import parameters_of
from .layer_state import FACTORS, KEYS, OF_THE_ENGINE, STEPS, LayerState, keys_of

if TYPE_CHECKING:
    from torch.optim import Optimizer

# This number grows with every change that older versions would misread. A state dict without a number has format 1.
FORMAT, FORMAT_KEY = 1, "kfac_format"
_OURS = (*KEYS, *OF_THE_ENGINE, PREVIOUS, NUMBERS, FORMAT_KEY)

_ByNumber = dict[int, LayerState]


def require_readable(number: int) -> None:
    """Refuses a format that this version does not know.

    Raises:
        ValueError: if a newer version wrote it.
    """
    if number > FORMAT:
        raise ValueError(
            f"state_dict has format {number}, but this version of kfac_triton reads formats up to {FORMAT}; install a newer one"
        )


def _layers_by_weight(optimizer: Optimizer, engine: Engine) -> dict[int, list[str]]:
    """Number of a weight in the optimizer's state dict -> names of the layers that use it."""
    order = {id(p): i for i, p in enumerate(parameters_of(optimizer))}
    result: dict[int, list[str]] = {}
    for layer in engine.layers:
        if id(layer.weight) in order:
            result.setdefault(order[id(layer.weight)], []).append(layer.name)
    return result


def _joined(layers: list[LayerState]) -> LayerState:
    """The state of layers on one weight, which have the same size, concatenated along the groups."""
    if len(layers) == 1:
        return layers[0]
    first = layers[0]
    return {key: first[key] if key in OF_THE_ENGINE else torch.cat([layer[key] for layer in layers]) for key in first}


def _parted(values: LayerState, count: int) -> list[LayerState]:
    """The reverse of `_joined`. `check_layers` will refuse a wrong number of groups."""
    if count == 1:
        return [values]
    pieces = {key: [x] * count if key in OF_THE_ENGINE else x.tensor_split(count) for key, x in values.items()}
    return [{key: parts[i] for key, parts in pieces.items()} for i in range(count)]


def add_layer_state(
    state_dict: dict[str, Any], optimizer: Any, layers: dict[str, LayerState] | None, extra: Sequence[dict[str, Tensor]] = ()
) -> dict[str, Any]:
    """The optimizer's state dict with more in the state of each parameter.

    Args:
        state_dict: of the base class.
        optimizer: whose state dict it is.
        layers: the state of layers by name; None to add nothing but the number of steps.
        extra: what lr="auto" keeps of each parameter.
    """
    engine = optimizer.engine
    state = {i: {k: v for k, v in values.items() if k not in _OURS} for i, values in state_dict["state"].items()}
    for index, names in _layers_by_weight(optimizer, engine).items():
        own = state.setdefault(index, {})
        own |= {STEPS: torch.tensor(engine.progress.steps)} if layers is None else _joined([layers[name] for name in names])
        own[FORMAT_KEY] = torch.tensor(FORMAT)
    for index, values in enumerate(extra):
        state.setdefault(index, {}).update(values)
    return {**state_dict, "state": state}


def take_layer_state(state_dict: dict[str, Any]) -> tuple[dict[str, Any], _ByNumber, _ByNumber]:
    """Splits a state dict into (state dict, state of layers, state of lr="auto"), the last two by number of the parameter.

    The last two are taken out because the base class would cast them to the parameter's type.

    Raises:
        ValueError: if a newer version wrote them.
    """
    formats = [values.get(FORMAT_KEY) for values in state_dict["state"].values()]
    require_readable(max((int(x) for x in formats if isinstance(x, Tensor)), default=FORMAT))
    plain: dict[Any, dict[str, Any]] = {}
    layers: _ByNumber = {}
    extra: _ByNumber = {}
    # Parameters may have names (torch.distributed.checkpoint) instead of numbers. Only their order in the groups counts.
    saved = [number for group in state_dict["param_groups"] for number in group["params"]]
    for index, number in enumerate(saved):
        # A flat distributed checkpoint has an empty dict for a declared key that it lacks.
        values = {key: value for key, value in state_dict["state"].get(number, {}).items() if not isinstance(value, dict)}
        # The base class would keep these very tensors, which may be the state of another optimizer: so they are copied.
        plain[number] = {key: _copy(value) for key, value in values.items() if key not in _OURS}
        extra[index] = {key: values[key] for key in (PREVIOUS, NUMBERS) if key in values}
        if any(key in values for key in FACTORS):  # check_layers refuses one without the other
            layers[index] = {key: values[key] for key in (*KEYS, *OF_THE_ENGINE) if key in values}
    return {**state_dict, "state": plain}, layers, extra


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def declare_keys(optimizer: Optimizer, engine: Engine, is_auto: bool) -> None:
    """Adds the keys of `add_layer_state` to each parameter's state, without values: checkpoint tools load only known keys."""
    weights = _layers_by_weight(optimizer, engine)
    for index, parameter in enumerate(parameters_of(optimizer)):
        keys = (*keys_of(engine), FORMAT_KEY) if index in weights else ()
        auto = (PREVIOUS, *((NUMBERS,) if index == 0 else ())) if is_auto else ()
        state = optimizer.state[parameter]
        for key in _OURS:
            state.pop(key, None)
        state.update(dict.fromkeys((*keys, *auto)))


def saved_step(state_dict: dict[str, Any]) -> int | None:
    """The number of steps in a state dict; None if K-FAC did not write it."""
    return next((int(x[STEPS]) for x in state_dict["state"].values() if isinstance(x.get(STEPS), Tensor)), None)


def layer_states(optimizer: Any, states: _ByNumber) -> dict[str, LayerState]:
    """The state of layers by name, from that by number of the weight."""
    result: dict[str, LayerState] = {}
    for index, names in _layers_by_weight(optimizer, optimizer.engine).items():
        if index in states:
            result.update(zip(names, _parted(states[index], len(names)), strict=True))
    return result
