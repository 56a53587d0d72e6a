"""Diagnostics of a training run as a plain dict of numbers, for people and loggers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .autocast import without_autocast
from .engine import Engine


@without_autocast
def diagnostics(engine: Engine) -> dict[str, Any]:
    """Diagnostics of the last step. Waits for the device.

    Returns:
        A dict with

        - "steps": steps taken; "damping": the current damping; "refreshes": how often inverses were computed; "kl_clip_scale":
          nu of the last step, 1 if it was not clipped; "memory": bytes by kind (`Curvature.memory`);
        - "loss_terms": how the loss terms of the last statistics were counted, in words;
        - "skipped": module name -> why a layer of a supported type is not covered;
        - "without_statistics": names of covered layers without statistics so far, whose gradients are not preconditioned;
        - "layers": module name -> a dict with, for A and for G, "size", "trace", "norm" (Frobenius), "damping", "condition" (an
          upper bound: trace plus damping over damping), "residual" (certificate of the inverse in use: bound on its relative
          error in the energy norm), "fallbacks" (refreshes in which the result of the chosen method was refused), "raised" (how
          often damping was multiplied by ten because the factor could not be inverted); and "pi", "updates" (of the factors),
          "dropped_statistics" and "dropped_gradients" (steps with a NaN or Inf), "gradient_norm", "update_norm", "product"
          (`<V, gradient>`), "cosine" (between gradient and V).

        With curvature="adam" there is no damping: "damping", "kl_clip_scale", "condition", "raised" and "pi" are missing,
        "residual" is ||Q^T Q - I||_F of the eigenvectors, and "fallbacks" counts refreshes of which the products failed.

        For a layer with channel groups, sums and norms are over all groups, the other numbers are those of the worst group.
    """
    bank, partition, curvature = engine.bank, engine.partition, engine.curvature
    traces = bank.traces().double()
    norms = torch.stack(
        [torch.linalg.vector_norm(bank.view(slot)).to(bank.home, torch.float64) for slot in range(len(bank.slots))]
    )
    damping, residual, fallbacks, raised = (
        _over_slots(engine, name) for name in ("damping", "residual", "fallbacks", "raised")
    )
    sums = _tile_sums(engine)
    has_damping = curvature.adam is None
    layers: dict[str, dict[str, Any]] = {}
    for number, layer in enumerate(engine.layers):
        blocks = partition.blocks_of(number)
        entry: dict[str, Any] = {}
        for side, name in enumerate("AG"):
            slots = [bank.slots[i] for block in blocks for i in partition.parts_of[block][side]]
            condition = (traces[slots] + damping[slots]) / damping[slots]
            if layer.constant_input and side == 0:
                condition = torch.ones_like(condition)
            entry[f"size_{name}"] = int(bank.sizes[slots].sum()) // len(blocks)
            entry[f"trace_{name}"] = float(traces[slots].sum())
            entry[f"norm_{name}"] = float(norms[slots].square().sum().sqrt())
            if has_damping:
                entry[f"damping_{name}"] = _worst(damping[slots])
                entry[f"condition_{name}"] = _worst(condition.nan_to_num(nan=torch.inf, posinf=torch.inf))
            entry[f"residual_{name}"] = _worst(residual[slots])
            entry[f"fallbacks_{name}"] = int(fallbacks[slots].sum())
            if has_damping:
                entry[f"raised_{name}"] = int(raised[slots].sum())
        if has_damping:
            entry["pi"] = _worst(curvature.split.pi[blocks]) if curvature.split else 1.0
        entry["updates"] = int(bank.updates[[bank.slots[partition.parts_of[block][0][0]] for block in blocks]].min())
        tiles = [tile for block in blocks for tile in partition.tiles_of[block]]
        entry["dropped_statistics"] = int(engine.dropped_statistics[number])
        entry["dropped_gradients"] = int(engine.dropped_gradients[tiles].sum())
        gradient, update, product, raw = (sum(sums[tile][k] for tile in tiles) for k in range(4))
        entry["gradient_norm"], entry["update_norm"], entry["product"] = gradient**0.5, update**0.5, product
        entry["cosine"] = raw / (gradient * update) ** 0.5 if gradient * update > 0 else 0.0
        layers[layer.name] = entry
    damped = {"damping": engine.progress.damping, "kl_clip_scale": float(engine.kl_clip_scale)} if has_damping else {}
    return {
        "steps": engine.progress.steps,
        **damped,
        "refreshes": engine.progress.refreshes,
        "memory": curvature.memory(),
        "loss_terms": list(engine.gate.calls.reported),
        "skipped": dict(engine.skipped),
        "without_statistics": [engine.layers[i].name for i in sorted(engine.progress.without_statistics)],
        "layers": layers,
    }


def _over_slots(engine: Engine, name: str) -> Tensor:
    """An attribute of the inverses, as a vector over all slots."""
    return torch.cat([getattr(inverse, name).to(engine.bank.home, torch.float64) for inverse in engine.curvature.inverses])


def _tile_sums(engine: Engine) -> dict[int, tuple[float, ...]]:
    """Tile -> squared norms of W and V, and <V, W> before and after the KL clip."""
    if engine.plan is not None:
        return engine.plan.tile_sums(engine.kl_clip_scale)
    result: dict[int, tuple[float, ...]] = {}
    for stack in engine.curvature.gradients:
        w, v = stack.gradient.flatten(1).double(), stack.update.flatten(1).double()
        values = torch.stack([w.square().sum(1), v.square().sum(1), stack.product.double(), (w * v).sum(1)], 1).tolist()
        result.update(zip(stack.tiles, (tuple(row) for row in values), strict=True))
    return result


def _worst(values: Tensor) -> float:
    return float(values.max())
