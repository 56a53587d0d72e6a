"""KFAC: natural-gradient training as a torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from . import cuda_graphs
from .base import KFACBase, Run
from .engine import EAGER, Engine
from .fisher.likelihood import Likelihood
from .layers import Choice
from .settings import Schedule, Settings
from .state import state_dict as checkpoint
from .state.layer_state import check_layers, export_layers, rebuild_engine, restore_layers
from .state.transaction import transaction
from .steps import first_order, param_groups
from .steps.auto import AutoStep, auto_settings
from .validation import require_module


class KFAC(KFACBase, Optimizer):
    r"""Kronecker-factored approximate curvature (Martens and Grosse 2015) with an SGD-momentum or AdamW tail.

    For each covered layer with weight matrix W = [weight | bias] and gradient dW the step goes along

        V = (G + sqrt(damping) / pi I)^-1  dW  (A + sqrt(damping) pi I)^-1

    with A = E[a a^T] of its inputs and G = E[g g^T] of its output gradients, exponential moving averages that forward hooks
    keep. Covered are linear layers, convolutions and transposed ones, embeddings, norms and attention (docs/layers.md says how
    exactly); every other parameter goes along its gradient. Make the optimizer before the first run of a compiled model.

    Args:
        model: the module to train.
        params: parameters or parameter groups to optimize, as for any optimizer; None takes all trainable ones.
            A group may set lr, momentum, nesterov, weight_decay, tail, betas and eps for itself.
        lr: learning rate. With a KL clip, 1 is the natural start: the clip then sets the length of early steps. "auto" leaves
            it to the quadratic model of the loss (Martens and Grosse 2015, sections 6.4 to 7): learning rate, momentum and
            damping need no tuning. `step` then takes a closure that runs the model and returns (outputs, targets), without
            backward; `loss` must be passed; `weight_decay` is an L2 penalty; momentum, kl_clip and the tail do not matter.
        momentum: of the SGD tail, in [0, 1).
        nesterov: Nesterov momentum.
        weight_decay: decoupled (Loshchilov and Hutter 2019).
        tail: "sgd" or "adamw".
        betas: of the AdamW tail.
        eps: of the AdamW tail.
        damping: Tikhonov damping of the Fisher of the mean loss, split by pi between the factors. Its unit is that of a
            squared gradient of the loss over a squared parameter. A number, or a function of the step.
        kl_clip: bound on `lr^2 <V, dW>`, twice the KL divergence of a step; None for no bound.
        ema_decay: weight of the past in the factors' moving averages, bias-corrected.
        statistics_every: steps between statistics: a number, or a function of the step.
        inverse_every: steps between inverses, likewise. Fresh ones allow lower damping and longer steps.
        warmup: steps at the start in which both are made every time.
        fisher: whose labels make G: "empirical", the data's; "mc", drawn from the model, the true Fisher; "ggn", the
            generalized Gauss-Newton matrix, exact, a backward pass an output. The last two need `loss` and a call of
            `accumulate_fisher(outputs, targets)` between forward and backward.
        fisher_samples: label draws a step of "mc".
        loss: the loss that is trained with, nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, or a
            `kfac_triton.Likelihood`.
        curvature: "kfac", or "ekfac" (George et al. 2018): eigenbases when inverses are due, their second moments every step.
        exact_damping: dampen the Kronecker product itself, in its eigenbasis, instead of its factors. EKFAC always does.
        weight_sharing: "expand" or "reduce" for positions and tokens (Eschenhagen et al. 2023).
        inverse: "auto", "newton_schulz", "factored", "cholesky" or "eigh".
        inverse_tolerance: energy-norm error that the iterative inverses stop at.
        loss_reduction: "mean" or "sum", how the loss goes over its terms.
        loss_terms: "examples", or "tokens" when each position has a loss of its own (language models).
        loss_scale: factor on the loss when gradients were captured: a number, a `torch.amp.GradScaler`, or a function that
            returns it.
        stats_fraction: part of the rows (tokens, images) that statistics are taken of, in (0, 1]: every second, third, ... one,
            at most this part.
        max_stats_tokens: most rows that a pass takes of a layer; None for all.
        max_factor_size: a side of W beyond it is kept as `oversize` says; None for no limit.
        oversize: "diagonal", or "block": cut into blocks along the diagonal.
        factor_dtype: "float32", or "bfloat16": factors are kept in 16 bits between steps, rounded at random so that slow moving
            averages still move; sums and inverses stay in single precision. (Float64 weights have float64 for "float32".)
        norms: scale and shift of norms: "diagonal", "full" or "skip".
        skip: modules to leave out: patterns of their names or classes (* and ?), or a function of name and module.
        include: modules to consider, likewise.
        split: layers whose output is several things (query, key and value): a dict of patterns and numbers of equal blocks
            that G is cut into, such as {"*.qkv": 3}. A is shared.
        damping_every: with lr="auto", steps between adaptations of damping.
        damping_range: with lr="auto", the least and the highest damping.
        foreach: whether the tail takes many parameters in one operation; None lets PyTorch choose.
        maximize: whether to go up instead of down.
        capturable: whether a step can be recorded in a CUDA graph (docs/speed.md): intervals must be 1, schedules constant.
        backend: "auto" runs the Triton kernels on a GPU and PyTorch elsewhere, "triton" insists on the kernels, "torch" does
            without them.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is outside its range, or the model has no layer that K-FAC covers.

    Example:
        >>> import torch
        >>> from kfac_triton import KFAC
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> optimizer = KFAC(model, lr=0.1, damping=0.1)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(2, (16,)))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.close()
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor | str = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        tail: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        damping: Schedule = Settings.damping,
        kl_clip: float | None = Settings.kl_clip,
        ema_decay: float = Settings.ema_decay,
        statistics_every: int | Callable[[int], int] = Settings.statistics_every,
        inverse_every: int | Callable[[int], int] = Settings.inverse_every,
        warmup: int = Settings.warmup,
        fisher: str = Settings.fisher,
        fisher_samples: int = Settings.fisher_samples,
        loss: nn.Module | Likelihood | None = Settings.loss,
        curvature: str = Settings.curvature,
        exact_damping: bool = Settings.exact_damping,
        weight_sharing: str = Settings.weight_sharing,
        inverse: str = Settings.inverse,
        inverse_tolerance: float = Settings.inverse_tolerance,
        loss_reduction: str = Settings.loss_reduction,
        loss_terms: str = Settings.loss_terms,
        loss_scale: float | Callable[[], float] | GradScaler = Settings.loss_scale,
        stats_fraction: float = Settings.stats_fraction,
        max_stats_tokens: int | None = Settings.max_stats_tokens,
        max_factor_size: int | None = Settings.max_factor_size,
        oversize: str = Settings.oversize,
        factor_dtype: str = Settings.factor_dtype,
        norms: str = Settings.norms,
        skip: Choice = Settings.skip,
        include: Choice = Settings.include,
        split: dict[str, int] | None = Settings.split,
        damping_every: int = 5,
        damping_range: tuple[float, float] = (1e-8, 1e8),
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        backend: str = Settings.backend,
    ) -> None:
        settings = Settings(
            damping=damping, kl_clip=kl_clip, ema_decay=ema_decay, statistics_every=statistics_every,
            inverse_every=inverse_every, warmup=warmup, fisher=fisher, fisher_samples=fisher_samples, loss=loss,
            curvature=curvature, exact_damping=exact_damping, weight_sharing=weight_sharing, inverse=inverse,
            inverse_tolerance=inverse_tolerance, loss_reduction=loss_reduction, loss_terms=loss_terms, loss_scale=loss_scale,
            stats_fraction=stats_fraction, max_stats_tokens=max_stats_tokens, max_factor_size=max_factor_size,
            oversize=oversize, factor_dtype=factor_dtype, norms=norms, skip=skip, include=include, split=split,
            capturable=capturable, backend=backend,
        )  # fmt: skip
        is_auto = isinstance(lr, str)
        if is_auto:
            settings = auto_settings(lr, settings, maximize=maximize, capturable=capturable)
            lr = 1.0  # of the groups, where schedulers expect a number; it does not matter
        require_module(model)
        params = [p for p in model.parameters() if p.requires_grad] if params is None else params
        self._betas = betas
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "tail": tail, "betas": betas,
            "eps": eps, "foreach": foreach, "maximize": maximize, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults)
        if tail == "sgd":  # OneCycleLR and CyclicLR leave momentum alone where betas are among the defaults
            del self.defaults["betas"]
        self._model = model
        engine = Engine(model, settings, self._parameters())
        self._run = Run(engine, self._parameters(), torch.zeros((), dtype=torch.long, device=engine.bank.home))
        if is_auto:
            self._run.auto = self._auto_from({"damping_every": damping_every, "damping_range": damping_range, "states": []})
        checkpoint.declare_keys(self, self.engine, is_auto)

    @property
    def is_auto(self) -> bool:
        """Whether the quadratic model chooses the steps (lr="auto")."""
        return self._run.auto is not None

    def _parameters(self) -> list[nn.Parameter]:
        return param_groups.parameters_of(self)

    def _decays(self) -> list[float]:
        return [group["weight_decay"] for group in self.param_groups for _ in group["params"]]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; layers whose weights it brings are covered from then on, the others keep their factors."""
        param_groups.validate_group({"betas": self._betas, **self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("betas", self._betas)
        for parameter in group["params"]:
            self.state[parameter].update(param_groups.initial_state(parameter, group))
        if hasattr(self, "_run"):  # not while the base class builds its first groups
            self._run.known = self._parameters()
            self._cover_anew()

    def _keep_up(self) -> None:
        """Follows parameters that others have taken the place of, or that have moved to another device."""
        if len(self._parameters()) != len(self._run.known):  # groups were assigned: Lightning's finetuning callback resumes so
            self._run.known = param_groups.complete(self, self._betas)
            self._cover_anew()
        self._run.known = param_groups.rekey_swapped(self, self._run.known)
        if self.engine.changed_device():
            param_groups.move_state(self)
            self._cover_anew()

    def _cover_anew(self) -> None:
        """Finds the layers again; those that were covered before keep what is known of them."""
        run = self._run
        run.engine = rebuild_engine(self._model, run.engine, self._parameters())
        run.dropped = run.dropped.to(run.engine.bank.home)
        if run.auto is not None:
            run.auto = self._auto_from(run.auto.arguments())
        checkpoint.declare_keys(self, self.engine, self.is_auto)

    def _auto_from(self, arguments: dict[str, Any]) -> AutoStep:
        return AutoStep.from_arguments(self._model, self.engine, self._parameters(), arguments)

    @torch.compiler.disable(reason=EAGER)
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As any optimizer's; statistics that belong to these gradients (of a skipped step, say) are thrown away with them."""
        super().zero_grad(set_to_none)
        self.engine.forget_with_gradients()
        self._keep_up()
        if self.engine.has_unfrozen():
            self._cover_anew()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], Any]) -> Any: ...

    @torch.compiler.disable(reason=EAGER)
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step: statistics into factors, inverses when due, and the tail along the preconditioned gradients.

        Args:
            closure: evaluates the model and returns the loss, with gradients; run once, before the step. With lr="auto": runs
                the model and returns (outputs, targets); run up to five times on the same batch, with the same random numbers.

        Returns:
            The loss before the step, if there is a closure.

        Raises:
            RuntimeError: if the optimizer is closed, or a gradient is sparse; nothing is changed then.
            TypeError, ValueError: if lr is "auto" and there is no closure, or one that does not return (outputs, targets).
        """
        self._keep_up()
        if self._run.auto is not None:
            with transaction(self.engine):
                loss = self._run.auto.step(closure, self._decays())
        else:
            loss = self._plain_step(closure)
        if self.engine.has_unfrozen():
            self._cover_anew()
        return loss

    def _plain_step(self, closure: Callable[[], Any] | None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first_order.refuse_gradients(self._parameters())
        cuda_graphs.require_recordable_groups(self.param_groups, self.state)
        learning_rates = {p: group["lr"] for group in self.param_groups for p in group["params"]}
        with transaction(self.engine):
            updates = self.engine.precondition(lambda p: learning_rates.get(p, 0.0))
            finite, mixed = self.engine.finite, self.engine.mixed
            self._run.dropped += first_order.drop_bad_gradients(self._parameters(), updates, finite, mixed)
            # All that needs memory comes before the first parameter moves.
            work = [first_order.prepare(group, updates, self.state) for group in self.param_groups]
            held = first_order.hold(self.param_groups, work, finite)
            for group, (params, gradients, states) in zip(self.param_groups, work, strict=True):
                first_order.apply(group, params, gradients, states, held)
        return loss

    def diagnostics(self) -> dict[str, Any]:
        """Numbers of the last step as a plain dict; see `kfac_triton.diagnostics.diagnostics` and `AutoStep.diagnostics`.

        "dropped_gradients" counts gradients with a NaN or Inf of parameters that K-FAC does not cover, so far.
        """
        own = {"dropped_gradients": int(self._run.dropped)}
        return super().diagnostics() | own | (self._run.auto.diagnostics() if self._run.auto is not None else {})

    def state_dict(self, *, include_factors: bool = True, include_inverses: bool = True) -> dict[str, Any]:
        """As any optimizer's, with the factors in the state of each covered weight (float32 whatever the weight's type).

        Args:
            include_factors: without them the checkpoint is as small as another optimizer's; they then begin anew after loading,
                while steps, schedules and the tail go on.
            include_inverses: keeps inverses (or eigenbases, with EKFAC's moments) where a run that goes on would not make the
                same ones from the factors: inverse_every above 1, warm inverses, eigenbases. Without them the checkpoint has
                half the size, and a resumed run has fresher inverses than the uninterrupted one.
        """
        self._keep_up()
        checkpoint.declare_keys(self, self.engine, self.is_auto)
        extra = self._run.auto.export() if self._run.auto is not None else []
        layers = export_layers(self.engine, include_inverses) if include_factors else None
        return checkpoint.add_layer_state(super().state_dict(), self, layers, extra)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what `state_dict` gave; inverses are made from the factors at the next step.

        Raises:
            ValueError: if the state does not fit, a newer version wrote it, or a factor is not finite; nothing is changed then.
        """
        self._keep_up()
        plain, by_parameter, extra = checkpoint.take_layer_state(state_dict)
        layers = checkpoint.layer_states(self, by_parameter)
        param_groups.check_tail(self, plain)
        check_layers(self.engine, layers)
        if self._run.auto is not None:
            self._run.auto.restore([extra.get(i, {}) for i in range(len(self._parameters()))])
        super().load_state_dict(plain)
        if (step := checkpoint.saved_step(state_dict)) is not None:
            self.engine.resume(self.engine.progress.at_step(step))
        restore_layers(self.engine, layers)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the model comes along, so that a copy has layers of its own to hook."""
        return {
            **super().__getstate__(),
            "model": self._model,
            "settings": self.engine.settings,
            "layers": export_layers(self.engine),
            "closed": self.engine.closed,
            "betas": self._betas,
            "dropped": self._run.dropped,
            "auto": self._run.auto.arguments() if self._run.auto is not None else None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also what the base class ends `load_state_dict` with; then only state and groups are in it."""
        base: dict[str, Any] = {key: state[key] for key in ("defaults", "state", "param_groups") if key in state}
        super().__setstate__(base)
        if "betas" in state:
            self._betas = state["betas"]
        known = param_groups.complete(self, self._betas)
        if "model" in state:
            self._model = state["model"]
            self._run = Run(Engine(self._model, state["settings"], known), known, state["dropped"])
            restore_layers(self.engine, state["layers"])
            if state["auto"] is not None:
                self._run.auto = self._auto_from(state["auto"])
            if state["closed"]:
                self.close()
        self._run.known = known
        checkpoint.declare_keys(self, self.engine, self.is_auto)
