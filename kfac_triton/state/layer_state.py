"""The state of each layer as plain tensors: factors, and what cannot be computed from them again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..curvature.inverse import Inverse
from ..engine import Engine

LayerState = dict[str, Tensor]

FACTORS = ("kfac_A", "kfac_G")
UPDATES, STEPS = "kfac_updates", "kfac_steps"
# The kind of inverse is part of the key, so that an engine does not load inverses of another kind.
INVERSES = {kind: (f"kfac_{kind}_A", f"kfac_{kind}_G") for kind in ("inverse", "root", "basis", "eigenvectors")}
CERTIFICATES, REFRESHED = "kfac_certificates", "kfac_refreshed"
MOMENTS, MOMENT_UPDATES = "kfac_moments", "kfac_moment_updates"
MEANS, SAMPLING = "kfac_means", "kfac_sampling"  # with curvature="adam"

# These are the same for all layers. The first dimension of the others is that of channel groups.
OF_THE_ENGINE = (STEPS, REFRESHED)
KEYS = (
    *FACTORS, UPDATES, *(key for keys in INVERSES.values() for key in keys), CERTIFICATES, MOMENTS, MOMENT_UPDATES, MEANS,
    SAMPLING,
)  # fmt: skip


def export_layers(engine: Engine, include_inverses: bool = True) -> dict[str, LayerState]:
    """Module name -> state of the layer.

    It includes inverses if a run that continues from here needs them, because the next step uses inverses of older factors
    (inverse_every above 1), or because the method starts from the last ones (warm refreshes, eigenbases).

    Args:
        engine: the engine.
        include_inverses: without inverses there are no moments of EKFAC either, which need their basis. The next step computes
            both from the factors.

    Returns:
        For each layer "kfac_A" and "kfac_G": (groups, n, n), for diagonals (groups, n), for factors in several blocks (groups,
        numbers) with one block after another; "kfac_updates": numbers of updates of A and G, (groups, 2); "kfac_steps": number
        of steps. With inverses "kfac_inverse_A" and "kfac_inverse_G" (or root, or basis): (groups, numbers), as stored, with
        padding; "kfac_certificates": residual and damping of each, (groups, factors, 2); "kfac_refreshed": damping of the last
        step, and whether inverses are stale. With EKFAC "kfac_moments": (groups, numbers), and "kfac_moment_updates":
        (groups,). With curvature="adam" also "kfac_means", as "kfac_moments", and "kfac_sampling": `FactorBank.sampling` of A
        and G, (groups, 2).
    """
    keeps_inverses = include_inverses and _needs_inverses(engine)
    result = {}
    for number, layer in enumerate(engine.layers):
        state = {key: _flat_factors(engine, side) for key, side in zip(FACTORS, _sides(engine, number), strict=True)}
        updates = [engine.bank.updates[[slots[0] for slots in side]] for side in _sides(engine, number)]
        state[UPDATES] = torch.stack(updates, 1)
        state[STEPS] = torch.tensor(engine.progress.steps)
        if engine.curvature.adam is not None:
            sampling = [engine.bank.sampling[[slots[0] for slots in side]] for side in _sides(engine, number)]
            state[SAMPLING] = torch.stack(sampling, 1)
        if keeps_inverses:
            state |= _export_inverses(engine, number)
        result[layer.name] = state
    return result


def check_layers(engine: Engine, states: dict[str, LayerState]) -> None:
    """Checks states for `restore_layers`.

    Raises:
        ValueError: if a value is missing, has the wrong shape, or is not finite.
    """
    for number, layer in enumerate(engine.layers):
        if layer.name not in states:
            continue
        state = states[layer.name]
        sides = _sides(engine, number)
        shapes = dict(zip(FACTORS, (_shape(engine, side) for side in sides), strict=True))
        for key, expected in {**shapes, UPDATES: (len(sides[0]), 2), STEPS: ()}.items():
            if key not in state:
                raise ValueError(f"state_dict has no {key} of layer {layer.name!r}; load another checkpoint")
            if tuple(state[key].shape) != expected:
                raise ValueError(f"{key} of layer {layer.name!r} must have shape {expected}, but has {tuple(state[key].shape)}")
        for key, value in state.items():
            # A residual is infinite if there is no inverse; what is stored in its place is zero.
            bad = torch.isnan(value) if key == CERTIFICATES else ~torch.isfinite(value)
            if bool(bad.any()):
                raise ValueError(f"{key} of layer {layer.name!r} has values that are not finite; load another checkpoint")


def restore_layers(engine: Engine, states: dict[str, LayerState]) -> None:
    """Writes states that passed `check_layers`; layers without one keep theirs.

    Inverses are restored if all layers have them, of the engine's kind and sizes. Otherwise the next step computes them.
    """
    numbers = {number: states[layer.name] for number, layer in enumerate(engine.layers) if layer.name in states}
    complete = {i for i, x in numbers.items() if _has_inverses(engine, i, x)}
    known = {number for number, state in numbers.items() if bool((state[UPDATES] > 0).all())}
    keeps_inverses = len(complete) == len(engine.layers)
    if engine.curvature.adam is not None:  # each layer's basis and averages are independent of the others
        keeps_inverses = bool(complete) and complete >= known
    elif not keeps_inverses:
        complete = set()
    for number, state in numbers.items():
        for side, (key, groups) in enumerate(zip(FACTORS, _sides(engine, number), strict=True)):
            for group, slots in enumerate(groups):
                pieces = state[key][group].flatten().split([engine.bank.view(slot).numel() for slot in slots])
                for slot, piece in zip(slots, pieces, strict=True):
                    engine.bank.write(slot, piece)
                engine.bank.updates[slots] = state[UPDATES][group, side].to(engine.bank.updates)
                if SAMPLING in state:
                    engine.bank.sampling[slots] = state[SAMPLING][group, side].to(engine.bank.sampling)
        engine.curvature.forget_moments(number)
        if number in complete:
            _restore_inverses(engine, number, state)
            if engine.curvature.adam is not None and number not in known:
                engine.curvature.adam.forget_bases(engine.curvature.tiles_of(number))
    if not numbers:
        return
    any_of_them = next(iter(numbers.values()))
    missing = engine.progress.without_statistics | (numbers.keys() - known)  # the state may be of a run before its first step
    progress = replace(engine.progress, without_statistics=missing).with_statistics(known).at_step(int(any_of_them[STEPS]))
    if keeps_inverses:
        damping, is_stale = any_of_them[REFRESHED].tolist()
        progress = replace(progress, damping=damping, is_stale=bool(is_stale), has_new_layers=False)
    engine.resume(progress)


def keys_of(engine: Engine) -> tuple[str, ...]:
    """Keys of the state that `export_layers` returns for each layer."""
    if not _needs_inverses(engine):
        return (*FACTORS, UPDATES, STEPS)
    moments = _moment_keys(engine)
    return (*FACTORS, UPDATES, STEPS, *INVERSES[engine.curvature.kind], CERTIFICATES, REFRESHED, *moments)


def _moment_keys(engine: Engine) -> tuple[str, ...]:
    if engine.curvature.adam is not None:
        return MOMENTS, MOMENT_UPDATES, MEANS, SAMPLING
    return (MOMENTS, MOMENT_UPDATES) if engine.curvature.is_ekfac else ()


def rebuild_engine(model: nn.Module, engine: Engine, parameters: Iterable[nn.Parameter] | None) -> Engine:
    """A new engine for the layers that the model has now, with the state of the old engine, which is closed.

    A layer whose factors have another size now (for example because its bias is trained, too) starts again. If the old engine
    was closed before, the new one is closed as well.
    """
    new = Engine(model, engine.settings, parameters)
    if engine.closed:
        new.close()
    states = export_layers(engine)
    engine.close()
    sizes = {layer.name: [_shape(new, side) for side in _sides(new, number)] for number, layer in enumerate(new.layers)}
    fitting = {name: state for name, state in states.items() if sizes.get(name) == [tuple(state[key].shape) for key in FACTORS]}
    restore_layers(new, fitting)
    new.resume(new.progress.at_step(engine.progress.steps))
    return new


def _shape(engine: Engine, side: list[list[int]]) -> tuple[int, ...]:
    return tuple(_flat_factors(engine, side).shape)


def _needs_inverses(engine: Engine) -> bool:
    return engine.settings.inverse_every != 1 or not engine.curvature.starts_anew


def _sides(engine: Engine, number: int) -> list[list[list[int]]]:
    """Slots of a layer's A, and of its G: one list for each channel group."""
    sides = [engine.partition.parts_of[block] for block in engine.partition.blocks_of(number)]
    return [[[engine.bank.slots[i] for i in side[k]] for side in sides] for k in (0, 1)]


def _inverses(engine: Engine, number: int) -> list[list[list[tuple[Inverse, int]]]]:
    """Those in the slots of `_sides`: what holds each inverse, and its place there."""
    return [[[engine.curvature.inverse_at[slot] for slot in slots] for slots in side] for side in _sides(engine, number)]


def _flat(groups: list[list[Tensor]]) -> Tensor:
    """The tensors of each channel group, one after another, (groups, numbers)."""
    return torch.stack([torch.cat([x.flatten() for x in group]) if group else torch.empty(0) for group in groups])


def _flat_factors(engine: Engine, groups: list[list[int]]) -> Tensor:
    views = [[engine.bank.view(slot) for slot in slots] for slots in groups]
    return _flat(views) if len(views[0]) > 1 else torch.stack([view for (view,) in views])


def _export_inverses(engine: Engine, number: int) -> LayerState:
    curvature, sides = engine.curvature, _inverses(engine, number)
    kept = ([[x.kept(i) for x, i in group] for group in side] for side in sides)  # one side after another, which saves memory
    state = dict(zip(INVERSES[curvature.kind], map(_flat, kept), strict=True))
    certificates = [[torch.stack([x.residual[i], x.damping[i]]) for x, i in a + g] for a, g in zip(*sides, strict=True)]
    state[CERTIFICATES] = torch.stack([torch.stack(group) for group in certificates]).double()
    state[REFRESHED] = torch.tensor([engine.progress.damping, float(engine.progress.is_stale)], dtype=torch.float64)
    if MOMENTS in _moment_keys(engine):
        state[MOMENTS] = _flat(curvature.moments_of(number))
        state[MOMENT_UPDATES] = curvature.moment_updates_of(number)
    if curvature.adam is not None:
        state[MEANS] = _flat(curvature.means_of(number))
    return state


def _has_inverses(engine: Engine, number: int, state: LayerState) -> bool:
    """Whether a state has inverses of the kind and sizes of the engine."""
    own = _export_inverses(engine, number)
    return all(key in state and state[key].shape == value.shape for key, value in own.items())


def _restore_inverses(engine: Engine, number: int, state: LayerState) -> None:
    curvature = engine.curvature
    for group, sides in enumerate(zip(*_inverses(engine, number), strict=True)):
        certificates = iter(state[CERTIFICATES][group])
        for key, side in zip(INVERSES[curvature.kind], sides, strict=True):
            pieces = state[key][group].split([x.kept(i).numel() for x, i in side])
            for (x, i), piece in zip(side, pieces, strict=True):
                x.restore(i, piece.view_as(x.kept(i)), *next(certificates))
    if MOMENTS in _moment_keys(engine):
        for key, moments in ((MOMENTS, curvature.moments_of(number)), (MEANS, curvature.means_of(number))):
            for group, tiles in enumerate(moments):
                pieces = state[key][group].split([x.numel() for x in tiles])
                for view, piece in zip(tiles, pieces, strict=True):
                    view.copy_(piece.view_as(view))
        curvature.count_moments(number, state[MOMENT_UPDATES])
