"""The engine of KFAC and KFACPreconditioner: it takes statistics and preconditions gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .autocast import without_autocast
from .capture.attention import attach_functional
from .capture.call_hooks import attach_calls
from .capture.calls import BY_LIKELIHOOD, Call, Calls
from .capture.fisher_pass import FisherPass
from .capture.gate import Gate
from .capture.hook_order import warn_of_earlier_hooks
from .capture.hooks import attach
from .cuda_graphs import require_recordable_settings
from .curvature.curvature import Curvature
from .curvature.eigen_adam import AdamOptions
from .curvature.factor_update import FactorUpdate
from .curvature.gradient_plan import LearningRate
from .fisher.losses import likelihood_of
from .kernels import runtime
from .layers.partition import Partition
from .layers.select import are_tokens, batch_dim_of, frozen_weights, refuse_sharded, require_backend, select_layers
from .preconditioned_gradients import PreconditionedGradients
from .progress import Progress
from .settings import Settings
from .validation import require_module
from .warning import warn_of_missing_statistics

# Why torch.compile must not trace a step: it would turn counters and intervals into constants, and its guards cost more than
# the launches.
EAGER = "a K-FAC step decides on the host what is due, and batches its own kernel launches: compile the model instead"


class Engine(PreconditionedGradients):
    """K-FAC for one model: hooks, factors, inverses and the preconditioned gradient.

    Args:
        model: the module tree to cover.
        settings: hyperparameters.
        parameters: K-FAC covers only layers whose weight is one of these; None covers all.

    Raises:
        TypeError: if model is not a module, or the loss is not supported.
        ValueError: if K-FAC covers no layer of the model, or the loss's options do not fit.
    """

    def __init__(self, model: nn.Module, settings: Settings, parameters: Iterable[nn.Parameter] | None = None) -> None:
        require_module(model)
        self.settings = settings
        likelihood = None if settings.loss is None else likelihood_of(settings.loss)
        parameters = None if parameters is None else list(parameters)
        self.layers, self.skipped = select_layers(model, settings, parameters)
        self._frozen = frozen_weights(model, parameters)
        require_backend(settings.backend, self.layers)
        self.partition = Partition(self.layers, settings.max_factor_size, settings.oversize)
        self._devices = [layer.weight.device for layer in self.layers]
        home = self._devices[0]
        # On a CPU the host can read results at once; for those of a GPU it would have to wait.
        self.host_looks = home.type == "cpu" and settings.backend != "triton"
        self.curvature = Curvature(self.partition, settings, self.host_looks)
        self.bank = self.curvature.bank
        calls = Calls(settings.loss_terms, are_tokens(model, settings), batch_dim_of(model, settings), home)
        self.gate = Gate(home, empirical=settings.fisher == "empirical", calls=calls)
        are_single = all(stack.sums.dtype == torch.float32 for stack in self.bank.stacks)
        self.uses_kernels = are_single and settings.backend != "torch" and not self.host_looks
        # A kernel adds deferred rows straight to the factors. This needs factors in the kernel's type, and EKFAC's moments need
        # the rows before that.
        can_defer = self.uses_kernels and settings.factor_dtype == "float32" and not self.curvature.is_ekfac
        self.collector = FactorUpdate(
            self.partition, self.bank, self.gate, settings.backend, self.uses_kernels, can_defer, self.curvature.moments
        )
        self.statistics = self.collector.statistics  # of each layer, since the last step
        self._fisher_pass: FisherPass | None = None
        if likelihood is not None and settings.fisher != "empirical":
            self._fisher_pass = FisherPass(likelihood, settings.fisher, settings.fisher_samples, self.gate)
        self.dropped_statistics = torch.zeros(len(self.layers), dtype=torch.long, device=self.bank.home)
        super().__init__(self.bank.home, len(self.partition.tiles))
        self._warned: set[int] = set()
        self._warned_of_hooks: set[int] = set()
        self.progress = Progress(settings.damping_at(0), frozenset(range(len(self.layers))))
        self.resume(self.progress)

        handles = attach(self.layers, self.statistics) + attach_functional(self.layers, self.statistics)
        handles += attach_calls(model, self.layers, self.gate)
        # The hooks must not outlive an engine that is dropped without close(). A compiled graph keeps them, but finds the gate
        # closed.
        self._finalizer = weakref.finalize(self, _detach, handles, self.gate)
        self.closed = False  # whether the hooks are gone

    def close(self) -> None:
        """Removes the hooks; safe to call twice."""
        self._finalizer()
        self.closed = True

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which neither forward nor backward passes leave statistics."""
        gate = self.gate
        was_open, was_paused = gate.open, gate.is_paused
        gate.open, gate.is_paused = False, True
        gate.forget_pass()
        if gate.empirical:  # compiled passes read this, and not the flags
            gate.weight.zero_()
        try:
            yield
        finally:
            gate.open, gate.is_paused = was_open and not self.closed, was_paused
            if gate.empirical and not was_paused:
                gate.weight.fill_(1.0)

    def change(self, **settings: Any) -> None:
        """Changes settings between steps; they are checked as in the constructor."""
        self.settings = self.settings.changed(**settings)
        self.resume(self.progress)

    @torch.compiler.disable(reason=EAGER)
    @without_autocast
    def accumulate_fisher(self, outputs: Tensor, targets: Tensor | None) -> None:
        """Takes the statistics for fisher="mc" or "ggn"; see `KFACBase.accumulate_fisher`."""
        self.require_open()
        loss = self.settings.loss
        if loss is None:
            raise RuntimeError(
                "accumulate_fisher needs the loss, but loss is None: pass it to the constructor, as loss=nn.CrossEntropyLoss()"
            )
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"outputs must be the tensor that the loss takes, but is {type(outputs).__name__}; for a Hugging Face model "
                "pass its .logits"
            )
        likelihood = likelihood_of(loss)
        likelihood.check(outputs, targets)
        if not self.gate.open:
            return
        if self._fisher_pass is not None:
            self._fisher_pass.run(outputs, targets, self.settings.current_loss_scale())
        elif self.settings.loss_terms == "auto":
            whole = Call(likelihood.terms(outputs, targets), BY_LIKELIHOOD)
            left_out = likelihood.left_out(outputs, targets)
            if left_out is not None and self.settings.rows == "auto":
                self.gate.leave_out(whole, left_out, likelihood.terms_per_example(outputs) == 1)
            self.gate.calls.join(whole, outputs)

    @torch.no_grad()
    @without_autocast
    def precondition(
        self, learning_rate: LearningRate, adam: Callable[[nn.Parameter], AdamOptions] | None = None
    ) -> dict[nn.Parameter, Tensor | None]:
        """Updates the factors, recomputes inverses that are due, and gives the preconditioned gradients, clipped.

        Args:
            learning_rate: maps a parameter to its learning rate, for the KL clip; a layer takes that of its weight.
            adam: with curvature="adam", maps a weight to the options of its group. Averages change in `commit` only.

        Returns:
            A dict of parameters and their preconditioned gradients, which are valid until the next call. It has no entry for
            parameters that K-FAC does not cover or has no statistics for. Where the host looks, the entry is None if the
            gradient is not finite; elsewhere it is zero then, and `finite` has a flag for each parameter.

        Raises:
            RuntimeError: if the engine is closed.
        """
        self.require_open()
        self._require_recordable()
        refuse_sharded(self.layers)  # which may have happened after construction
        settings, steps = self.settings, self.progress.steps
        if settings.is_due("statistics_every", steps):
            warn_of_earlier_hooks(self.layers, self._warned_of_hooks)
            self._update_factors()
        self.progress = self.progress.at_damping(settings.damping_at(steps))
        # A layer with its first statistics gets an inverse at once. Until then damping alone would scale its gradient up.
        if (settings.is_due("inverse_every", steps) or self.progress.has_new_layers) and self.progress.is_stale:
            self._refresh_inverses()
        elif self.curvature.adam is not None:
            self.curvature.adam.rescue()
        options = self.curvature.adam.options(adam) if self.curvature.adam is not None and adam is not None else None
        updates = self._preconditioned_gradients(learning_rate, options)
        self.resume(self.progress.at_step(steps + 1))
        return updates

    def resume(self, progress: Progress) -> None:
        """Continues from this progress: it determines schedules, intervals, and whether the next passes leave statistics."""
        self.progress, settings = progress, self.settings
        self.gate.open = settings.is_due("statistics_every", progress.steps)
        self.gate.is_auto = settings.stats_fraction == "auto"
        self.gate.stride = 1 if self.gate.is_auto else math.ceil(1 / float(settings.stats_fraction) - 1e-9)
        self.gate.max_rows = settings.max_stats_tokens
        self.gate.max_kept_bytes = settings.max_kept_bytes
        self.gate.masks = settings.rows == "nonzero"
        is_auto, fisher_pass = settings.rows == "auto", self._fisher_pass
        self.gate.may_leave_out = is_auto and (
            fisher_pass.may_leave_out if fisher_pass is not None else self.gate.calls.are_tokens
        )
        self.gate.calls.marks_rows = is_auto
        self.gate.calls.counts_rows = self.gate.masks and isinstance(settings.loss_terms, str)
        self.gate.step = progress.steps
        self.gate.scaler = settings.scaler
        # In a sum, each term has its gradient whatever call it is of.
        is_mean = settings.loss_reduction == "mean" and settings.fisher == "empirical"
        self.gate.adds_calls = settings.calls if is_mean else "joint"

    def forget_statistics(self) -> None:
        """Drops all statistics since the last step."""
        self.collector.forget()

    def forget_with_gradients(self) -> None:
        """Drops the statistics that belong to gradients that are thrown away.

        If a Fisher pass runs before `zero_grad` and the backward pass of the loss after it, its statistics belong to the
        gradients to come and are kept.
        """
        if self.gate.empirical or self.gate.saw_loss:
            self.gate.calls.drop()
            self.forget_statistics()

    def changed_device(self) -> bool:
        """Whether a weight has moved to another device since layers were chosen; False for a closed engine."""
        return not self.closed and [layer.weight.device for layer in self.layers] != self._devices

    def has_unfrozen(self) -> bool:
        """Whether a weight that was frozen when layers were chosen is trained now; False for a closed engine."""
        return not self.closed and any(weight.requires_grad for weight in self._frozen)

    def require_open(self) -> None:
        """Refuses to continue without hooks.

        Raises:
            RuntimeError: if the engine is closed.
        """
        if self.closed:
            raise RuntimeError("this K-FAC optimizer is closed, and its hooks are removed: make a new one to continue training")

    def _require_recordable(self) -> None:
        """While a CUDA graph is being recorded, refuses steps in which the host decides something.

        Raises:
            ValueError: if a setting changes between steps, or makes the host wait.
            RuntimeError: if a step has to be taken outside of the graph first.
        """
        if not runtime.is_recording():
            return
        require_recordable_settings(self.settings, self.bank.stacks, self.uses_kernels)
        if self.gate.is_unrecorded:
            raise RuntimeError("a CUDA graph records this step, but not its backward pass: record forward, backward and step")
        missing = self.progress.without_statistics
        new = [repr(self.layers[i].name) for i in sorted(missing) if self.layers[i].weight.grad is not None]
        if new or self.progress.has_new_layers or self.has_unfrozen():
            what = f"layers {', '.join(new)} have no statistics yet" if new else "the host has to wait for new inverses"
            raise RuntimeError(f"a CUDA graph cannot record this step, because {what}: take a step outside of the graph first")

    def _update_factors(self) -> None:
        # Read before the statistics are forgotten. The host waits for the outcome only in a step that may bring a layer's
        # first statistics.
        known = [s.on_host.rows > 0 or bool(s.masked) for s in self.statistics]
        outcome = self.collector.update(self.settings)
        if self.curvature.is_ekfac:
            self.progress = self.progress.rewritten()
        self.curvature.blend_moments(outcome, self.settings.ema_decay)
        self.dropped_statistics += outcome.fresh & ~outcome.accept
        missing = self.progress.without_statistics
        may_have_news = self.host_looks or any(known[i] for i in missing) or not any(known)
        if missing and may_have_news and not runtime.is_recording():
            self._notice_missing(outcome.accept.tolist(), outcome.fresh.tolist())
        # Where the host looks, a batch that was dropped altogether does not make inverses stale.
        has_changed = not self.host_looks or bool(outcome.accept.any())
        self.progress = replace(self.progress, is_stale=self.progress.is_stale or has_changed)

    def _notice_missing(self, accepted: list[bool], fresh: list[bool]) -> None:
        """Notes which layers have statistics now, and warns once for each layer that has a gradient but no statistics."""
        self.progress = self.progress.with_statistics({i for i in self.progress.without_statistics if accepted[i]})
        unwarned = sorted(self.progress.without_statistics - self._warned)
        missing = [i for i in unwarned if not fresh[i] and self.layers[i].weight.grad is not None]
        if not missing:
            return
        self._warned.update(missing)
        warn_of_missing_statistics([self.layers[i].name for i in missing], self.settings.fisher, any(fresh))

    def _refresh_inverses(self) -> None:
        self.progress = self.progress.rewritten()
        # With new layers, the current certificates belong to no factors, or to those that a checkpoint has replaced.
        self.curvature.refresh(self.progress.damping, restart=self.progress.has_new_layers)
        self.progress = self.progress.refreshed()

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> copies of the bias-corrected factors (A, G); see `KFACBase.factors`."""
        result = {}
        for number, layer in enumerate(self.layers):
            pairs = [[self._side(side) for side in self.partition.parts_of[i]] for i in self.partition.blocks_of(number)]
            a, g = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
            result[layer.name] = (a, g) if layer.groups > 1 else (a[0], g[0])
        return result

    def _side(self, parts: range) -> Tensor:
        """A or G of a block; only its diagonal where that is all that is stored."""
        views = [self.bank.view(self.bank.slots[i]) for i in parts]
        return views[0].clone() if len(views) == 1 else torch.block_diag(*views)


def _detach(handles: list[Any], gate: Gate) -> None:
    gate.open = False
    for handle in handles:
        handle.remove()
