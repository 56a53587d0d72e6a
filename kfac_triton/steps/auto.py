"""A step with lr="auto": what K-FAC of Martens and Grosse 2015 (https://arxiv.org/abs/1503.05671) does with its direction."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..autocast import NoAutocast
from ..fisher.losses import likelihood_of
from .controller import Controller
from .forward_mode import Evaluate, Snapshot, backward_number, jacobian_products, outputs_and_targets, require_agreement
from .quadratic import ROUNDING, Direction, QuadraticModel, all_finite, combined

if TYPE_CHECKING:
    from ..engine import Engine
    from ..settings import Settings


def auto_settings(lr: Any, settings: Settings, **options: bool) -> Settings:
    """Settings for lr="auto": no KL clip, and the reduction of the loss that it evaluates.

    Raises:
        TypeError: if lr is another string.
        ValueError: if one of the options is set: lr="auto" has none of them.
    """
    if lr != "auto":
        raise TypeError(f"lr must be a number, a tensor or 'auto', but is {lr!r}")
    for name, value in options.items():
        if value:
            raise ValueError(
                f"lr is 'auto', which minimizes a loss and waits for its value: {name} must be False, but is {value!r}"
            )
    reduction = settings.loss_reduction if settings.loss is None else likelihood_of(settings.loss).reduction
    return dataclasses.replace(settings, kl_clip=None, loss_reduction=reduction)


class _Batch(NamedTuple):
    """A batch and the results of its forward and backward passes.

    Attributes:
        evaluate: runs the model on it, for derivatives by the input with gradients enabled, and returns (outputs, targets).
        outputs: of the model before the step.
        targets: of the loss.
        loss: before the step.
        terms: number of loss terms.
        gradient: of the loss, None for a parameter that does not take part; empty if the loss is not finite or has no terms.
    """

    evaluate: Evaluate
    outputs: Tensor
    targets: Any
    loss: Tensor
    terms: float
    gradient: list[Tensor | None]


class AutoStep:
    r"""Steps whose length, momentum and damping follow from the loss (Martens and Grosse 2015, sections 6.4, 6.5 and 7).

    The objective is f = loss + sum_p eta_p / 2 |p|^2. A step combines up to three directions,

        delta = alpha (-V) + beta (-h') + mu delta_0

    with V the preconditioned gradient of the layers that K-FAC covers, h' the gradient of the other parameters and delta_0 the
    previous step. The coefficients minimize the exact quadratic model of f on this batch

        M(delta) = <h, delta> + 1/2 delta^T (GGN + eta I + damping I) delta.

    The new loss, on the same batch with the same random numbers, gives the reduction ratio

        rho = (f(theta + delta) - f(theta)) / M(delta)

    by which the `Controller` adapts damping. A step is rejected if the new loss is not finite, or has risen although M promised
    a decrease larger than rounding: parameters and buffers are then restored bit for bit. If M predicts no decrease at all, no
    parameter changes.

    Damping is that of the mean loss. For a sum it is multiplied by the number of terms, and the steps are the same.

    Args:
        model: the module to train.
        engine: K-FAC for that model.
        parameters: those of all groups, in order.
        damping_every: steps between adaptations of damping.
        damping_range: the lowest and the highest damping.

    Attributes:
        controller: damping, the previous step and the counters.
        loss: the loss function, of (outputs, targets).
        weight_decay: eta, one for each parameter.
        report: of the last step: loss (before it, a tensor), lr (alpha), lr_others (beta), momentum (mu), damping (for the
            next step), reduction_ratio, predicted (M(delta)), rejected and skipped.

    Raises:
        TypeError, ValueError: if the loss cannot be evaluated, damping is not a number, or a value is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        parameters: Sequence[nn.Parameter],
        damping_every: int,
        damping_range: tuple[float, float],
    ) -> None:
        settings = engine.settings
        loss = settings.loss
        if loss is None or not callable(loss):
            raise ValueError(
                f"lr is 'auto', so loss must be a function of (outputs, targets), but is {loss!r}; pass for example "
                "loss=nn.CrossEntropyLoss() (a Likelihood of your own also needs __call__(outputs, targets))"
            )
        if callable(settings.damping):
            raise ValueError("lr is 'auto', which adapts damping by itself: damping must be a number, but is a function")
        if not isinstance(damping_range, (tuple, list)) or len(damping_range) != 2:
            raise TypeError(f"damping_range must be a pair of numbers, but is {damping_range!r}")
        self._engine = engine
        self._model = model
        self._parameters = list(parameters)
        self.controller = Controller(self._parameters, settings.damping, damping_every, *damping_range)
        self.loss: Callable[[Tensor, Any], Tensor] = loss
        self._likelihood = likelihood_of(loss)
        self._is_mean = self._likelihood.reduction == "mean"
        self._has_agreed = False
        self.weight_decay = [0.0] * len(self._parameters)
        self.report: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """What `from_arguments` needs to make a copy for a new engine."""
        controller = self.controller
        bounds = controller.damping_floor, controller.damping_ceiling
        return {"damping_every": controller.damping_every, "damping_range": bounds, "states": self.export()}

    @classmethod
    def from_arguments(
        cls, model: nn.Module, engine: Engine, parameters: Sequence[nn.Parameter], arguments: dict[str, Any]
    ) -> AutoStep:
        """A copy that continues from the same state; parameters may have been added after the earlier ones."""
        other = cls(model, engine, parameters, arguments["damping_every"], arguments["damping_range"])
        states = arguments["states"]
        other.restore(states + [{}] * (len(parameters) - len(states)))
        return other

    def export(self) -> list[dict[str, Tensor]]:
        """The entries for the state of each parameter; see `Controller.export`."""
        return self.controller.export()

    def restore(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Restores what `export` returned; see `Controller.restore`."""
        self.controller.restore(states)

    def diagnostics(self) -> dict[str, Any]:
        """Learning rate, momentum, reduction ratio and predicted change of the last step; rejected and skipped steps so far."""
        report = self.report
        return {
            "learning_rate": report.get("lr", 0.0),
            "momentum": report.get("momentum", 0.0),
            "reduction_ratio": self.controller.reduction_ratio,
            "predicted": report.get("predicted", 0.0),
            "rejected_steps": self.controller.rejected,
            "skipped_steps": self.controller.skipped,
        }

    def step(self, closure: Evaluate | None, weight_decay: Sequence[float]) -> Tensor:
        """One step on one batch, with these L2 penalties; returns the loss before it.

        Args:
            closure: one forward pass, returns (outputs, targets). It runs once with gradients, once for each direction, and
                once for the new loss.
            weight_decay: eta, one for each parameter.

        Raises:
            TypeError: if there is no closure, or it returns no (outputs, targets).
            ValueError: if it returns outputs without a graph, or others each time.
            RuntimeError: if an operation of the model has no forward derivative.
        """
        if closure is None:
            raise TypeError(
                "lr is 'auto', so step needs a closure that runs the model and returns (outputs, targets): "
                "optimizer.step(lambda: (model(inputs), targets))"
            )
        self._engine.require_open()
        self.weight_decay = list(weight_decay)
        try:
            with NoAutocast() as context:
                self.report = self._step(lambda: context.call_outside(closure))
        finally:
            # A step that was skipped, or ended by an error in the closure, must leave no statistics.
            self._engine.forget_statistics()
        loss: Tensor = self.report["loss"]
        return loss

    @torch.no_grad()
    def _step(self, evaluate: Evaluate) -> dict[str, Any]:
        controller, before = self.controller, Snapshot(self._model)
        batch = self._differentiated(evaluate)
        gradient = self._with_penalty(batch.gradient) if batch.gradient else []
        if not gradient or not all_finite(gradient):
            before.restore_buffers()  # the batch may have brought NaN into running statistics
            controller.skipped += 1
            return self._report(batch, {}, math.nan, skipped=True)

        directions = self._directions(gradient, batch.terms)
        after = Snapshot(self._model)
        before.restore()
        products = self._products(batch, list(directions.values()))
        *coefficients, predicted = self._minimum(batch, gradient, list(directions.values()), products)
        after.restore()

        step: list[Tensor | None] = [None] * len(self._parameters)
        accepted, reduction_ratio = predicted == 0, math.nan
        if -math.inf < predicted < 0:
            step = combined(coefficients, list(directions.values()))
            accepted, reduction_ratio = self._try(step, batch, gradient, predicted, before, after)
        if accepted:
            controller.accept(step, reduction_ratio)
        else:
            before.restore_buffers()
            controller.reject(reduction_ratio)
        return self._report(batch, dict(zip(directions, coefficients, strict=True)), predicted, rejected=not accepted)

    def _differentiated(self, evaluate: Evaluate) -> _Batch:
        """Forward pass, the backward passes for curvature, and that of the loss."""
        with torch.enable_grad():
            number = backward_number()
            outputs, targets = outputs_and_targets(evaluate())
            takes_derivatives = backward_number() > number + 1
            if not outputs.requires_grad:
                raise ValueError(
                    "closure returned outputs without a graph; run the model in it, without torch.no_grad() and detach()"
                )
            loss = self.loss(outputs, targets)
            terms = float(self._likelihood.terms(outputs.detach(), targets))
            gradient: list[Tensor | None] = []
            if math.isfinite(float(loss.detach())) and terms > 0:
                for p in self._parameters:
                    p.grad = None
                self._engine.accumulate_fisher(outputs, targets)
                loss.backward()
                gradient = [p.grad for p in self._parameters]
        if takes_derivatives:  # nobody else needs the graphs of later evaluations, nor should DDP wait for their gradients
            evaluate = torch.enable_grad()(evaluate)
        return _Batch(evaluate, outputs.detach(), targets, loss.detach(), terms, gradient)

    def _with_penalty(self, gradient: Direction) -> list[Tensor | None]:
        """Gradient of the objective."""
        return [
            None if g is None else g.detach() + eta * p if eta else g.detach()
            for p, g, eta in zip(self._parameters, gradient, self.weight_decay, strict=True)
        ]

    def _objective(self, loss: Tensor, gradient: Direction) -> float:
        """Loss and the penalty of the parameters that take part."""
        triples = zip(self._parameters, self.weight_decay, gradient, strict=True)
        penalties = [p.double().square().sum() * (eta / 2) for p, eta, g in triples if eta and g is not None]
        return float(sum((x.to(loss.device) for x in penalties), loss.double()))

    def _directions(self, gradient: list[Tensor | None], terms: float) -> dict[str, list[Tensor | None]]:
        """The directions by name, in the parameters' types. A direction without any parameter is left out."""
        sizes = [p.numel() for p in self._parameters]
        decay = sum(n * eta for n, eta in zip(sizes, self.weight_decay, strict=True)) / max(sum(sizes), 1)
        for p, h in zip(self._parameters, gradient, strict=True):
            p.grad = h
        self._engine.change(damping=self.controller.damping + decay / (1.0 if self._is_mean else terms))
        natural = self._engine.precondition(lambda _: 0.0)
        along: dict[str, list[Tensor | None]] = {"lr": [], "lr_others": [], "momentum": []}
        for p, h, delta in zip(self._parameters, gradient, self.controller.previous, strict=True):
            v = natural.get(p)
            along["lr"].append(None if h is None or v is None else -v.to(p))
            along["lr_others"].append(-h.to(p) if h is not None and v is None else None)
            along["momentum"].append(None if h is None else delta)
        return {name: d for name, d in along.items() if any(x is not None for x in d)}

    def _products(self, batch: _Batch, directions: Sequence[Direction]) -> list[Tensor]:
        """J d for each direction d. Those of the first step are checked against the gradient."""
        with self._engine.paused():
            products = jacobian_products(self._model, batch.evaluate, self._parameters, directions)
        if not self._has_agreed:
            with torch.enable_grad():
                leaf = batch.outputs.detach().requires_grad_()
                (slope,) = torch.autograd.grad(self.loss(leaf, batch.targets), leaf)
            require_agreement(slope, products, batch.gradient, directions)
            self._has_agreed = True
        return products

    def _minimum(
        self, batch: _Batch, gradient: Direction, directions: Sequence[Direction], products: Sequence[Tensor]
    ) -> list[float]:
        """Coefficients of the directions, and M there: the only wait for the device before the new loss."""
        if not directions:
            return [0.0]
        curved = [self._likelihood.hessian_product(batch.outputs, product, batch.targets) for product in products]
        damping = self.controller.damping * (1.0 if self._is_mean else batch.terms)
        ridge = [damping + eta for eta in self.weight_decay]
        scale = 1 / batch.terms if self._is_mean else 1.0
        minimum = QuadraticModel.build(directions, gradient, products, curved, scale, ridge).solve()
        return torch.cat([minimum.coefficients, minimum.change[None]]).tolist()

    def _try(
        self, step: Direction, batch: _Batch, gradient: Direction, predicted: float, before: Snapshot, after: Snapshot
    ) -> tuple[bool, float]:
        """Moves the parameters, and back again if the step is rejected; returns whether it is accepted, and rho."""
        old = self._objective(batch.loss, gradient)
        promised = -predicted > ROUNDING * torch.finfo(batch.outputs.dtype).eps * abs(old)
        triples = [(p, d, p.clone()) for p, d in zip(self._parameters, step, strict=True) if d is not None]
        accepted = False
        try:
            for p, d, _ in triples:
                p.add_(d)
            before.restore()
            with self._engine.paused():
                new = self._objective(self.loss(*outputs_and_targets(batch.evaluate())), gradient)
            accepted = math.isfinite(new) and not (promised and new > old)
        finally:  # also when the closure raises
            after.restore_generators()
            if accepted:
                after.restore_buffers()  # running statistics advance once per step
            else:
                for p, _, copy in triples:
                    p.copy_(copy)
                before.restore_buffers()
        return accepted, (new - old) / predicted if promised else math.nan

    def _report(
        self, batch: _Batch, coefficients: dict[str, float], predicted: float, rejected: bool = False, skipped: bool = False
    ) -> dict[str, Any]:
        return {
            "loss": batch.loss,
            **dict.fromkeys(("lr", "lr_others", "momentum"), 0.0),
            **coefficients,
            "damping": self.controller.damping,
            "reduction_ratio": self.controller.reduction_ratio,
            "predicted": predicted,
            "rejected": rejected,
            "skipped": skipped,
        }
