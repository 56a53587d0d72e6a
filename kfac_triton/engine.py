"""The engine behind both faces: statistics in, preconditioned gradients out."""

from __future__ import annotations

import dataclasses
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .capture import CaptureHook, Gate, Statistics
from .collect import Collector
from .damping import SplitDamping, pi_split
from .factors import BlockSize, FactorBank, factor_dtype
from .gradients import Block, GradientStack
from .inverse import InverseStack
from .kernels import runtime
from .kernels.addresses import device_table
from .layers import Layer, find_layers
from .settings import Settings
from .step_size import kl_clip_scale

LearningRate = Callable[[nn.Parameter], float | Tensor]


class Engine:
    """K-FAC of one model: hooks, factors, inverses and the preconditioned gradient.

    Args:
        model: the module tree to cover.
        settings: hyperparameters.
        parameters: cover only layers whose weight is among these; None covers all.

    Raises:
        TypeError: if model is not a module.
        ValueError: if K-FAC covers no layer of the model.
    """

    def __init__(self, model: nn.Module, settings: Settings, parameters: Iterable[nn.Parameter] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
        self.settings = settings
        self.layers, self.skipped = find_layers(model, settings.weight_sharing, settings.loss_terms)
        if parameters is not None:
            chosen = {id(p) for p in parameters}
            self.skipped |= {x.name: "its weight is not optimized" for x in self.layers if id(x.weight) not in chosen}
            self.layers = [layer for layer in self.layers if id(layer.weight) in chosen]
        if not self.layers:
            reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in self.skipped.items())
            raise ValueError(
                "model has no layer that K-FAC covers (Linear, Conv1d, Conv2d, Conv3d with a trainable weight of its own)"
                + (f": {reasons}" if reasons else "; use another optimizer")
            )
        backend = settings.backend
        self.blocks = [Block(layer, group) for layer in self.layers for group in range(layer.groups)]
        _require_backend(backend, self.layers)
        self.bank = FactorBank([_block_size(block) for block in self.blocks])
        # The host may look at what a CPU computed; for a GPU it would have to wait.
        self.host_looks = self.bank.home.type == "cpu" and backend != "triton"
        self.inverses = [
            InverseStack(s.factors, settings.inverse, settings.inverse_tolerance, backend, wait=self.host_looks)
            for s in self.bank.stacks
        ]
        self.gradients = [
            GradientStack(group, self.blocks, self.bank, self.inverses, backend, self.host_looks) for group in self.bank.groups
        ]

        self.gate = Gate()
        kernels_serve = backend != "torch" and all(s.factors.dtype == torch.float32 for s in self.bank.stacks)
        self.collector = Collector(self.layers, self.bank, self.gate, backend, may_wait=kernels_serve and not self.host_looks)
        self.steps = 0
        self.nu = torch.ones((), device=self.bank.home)
        self.split: SplitDamping | None = None
        self.dropped_statistics = torch.zeros(len(self.layers), dtype=torch.long, device=self.bank.home)
        self.dropped_gradients = torch.zeros(len(self.blocks), dtype=torch.long, device=self.bank.home)
        self.without_statistics = set(range(len(self.layers)))
        self._warned: set[int] = set()
        self._stale = True  # factors or damping changed since the last inverses
        self._has_newcomers = False  # layers that got their first statistics since then

        handles = [
            layer.module.register_forward_hook(CaptureHook(statistics), with_kwargs=True)
            for layer, statistics in zip(self.layers, self.statistics, strict=True)
        ]
        # Also when an engine is dropped without close(): its hooks must not outlive it. The gate shuts compiled graphs.
        self._finalizer = weakref.finalize(self, _detach, handles, self.gate)

    @property
    def statistics(self) -> list[Statistics]:
        """Statistics of the layers since the last step."""
        return self.collector.statistics

    @property
    def closed(self) -> bool:
        """Whether the hooks are gone."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Removes the hooks; safe to call twice."""
        self._finalizer()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No statistics from forward passes inside (gradient penalties, saliency maps)."""
        was_open, self.gate.open = self.gate.open, False
        try:
            yield
        finally:
            self.gate.open = was_open and not self.closed

    def change(self, **settings: Any) -> None:
        """Changes settings between steps; checked as in the constructor."""
        before, self.settings = self.settings, dataclasses.replace(self.settings, **settings)
        self._stale |= self.settings.damping != before.damping

    @torch.no_grad()
    def precondition(self, learning_rate: LearningRate) -> list[tuple[nn.Parameter, Tensor]]:
        """One step of the engine: factors, inverses when due, and the clipped preconditioned gradients.

        Args:
            learning_rate: of a parameter, for the KL clip; a layer counts with that of its weight.

        Returns:
            Parameters with the tensors that stand for their gradients, valid until the next call. Parameters that K-FAC does
            not cover, or has no statistics for, are not in it.

        Raises:
            RuntimeError: if the engine is closed.
        """
        if self.closed:
            raise RuntimeError("this K-FAC optimizer is closed, and its hooks are gone: make a new one to go on training")
        if self.steps % self.settings.statistics_every == 0:
            self._update_factors()
        # A layer's first statistics do not wait: until it has an inverse, its damping alone would scale the gradient up.
        if self.steps % self.settings.inverse_every == 0 or self._has_newcomers:
            self._refresh_inverses()
        updates = self._preconditioned_gradients(learning_rate)
        self.steps += 1
        self.gate.open = self.steps % self.settings.statistics_every == 0
        return updates

    def _update_factors(self) -> None:
        # Asked before the statistics are forgotten; a layer whose first ones come in this step is worth one wait.
        known = [s.eager_counts[1] > 0 for s in self.statistics]
        outcome = self.collector.update(self.settings)
        self.dropped_statistics += outcome.fresh & ~outcome.accept
        may_have_news = self.host_looks or any(known[i] for i in self.without_statistics) or not any(known)
        if self.without_statistics and may_have_news:
            self._notice_missing(outcome.accept.tolist(), outcome.fresh.tolist())
        self._stale = True

    def _notice_missing(self, accepted: list[bool], fresh: list[bool]) -> None:
        """Remembers which layers have statistics by now and warns, once a layer, of gradients that came without any."""
        newcomers = {i for i in self.without_statistics if accepted[i]}
        self.without_statistics -= newcomers
        self._has_newcomers |= bool(newcomers)
        missing = [
            i for i in sorted(self.without_statistics - self._warned) if not fresh[i] and self.layers[i].weight.grad is not None
        ]
        if not missing:
            return
        self._warned.update(missing)
        names = ", ".join(repr(self.layers[i].name) for i in missing)
        warnings.warn(
            f"no statistics came from layers {names}, although their weights have gradients, which are used as they are. "
            "Either the module's forward never ran (nn.MultiheadAttention reads out_proj.weight without calling out_proj), "
            "or the model was compiled and run before the optimizer was made (make it first, or call "
            "torch.compiler.reset()), or the forward pass ran inside paused().",
            UserWarning,
            stacklevel=5,
        )

    def _refresh_inverses(self) -> None:
        if not self._stale:
            return
        traces, a, g = self.bank.traces(), self.bank.a_slots, self.bank.g_slots
        sizes = self.bank.sizes
        self.split = pi_split(traces[a], sizes[a], traces[g], sizes[g], self.settings.damping)
        damping = self.bank.scatter(self.split.a, self.split.g)
        for stack, inverse, run in zip(self.bank.stacks, self.inverses, self.bank.runs(), strict=True):
            if self._has_newcomers:  # what is certified now is an inverse of nothing, or of what a checkpoint overwrote
                inverse.restart()
            inverse.refresh(stack.factors, damping[run])
        self._stale = self._has_newcomers = False

    def _preconditioned_gradients(self, learning_rate: LearningRate) -> list[tuple[nn.Parameter, Tensor]]:
        usable = [layer.weight.grad is not None and i not in self.without_statistics for i, layer in enumerate(self.layers)]
        block_usable = [usable[i] for i, layer in enumerate(self.layers) for _ in range(layer.groups)]
        for stack in self.gradients:
            stack.precondition(block_usable)
        products = torch.cat([stack.product.to(self.bank.home) for stack in self.gradients])
        order = [i for stack in self.gradients for i in stack.indices]
        rates = _vector([learning_rate(self.blocks[i].layer.weight) for i in order], products)
        self.nu = kl_clip_scale(products, rates, self.settings.kl_clip)
        updates: dict[int, Tensor] = {}
        for stack in self.gradients:
            self.dropped_gradients[stack.places] += stack.finish(self.nu).to(self.bank.home)
            updates.update(zip(stack.indices, stack.update, strict=True))
        result = []
        first = 0
        for layer, is_usable in zip(self.layers, usable, strict=True):
            if is_usable:
                result += layer.read_update([updates[first + group] for group in range(layer.groups)])
            first += layer.groups
        return [(p, update) for p, update in result if p.grad is not None]

    def mark_restored(self, layer_number: int) -> None:
        """Says that a layer's factors were written from outside, by a checkpoint."""
        self.without_statistics.discard(layer_number)
        self._has_newcomers = self._stale = True

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> copies of (A, G), bias-corrected; (groups, n, n) each for a layer with channel groups."""
        result = {}
        first = 0
        for layer in self.layers:
            pairs = [self.bank.block(first + group) for group in range(layer.groups)]
            first += layer.groups
            a, g = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
            result[layer.name] = (a, g) if layer.groups > 1 else (a[0], g[0])
        return result


def _detach(handles: list[Any], gate: Gate) -> None:
    gate.open = False
    for handle in handles:
        handle.remove()


def _block_size(block: Block) -> BlockSize:
    layer = block.layer
    return BlockSize(layer.input_size, layer.output_size, factor_dtype(layer.weight), layer.weight.device)


def _require_backend(backend: str, layers: list[Layer]) -> None:
    """Refuses "triton" where no kernel can serve, before anything is made."""
    if backend != "triton":
        return
    for layer in layers:
        reason = runtime.obstacle(layer.weight.device)
        if reason is None and factor_dtype(layer.weight) != torch.float32:
            reason = f"layer {layer.name!r} has {layer.weight.dtype} factors, and the kernels keep float32"
        if reason is not None:
            raise ValueError(f"backend is 'triton', but {reason}; use backend='auto'")


def _vector(rates: list[float | Tensor], like: Tensor) -> Tensor:
    """Learning rates as a vector; numbers go to the device without a wait, tensors are not read."""
    if any(isinstance(rate, Tensor) for rate in rates):
        return torch.stack([torch.as_tensor(rate).to(like).reshape(()) for rate in rates])
    values = tuple((float(rate),) for rate in rates)
    return device_table(values, like.device, like.dtype).flatten()
