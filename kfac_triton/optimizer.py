"""KFAC: natural-gradient training as a torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from . import cuda_graphs
from .autocast import without_autocast
from .base import Run
from .engine import EAGER, Engine
from .fisher.likelihood import Likelihood
from .layers import BatchDim, Choice
from .settings import Schedule, Settings
from .state import state_dict as checkpoint
from .state.transaction import transaction
from .stateful import StatefulKFAC
from .steps import first_order, param_groups
from .steps.adam import AdamWork, adam_options, adam_settings
from .steps.auto import auto_settings
from .validation import require_module


class KFAC(StatefulKFAC):
    r"""Kronecker-factored approximate curvature (Martens and Grosse 2015), followed by SGD with momentum or AdamW.

    A layer with the weight matrix W = [weight | bias] and its gradient dW has the preconditioned gradient

        V = (G + sqrt(damping) / pi I)^-1  dW  (A + sqrt(damping) pi I)^-1

    where A = E[a a^T] of the layer's inputs and G = E[g g^T] of the gradients of its outputs are exponential moving averages.
    K-FAC covers linear layers, (transposed) convolutions, embeddings, norms and attention; see docs/layers.md for details. All
    other parameters take the plain gradient. Create the optimizer before the first run of a compiled model.

    With curvature="adam" the factors give eigenbases only, in which covered layers move by Adam: see `KFACAdam`, which is the
    same with arguments of its own. Then the tail must be "adamw", by which other parameters move, and damping, kl_clip,
    inverse, inverse_tolerance and momentum have no effect.

    Args:
        model: the module to train.
        params: parameters or parameter groups to optimize, as for any optimizer; None takes all trainable ones. Each group
            may set its own lr, momentum, nesterov, weight_decay, tail, betas and eps.
        lr: learning rate. With a KL clip, start with 1: the clip then limits the length of early steps. With "auto" the
            quadratic model of the loss chooses learning rate, momentum and damping (Martens and Grosse 2015, sections 6.4 to
            7). `step` then takes a closure that runs the model and returns (outputs, targets), without backward; `loss` is
            required; `weight_decay` is an L2 penalty; momentum, kl_clip and tail have no effect.
        momentum: for tail="sgd", in [0, 1).
        nesterov: whether momentum is Nesterov's; for tail="sgd", and with curvature="adam".
        weight_decay: decoupled weight decay (Loshchilov and Hutter 2019).
        tail: rule that takes the preconditioned gradients: "sgd" or "adamw".
        betas: for tail="adamw"; with curvature="adam" also those of Adam in the eigenbasis, as are eps and nesterov.
        eps: for tail="adamw".
        damping: Tikhonov damping of the Fisher matrix of the mean loss, split by pi between the factors. Its unit is that of a
            squared gradient of the loss over a squared parameter. A number, or a function of the step.
        kl_clip: bound on `lr^2 <V, dW>`, twice the KL divergence of a step; None for no bound.
        ema_decay: decay of the factors' moving averages, which are bias-corrected.
        statistics_every: steps between statistics: a number, or a function of the step.
        inverse_every: steps between inverses (or refreshes of eigenvectors), likewise. Fresh inverses allow lower damping and
            longer steps.
        warmup: number of steps at the start in which both intervals are 1.
        fisher: labels for G: "empirical" takes those of the data; "mc" draws them from the model (true Fisher); "ggn" computes
            the exact generalized Gauss-Newton matrix, with one backward pass for each output. The last two need `loss` and a
            call of `accumulate_fisher(outputs, targets)` between forward and backward.
        fisher_samples: number of labels that "mc" draws in a step.
        loss: the training loss: nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, or a `kfac_triton.Likelihood`.
        curvature: "kfac"; "ekfac" (George et al. 2018): eigenbases when inverses are due, their second moments every step; or
            "adam": Adam in the eigenbasis of the factors, without damping (`KFACAdam`).
        exact_damping: whether to damp the Kronecker product, in its eigenbasis, instead of its factors. EKFAC always does.
        weight_sharing: "expand" or "reduce" for positions and tokens (Eschenhagen et al. 2023).
        bias: "joint": a bias moves along the last column of W's update; or, with curvature="adam" only, "separate": it moves by
            Adam in its own coordinates.
        noise_damping: with curvature="adam", how much Adam's squares are mixed with the means of their rows and columns: c of
            the share min(1, c n / rows), see `KFACAdam`; 0 for none.
        refresh: with curvature="adam", how eigenvectors are refreshed: "qr", "products", "eigh", or "auto", which is products
            on a GPU and QR elsewhere.
        inverse: "auto", "newton_schulz", "factored", "cholesky" or "eigh".
        inverse_tolerance: error in the energy norm at which iterative inverses stop.
        loss_reduction: "mean" or "sum" of the loss terms.
        loss_terms: how many terms the loss of a call of the model has: "examples"; "tokens", if each position has one; a
            number; or a function of the call's args, kwargs and output that returns a number or a tensor (). "auto" counts the
            labels of a Hugging Face model, or those of `accumulate_fisher`, and otherwise examples (docs/losses.md).
        calls: how the losses of several calls of the model make one loss: those of one backward pass are means that are added,
            and further backward passes accumulate one mean ("accumulated"); all between two steps are parts of one mean
            ("joint"); or all are means that are added ("separate").
        batch_dim: dimension of layers' inputs that counts examples: 0, or 1 for sequence-first models (T, B, n); or a function
            of name and module, for models that mix both. An input with too few dimensions for it, (B, n), has its examples in
            dimension 0; convolutions, channel norms and attention have a layout of their own (docs/layers.md).
        loss_scale: factor on the loss in the backward pass: a number, a `torch.amp.GradScaler`, or a function that returns it.
        rows: rows (examples, tokens, positions) of A: "nonzero" leaves out those whose output gradient is exactly zero, because
            they carry no loss; "all" leaves out none. "auto" is "nonzero" where labels are known to leave out terms (those of a
            Hugging Face model, or of `accumulate_fisher`), and "all" elsewhere. With one label for each example, it leaves out
            whole examples.
        stats_fraction: largest part of the rows (tokens, images) to take statistics of, in (0, 1]: every 2nd, 3rd, ... row.
            "auto" takes an eighth of the tokens of linear layers, but at least about 1,024 and as many as the layer's largest
            factor has rows, and everything else (docs/curvature.md).
        max_stats_tokens: largest number of rows of a layer to take statistics of in a pass; None for all.
        max_kept_bytes: on a GPU, bytes of rows (of large batches) that a backward pass keeps, so that one launch sums those of
            many layers; 0 sums each layer at once. Rows that need less memory than the factors of their layer do not count.
        max_factor_size: largest size of a dense factor, see `oversize`; None for no limit.
        oversize: how to store larger factors: "diagonal", or "block" for blocks along the diagonal.
        factor_dtype: "float32" (for float64 weights float64), or "bfloat16": factors are stored in 16 bits, with stochastic
            rounding so that slow moving averages still move; sums and inverses stay in single precision.
        norms: curvature for scale and shift of norms: "diagonal", "full" or "skip".
        skip: modules to leave out: patterns of their names or classes (* and ?), or a function of name and module.
        include: modules to consider, likewise.
        split: layers whose output has several parts (query, key, value), with their number: {"*.qkv": 3}. Each has its own G.
        damping_every: with lr="auto", steps between adaptations of damping.
        damping_range: with lr="auto", smallest and largest damping.
        foreach: whether one operation updates many parameters; None lets PyTorch choose.
        maximize: whether to maximize the loss instead.
        capturable: whether a step can be recorded in a CUDA graph (docs/speed.md): intervals must be 1, schedules constant.
        backend: "auto" takes the Triton kernels on a GPU and PyTorch elsewhere; "triton" always takes kernels, "torch" never.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is outside its range, or the model has no layer that K-FAC covers.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from kfac_triton import KFAC
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> optimizer = KFAC(model, lr=0.1, damping=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
        >>> loss = nn.functional.cross_entropy(model(x), y)
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
        bias: str = Settings.bias,
        noise_damping: float = Settings.noise_damping,
        refresh: str = Settings.refresh,
        inverse: str = Settings.inverse,
        inverse_tolerance: float = Settings.inverse_tolerance,
        loss_reduction: str = Settings.loss_reduction,
        loss_terms: str | float | Callable[..., Any] = Settings.loss_terms,
        calls: str = Settings.calls,
        batch_dim: BatchDim = Settings.batch_dim,
        loss_scale: float | Callable[[], float] | GradScaler = Settings.loss_scale,
        rows: str = Settings.rows,
        stats_fraction: float | str = Settings.stats_fraction,
        max_stats_tokens: int | None = Settings.max_stats_tokens,
        max_kept_bytes: int = Settings.max_kept_bytes,
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
            curvature=curvature, exact_damping=exact_damping, weight_sharing=weight_sharing, inverse=inverse, calls=calls,
            bias=bias, noise_damping=noise_damping, refresh=refresh,
            inverse_tolerance=inverse_tolerance, loss_reduction=loss_reduction, loss_terms=loss_terms, batch_dim=batch_dim,
            loss_scale=loss_scale, stats_fraction=stats_fraction, max_stats_tokens=max_stats_tokens,
            max_kept_bytes=max_kept_bytes, max_factor_size=max_factor_size, oversize=oversize, factor_dtype=factor_dtype,
            rows=rows, norms=norms, skip=skip, include=include, split=split, capturable=capturable, backend=backend,
        )  # fmt: skip
        is_auto = isinstance(lr, str)
        if is_auto:
            if curvature == "adam":
                raise ValueError(
                    "lr is 'auto', which needs a quadratic model: curvature must be 'kfac' or 'ekfac', but is 'adam'"
                )
            settings = auto_settings(lr, settings, maximize=maximize, capturable=capturable)
            lr = 1.0  # has no effect, but schedulers expect a number in the groups
        self._is_adam = curvature == "adam"
        if self._is_adam:
            settings = adam_settings(settings)
        require_module(model)
        params = [p for p in model.parameters() if p.requires_grad] if params is None else params
        self._betas = betas
        defaults = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "tail": tail, "betas": betas,
            "eps": eps, "foreach": foreach, "maximize": maximize, "capturable": capturable,
        }  # fmt: skip
        super().__init__(params, defaults)
        if tail == "sgd":  # if the defaults have betas, OneCycleLR and CyclicLR change these instead of momentum
            del self.defaults["betas"]
        self._model = model
        engine = Engine(model, settings, self._parameters())
        self._run = Run(engine, self._parameters(), torch.zeros((), dtype=torch.long, device=engine.bank.home))
        self._complete()
        if is_auto:
            self._run.auto = self._auto_from({"damping_every": damping_every, "damping_range": damping_range, "states": []})
        checkpoint.declare_keys(self, self.engine, is_auto)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group. K-FAC covers the layers of its weights from then on; other layers keep their factors."""
        param_groups.validate_group({"betas": self._betas, **self.defaults, **param_group})
        if self._is_adam:
            param_groups.require_adam([{**self.defaults, **param_group}], "it moves what is not covered")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("betas", self._betas)
        for parameter in group["params"]:
            # With curvature="adam" the engine, once it is there, decides whose averages it has.
            self.state[parameter].update(param_groups.initial_state(parameter, group, has_averages=not self._is_adam))
        if hasattr(self, "_run"):  # not while the base class builds its first groups
            self._run.known = self._parameters()
            self._cover_anew()

    @torch.compiler.disable(reason=EAGER)
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, and drops the statistics that belong to them (for example after a skipped step)."""
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
        """One step: updates factors, recomputes inverses that are due, and moves along the preconditioned gradients.

        Args:
            closure: computes gradients and returns the loss; called once, before the step. With lr="auto" it runs the model
                and returns (outputs, targets); called up to five times on the same batch, with the same random numbers.

        Returns:
            The loss before the step, if there is a closure.

        Raises:
            RuntimeError: if the optimizer is closed, or a gradient is sparse; nothing is changed then.
            TypeError, ValueError: if lr is "auto" and there is no closure, or one that does not return (outputs, targets).
        """
        self._keep_up()
        if self._run.auto is not None:
            decays = [group["weight_decay"] for group in self.param_groups for _ in group["params"]]
            with transaction(self.engine):
                loss = self._run.auto.step(closure, decays)
        else:
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._plain_step()
        if torch._C._is_any_autocast_enabled():
            torch.clear_autocast_cache()  # of weights as they were before the step
        if self.engine.has_unfrozen():
            self._cover_anew()
        return loss

    @without_autocast
    def _plain_step(self) -> None:
        first_order.refuse_gradients(self._parameters())
        cuda_graphs.require_recordable_groups(self.param_groups, self.state)
        engine, groups, backend = self.engine, self.param_groups, self.engine.settings.backend
        # By identity, because a tensor computes its hash in Python.
        learning_rates = {id(p): group["lr"] for group in groups for p in group["params"]}
        with transaction(engine):
            if self._is_adam:
                options = {id(p): adam_options(group) for group in groups for p in group["params"]}
                updates = engine.precondition(lambda p: learning_rates.get(id(p), 0.0), lambda p: options[id(p)])
            else:
                updates = engine.precondition(lambda p: learning_rates.get(id(p), 0.0))
            finite = engine.finite
            self._run.dropped += first_order.drop_bad_gradients(self._parameters(), updates, finite, engine.mixed)
            # All memory is allocated before the first parameter changes.
            adam = AdamWork(groups, updates, self.state, host_looks=finite is None) if self._is_adam else None
            if adam is not None:
                groups, work = adam.groups, adam.work
            else:
                work = [first_order.prepare(group, updates, self.state) for group in groups]
            fused, work = first_order.split(groups, work, finite, backend)
            held = first_order.hold(groups, work, finite, backend)
            engine.commit()
            if adam is not None:
                adam.commit()
            for steps in fused:
                steps.apply()
            for group, (params, gradients, states) in zip(groups, work, strict=True):
                first_order.apply(group, params, gradients, states, held)

    def diagnostics(self) -> dict[str, Any]:
        """Numbers of the last step as a plain dict; see `kfac_triton.diagnostics.diagnostics` and `AutoStep.diagnostics`.

        "dropped_gradients" counts the gradients so far that had a NaN or Inf, of parameters that K-FAC does not cover.
        """
        own = {"dropped_gradients": int(self._run.dropped)}
        return super().diagnostics() | own | (self._run.auto.diagnostics() if self._run.auto is not None else {})
