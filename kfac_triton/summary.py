"""What `print(optimizer)` says beside the options of the groups: settings of the curvature, and what it covers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .engine import Engine
from .settings import Settings

_KFAC = ("curvature", "damping", "kl_clip", "statistics_every", "inverse_every")
_ADAM = ("curvature", "statistics_every", "inverse_every", "ema_decay", "noise_damping", "bias")


def of_groups(groups: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lines as PyTorch prints them, but for tensors on a device: their numbers would have to be waited for."""
    for number, group in enumerate(groups):
        yield f"Parameter Group {number}"
        for name, value in sorted(group.items()):
            if name == "params":
                continue
            is_away = isinstance(value, Tensor) and value.device.type != "cpu"
            yield f"    {name}: {f'a tensor on {value.device}' if is_away else value}"


def of_curvature(
    engine: Engine, parameters: Sequence[nn.Parameter], names: Mapping[str, str], *, is_auto: bool
) -> Iterator[str]:
    """Lines about settings that matter most, and about how many of the parameters are covered. Reads nothing from a device.

    Args:
        engine: open or closed.
        parameters: of the optimizer.
        names: of a setting -> what the optimizer's constructor calls it; one with names of its own has one curvature only.
        is_auto: whether the quadratic model chooses the steps.
    """
    settings = engine.settings
    yield "Curvature"
    for name in _ADAM if settings.curvature == "adam" else _KFAC:
        if name != "curvature" or not names:
            yield f"    {names.get(name, name)}: {_shown(engine, settings, name)}"
    if is_auto:
        yield "    lr: auto"
    trained = {id(p): p.numel() for p in parameters if p.requires_grad}
    total = sum(trained.values())
    covered = sum(_covered(engine, trained).values())
    # Rounded down: 100 % are all of them.
    share = covered * 1000 // total / 10 if total else 0.0
    layers = f"{len(engine.layers)} layer{'s' if len(engine.layers) > 1 else ''}"
    yield f"    covered: {layers}, {covered:,} of {total:,} trainable parameters ({share:.1f} %)"
    if engine.closed:
        yield "    closed: hooks are removed"


def _shown(engine: Engine, settings: Settings, name: str) -> Any:
    """A setting, or what is known of a schedule without calling it."""
    value = getattr(settings, name)
    if not callable(value):
        return value
    return f"{engine.progress.damping}, by a function of the step" if name == "damping" else "a function of the step"


def _covered(engine: Engine, trained: Mapping[int, int]) -> dict[int, int]:
    """Elements of each trained parameter that layers cover, by its identity."""
    covered: dict[int, int] = {}
    for layer in engine.layers:
        for p in engine.moved_with(layer):
            if id(p) in trained:
                rows = layer.part_of(p)  # of a packed parameter
                size = p.numel() if rows is None else (rows.stop - rows.start) * p[0].numel()
                covered[id(p)] = min(p.numel(), covered.get(id(p), 0) + size)
    return covered
