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

from .capture import attach
from .collect import Collector
from .curvature import Curvature
from .factors import factor_dtype
from .fisher_pass import FisherPass
from .functional import attach_functional
from .gradients import add_updates, assemble
from .kernels import runtime
from .kernels.addresses import device_table
from .layers import Layer, find_layers
from .partition import Partition
from .settings import Settings
from .statistics import Gate, Statistics
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
        self.layers, self.skipped = _choose_layers(model, settings, parameters)
        _require_backend(settings.backend, self.layers)
        self.partition = Partition(self.layers, settings.max_factor_size, settings.oversize)
        home = self.layers[0].weight.device
        # The host may look at what a CPU computed; for a GPU it would have to wait.
        self.host_looks = home.type == "cpu" and settings.backend != "triton"
        self.curvature = Curvature(self.partition, settings, self.host_looks)
        self.bank = self.curvature.bank
        self.gate = Gate(home, empirical=settings.fisher == "empirical")
        kernels_serve = settings.backend != "torch" and all(s.sums.dtype == torch.float32 for s in self.bank.stacks)
        # What waits goes straight into the factors: not where these are kept in another type, or moments need the rows.
        goes_straight = settings.factor_dtype == "float32" and not self.curvature.is_ekfac
        may_wait = kernels_serve and not self.host_looks and goes_straight
        self.collector = Collector(self.partition, self.bank, self.gate, settings.backend, may_wait, self.curvature.moments)
        self._fisher_pass: FisherPass | None = None
        if settings.likelihood is not None and settings.fisher != "empirical":
            self._fisher_pass = FisherPass(settings.likelihood, settings.fisher, settings.fisher_samples, self.gate)
        self.steps = 0
        self.nu = torch.ones((), device=self.bank.home)
        self.dropped_statistics = torch.zeros(len(self.layers), dtype=torch.long, device=self.bank.home)
        self.dropped_gradients = torch.zeros(len(self.partition.tiles), dtype=torch.long, device=self.bank.home)
        self.without_statistics = set(range(len(self.layers)))
        self.refreshes = 0
        self._warned: set[int] = set()
        self._stale = True  # factors or damping changed since the last inverses
        self.damping = settings.damping_at(0)
        self._has_newcomers = False  # layers that got their first statistics since then
        self._open_gate()

        handles = attach(self.layers, self.statistics) + attach_functional(self.layers, self.statistics)
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
        self.settings = dataclasses.replace(self.settings, **settings)
        self._open_gate()

    def accumulate_fisher(self, outputs: Tensor, targets: Tensor | None) -> None:
        """Statistics of the model's own distribution; see `EngineFace.accumulate_fisher`."""
        self.require_open()
        likelihood = self.settings.likelihood
        if likelihood is None:
            raise RuntimeError(
                "accumulate_fisher needs to know the loss: pass loss=nn.CrossEntropyLoss(), say, when making this"
            )
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"outputs must be a tensor, what the loss takes, but is {type(outputs).__name__}; of a Hugging Face model pass "
                "its .logits"
            )
        likelihood.check(outputs, targets)
        if self._fisher_pass is not None and self.gate.open:
            self._fisher_pass.run(outputs, targets, self.settings.current_loss_scale())

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
        self.require_open()
        settings = self.settings
        if settings.is_due("statistics_every", self.steps):
            self._update_factors()
        damping = settings.damping_at(self.steps)
        self._stale |= damping != self.damping
        self.damping = damping
        # A layer's first statistics do not wait: until it has an inverse, its damping alone would scale the gradient up.
        if settings.is_due("inverse_every", self.steps) or self._has_newcomers:
            self._refresh_inverses()
        updates = self._preconditioned_gradients(learning_rate)
        self.steps += 1
        self._open_gate()
        return updates

    def forget_statistics(self) -> None:
        """Drops what backward passes left since the last step."""
        self.collector.forget()

    def require_open(self) -> None:
        """Refuses to go on with hooks that are gone.

        Raises:
            RuntimeError: if the engine is closed.
        """
        if self.closed:
            raise RuntimeError("this K-FAC optimizer is closed, and its hooks are gone: make a new one to go on training")

    def _open_gate(self) -> None:
        """Opens the gate for the next step, if it takes statistics."""
        self.gate.open = self.settings.is_due("statistics_every", self.steps)
        self.gate.fraction, self.gate.most_rows = self.settings.stats_fraction, self.settings.max_stats_tokens
        self.gate.step = self.steps

    def _update_factors(self) -> None:
        # Asked before the statistics are forgotten; a layer whose first ones come in this step is worth one wait.
        known = [s.eager_counts[0] > 0 for s in self.statistics]
        outcome = self.collector.update(self.settings)
        self.curvature.blend_moments(outcome, self.settings.ema_decay)
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
        reason = (
            "Either the module's forward never ran (something else reads its weight), or the model was compiled and run before "
            "the optimizer was made (make it first, or call torch.compiler.reset()), or the forward pass ran inside paused()."
        )
        if self.settings.fisher != "empirical" and not any(fresh):
            reason = (
                f"fisher is {self.settings.fisher!r}: call accumulate_fisher(outputs, targets) between the forward pass and "
                "backward()."
            )
        warnings.warn(
            f"no statistics came from layers {names}, although their weights have gradients, which are used as they are. "
            + reason,
            UserWarning,
            stacklevel=5,
        )

    def _refresh_inverses(self) -> None:
        if not self._stale:
            return
        # With newcomers, what is certified now is an inverse of nothing, or of what a checkpoint overwrote.
        self.curvature.refresh(self.damping, restart=self._has_newcomers)
        self.refreshes += 1
        self._stale = self._has_newcomers = False

    def _preconditioned_gradients(self, learning_rate: LearningRate) -> list[tuple[nn.Parameter, Tensor]]:
        usable = [layer.weight.grad is not None and i not in self.without_statistics for i, layer in enumerate(self.layers)]
        blocks, stacks = self.partition.blocks, self.curvature.gradients
        products = self.curvature.precondition([usable[block.layer_number] for block in blocks], self.damping)
        order = [number for stack in stacks for number in stack.tiles]
        rates = _vector([learning_rate(blocks[self.partition.tiles[number].block].layer.weight) for number in order], products)
        self.nu = kl_clip_scale(products, rates, self.settings.kl_clip)
        updates: dict[int, Tensor] = {}
        for stack in stacks:
            self.dropped_gradients[stack.places] += stack.finish(self.nu).to(self.bank.home)
            updates.update(zip(stack.tiles, stack.update, strict=True))
        result: dict[nn.Parameter, Tensor] = {}
        first = 0
        for layer, is_usable in zip(self.layers, usable, strict=True):
            if is_usable:
                blocks_of_layer = [assemble(self.partition, first + g, updates) for g in range(layer.groups)]
                add_updates(result, layer, layer.read_update(blocks_of_layer))
            first += layer.groups
        return list(result.items())

    def restore_step(self, steps: int) -> None:
        """Goes on from a step, for the schedules and intervals."""
        self.steps = steps
        self._open_gate()

    def mark_restored(self, layer_number: int) -> None:
        """Says that a layer's factors were written from outside, by a checkpoint."""
        self.without_statistics.discard(layer_number)
        self.curvature.forget_moments(layer_number)
        self._has_newcomers = self._stale = True

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> copies of (A, G), bias-corrected; see `EngineFace.factors`."""
        result = {}
        for number, layer in enumerate(self.layers):
            pairs = [[self._side(side) for side in self.partition.parts_of[i]] for i in self.partition.blocks_of(number)]
            a, g = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
            result[layer.name] = (a, g) if layer.groups > 1 else (a[0], g[0])
        return result

    def _side(self, parts: range) -> Tensor:
        """A or G of a block, or its diagonal."""
        views = [self.bank.view(self.bank.slots[i]) for i in parts]
        return views[0].clone() if len(views) == 1 else torch.block_diag(*views)


def _choose_layers(
    model: nn.Module, settings: Settings, parameters: Iterable[nn.Parameter] | None
) -> tuple[list[Layer], dict[str, str]]:
    layers, skipped = find_layers(
        model,
        settings.weight_sharing,
        settings.loss_terms,
        skip=settings.skip,
        include=settings.include,
        norms=settings.norms,
        split=settings.split,
    )
    if parameters is not None:
        chosen = {id(p) for p in parameters}
        skipped |= {x.name: "its weight is not optimized" for x in layers if id(x.weight) not in chosen}
        layers = [layer for layer in layers if id(layer.weight) in chosen]
    if not layers:
        reasons = "; ".join(f"{name or 'the model itself'}: {reason}" for name, reason in skipped.items())
        raise ValueError(
            "model has no layer that K-FAC covers (linear, convolution, embedding, norm, attention; with a trainable weight)"
            + (f": {reasons}" if reasons else "; use another optimizer")
        )
    return layers, skipped


def _detach(handles: list[Any], gate: Gate) -> None:
    gate.open = False
    for handle in handles:
        handle.remove()


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
