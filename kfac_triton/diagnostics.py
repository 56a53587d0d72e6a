"""What a run of K-FAC looks like from inside: a plain dict of numbers, for people and loggers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .engine import Engine


def diagnostics(engine: Engine) -> dict[str, Any]:
    """Numbers of the last step; reads them from the device.

    Returns:
        A dict with
        - "steps": steps taken; "kl_clip_scale": nu of the last step, 1 where the KL clip did not bite;
        - "skipped": module name -> why a layer of a supported type is not covered;
        - "without_statistics": names of covered layers that no statistics came from yet, their gradients go unpreconditioned;
        - "layers": module name -> a dict with, for A and for G, "trace", "damping", "condition" (an upper bound: trace plus
          damping over damping), "residual" (certificate of the inverse in use: bound on its relative error in the energy
          norm), "fallbacks" (refreshes in which the chosen method was refused), "raised" (times ten that damping was raised
          because float32 could not invert the factor); and "pi", "updates" (of the factors), "dropped_statistics" and
          "dropped_gradients" (steps with a NaN or Inf), "gradient_norm", "update_norm", "product" (<V, gradient>).
        A layer with channel groups reports the worst group, its sums and norms over all groups.
    """
    bank = engine.bank
    traces = bank.traces()
    damping, residual, fallbacks, raised = (
        torch.cat([getattr(inverse, name).to(bank.home, torch.float64) for inverse in engine.inverses])
        for name in ("damping", "residual", "fallbacks", "raised")
    )
    norms = {
        index: (float(torch.linalg.vector_norm(w)), float(torch.linalg.vector_norm(v)), float(p))
        for stack in engine.gradients
        for index, w, v, p in zip(stack.indices, stack.gradient, stack.update, stack.product, strict=True)
    }
    layers: dict[str, dict[str, Any]] = {}
    first = 0
    for number, layer in enumerate(engine.layers):
        blocks = list(range(first, first + layer.groups))
        first += layer.groups
        entry: dict[str, Any] = {}
        for side, slots in (("A", bank.a_slots[blocks]), ("G", bank.g_slots[blocks])):
            condition = (traces[slots] + damping[slots]) / damping[slots]
            entry[f"trace_{side}"] = float(traces[slots].sum())
            entry[f"damping_{side}"] = _worst(damping[slots])
            entry[f"condition_{side}"] = _worst(condition.nan_to_num(nan=torch.inf, posinf=torch.inf))
            entry[f"residual_{side}"] = _worst(residual[slots])
            entry[f"fallbacks_{side}"] = int(fallbacks[slots].sum())
            entry[f"raised_{side}"] = int(raised[slots].sum())
        entry["pi"] = _worst(engine.split.pi[blocks]) if engine.split else 1.0
        entry["updates"] = int(bank.updates[bank.a_slots[blocks]].min())
        entry["dropped_statistics"] = int(engine.dropped_statistics[number])
        entry["dropped_gradients"] = int(engine.dropped_gradients[blocks].sum())
        entry["gradient_norm"] = sum(norms[i][0] ** 2 for i in blocks) ** 0.5
        entry["update_norm"] = sum(norms[i][1] ** 2 for i in blocks) ** 0.5
        entry["product"] = sum(norms[i][2] for i in blocks)
        layers[layer.name] = entry
    return {
        "steps": engine.steps,
        "kl_clip_scale": float(engine.nu),
        "skipped": dict(engine.skipped),
        "without_statistics": [engine.layers[i].name for i in sorted(engine.without_statistics)],
        "layers": layers,
    }


def _worst(values: Tensor) -> float:
    return float(values.max())
