"""Checks that a CUDA graph can record a step: replays repeat all decisions that the host made while recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .curvature.factor_stack import FactorStack
from .curvature.inverse import resolve
from .kernels import runtime
from .settings import Settings


def require_recordable_settings(settings: Settings, stacks: Sequence[FactorStack], uses_kernels: bool) -> None:
    """Refuses settings with which the host makes decisions during a step.

    Args:
        settings: settings of the engine.
        stacks: its dense factors.
        uses_kernels: whether Triton kernels update all of them, and the host reads nothing of what they compute.

    Raises:
        ValueError: if a setting changes between steps, or makes the host wait.
    """
    settings.require_constant()
    methods = {resolve(settings.inverse, stack.sums.device) for stack in stacks}
    if not methods <= {"factored", "newton_schulz"}:
        raise ValueError(f"in a CUDA graph inverse must be 'factored', but is {min(methods)!r}, for which the host waits")
    if not uses_kernels:
        raise ValueError("a CUDA graph can record the Triton kernels only: use a GPU, float32 factors and backend='auto'")


def require_recordable_groups(groups: list[dict[str, Any]], states: dict[Any, dict[str, Any]]) -> None:
    """Refuses learning rates and counters that would stay constant in replays; does nothing if no graph is being recorded.

    Raises:
        RuntimeError: if a group is not capturable, or its learning rate or counters are on the host.
    """
    if not runtime.is_recording():
        return
    for number, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(f"a CUDA graph records this step, but group {number} has capturable=False: pass True to KFAC")
        devices = {p.device for p in group["params"]}
        values = [("lr", group["lr"]), *(("a step counter", states[p]["step"]) for p in group["params"])]
        for name, value in values:
            if devices and isinstance(value, Tensor) and value.device not in devices:
                raise RuntimeError(
                    f"a CUDA graph records this step, but {name} of group {number} is a tensor on {value.device}, whose value "
                    "would be the same in every replay: move it to the parameters' device"
                )
