"""Step size, momentum and damping without tuning: what K-FAC of Martens and Grosse 2015 does around its direction."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .. import validation
from ..fisher.likelihood import Likelihood
from .forward_mode import Evaluate, Snapshot, jacobian_products, outputs_and_targets, require_agreement
from .quadratic import ROUNDING, Direction, QuadraticModel, all_finite, combined

# A rejected step is evidence that damping is far too low, and the rule of Levenberg and Marquardt would take 28 steps for this.
REJECTION_FACTOR = 4.0


class Controller:
    r"""Chooses the steps of one model (Martens and Grosse 2015, https://arxiv.org/abs/1503.05671, sections 6.4, 6.5 and 7).

    The objective is f = loss + sum_p eta_p / 2 |p|^2. A step goes along

        delta = alpha (-V) + beta (-h') + mu delta_0

    with V the preconditioned gradient of the layers that K-FAC covers, h' the gradient of the other parameters and delta_0 the
    step before. The coefficients minimize the exact quadratic model of f on this batch

        M(delta) = <h, delta> + 1/2 delta^T (GGN + eta I + damping I) delta.

    The new loss, on the same batch with the same random numbers, gives the reduction ratio

        rho = (f(theta + delta) - f(theta)) / M(delta)

    and every damping_every steps damping <- omega damping if rho > 3/4, damping <- damping / omega if rho < 1/4, with
    omega = (19/20)^damping_every. A step is rejected if the new loss is not finite, or has risen although M promised a
    decrease larger than rounding. Then parameters and buffers are what they were, bit for bit, damping is four times as high,
    and the next step has no momentum. Where M sees no decrease at all, nothing moves.

    Damping is that of the mean loss. For a sum it counts terms times, and the steps are the same.

    Args:
        model: the module to train.
        parameters: what to move.
        loss: the loss function, of (outputs, targets).
        likelihood: gives the curvature of the loss.
        damping: to begin with.
        weight_decay: eta, a number, or one a parameter.
        damping_every: steps between adaptations of damping.
        damping_floor: the least damping.
        damping_ceiling: the highest damping.

    Attributes:
        damping: as it is now.
        steps: steps taken or rejected.
        rejected: steps rejected.
        skipped: batches without a finite loss and gradient.
        reduction_ratio: rho of the last step, NaN where the promised change was not above rounding.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        loss: Callable[[Tensor, Any], Tensor],
        likelihood: Likelihood,
        *,
        damping: float = 0.03,
        weight_decay: float | Sequence[float] = 0.0,
        damping_every: int = 5,
        damping_floor: float = 1e-8,
        damping_ceiling: float = 1e8,
    ) -> None:
        self.model = model
        self.parameters = list(parameters)
        self.loss = loss
        self.likelihood = likelihood
        self.damping_every = validation.whole("damping_every", damping_every)
        self.damping_floor = validation.real("damping_floor", damping_floor, open_low=True)
        self.damping_ceiling = validation.real("damping_ceiling", damping_ceiling, low=self.damping_floor)
        self.weight_decay = _per_parameter(weight_decay, len(self.parameters))
        self.damping = self._clamped(validation.real("damping", damping, open_low=True))
        self.steps = 0
        self.rejected = 0
        self.skipped = 0
        self.reduction_ratio = math.nan
        self.previous: list[Tensor | None] = self._nothing()
        self._has_agreed = False

    @torch.no_grad()
    def step(
        self,
        evaluate: Evaluate,
        differentiate: Callable[[Tensor, Any, Tensor], Direction],
        precondition: Callable[[list[Tensor | None], float], Direction],
        paused: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, Any]:
        """One step on one batch.

        Args:
            evaluate: the user's closure: one forward pass, returns (outputs, targets). It runs once with gradients, once for
                each direction, and once for the new loss.
            differentiate: given (outputs, targets, loss) runs the backward passes, those for curvature too, and returns the
                gradients of the loss, aligned with parameters. A parameter whose entry is None does not take part.
            precondition: given the gradient of f and a damping for the mean loss's Fisher, returns V, None for parameters that
                K-FAC does not cover. Not called if a gradient is not finite.
            paused: makes a context in which capture hooks are inert.

        Returns:
            loss (before the step, a tensor), lr (alpha), lr_others (beta), momentum (mu), damping (for the next step),
            reduction_ratio, predicted (M(delta)), rejected and skipped (of this step).

        Raises:
            TypeError: if evaluate returns no (outputs, targets).
            ValueError: if it returns outputs without a graph, or others each time.
            RuntimeError: if an operation of the model has no forward derivative.
        """
        before = Snapshot(self.model)
        with torch.enable_grad():
            outputs, targets = outputs_and_targets(evaluate())
            if not outputs.requires_grad:
                raise ValueError(
                    "closure returned outputs without a graph; run the model in it, without torch.no_grad() and detach()"
                )
            loss = self.loss(outputs, targets)
            terms = float(self.likelihood.terms(outputs.detach(), targets))
            if not math.isfinite(float(loss.detach())) or terms <= 0:
                return self._skip(loss, before)
            plain = list(differentiate(outputs, targets, loss))
        outputs, loss = outputs.detach(), loss.detach()
        gradient = self._with_penalty(plain)
        if not all_finite(gradient):
            return self._skip(loss, before)

        names, directions = self._directions(gradient, precondition, terms)
        after = Snapshot(self.model)
        before.restore()
        with paused():
            products = jacobian_products(self.model, evaluate, self.parameters, directions)
        if not self._has_agreed:
            require_agreement(self._slope(outputs, targets), products, plain, directions)
            self._has_agreed = True
        *found, predicted = self._minimum(outputs, targets, terms, gradient, directions, products)
        after.restore()

        self.steps += 1
        self.reduction_ratio = math.nan
        moved, accepted = self._nothing(), predicted == 0
        if -math.inf < predicted < 0:
            moved = combined(found, directions)
            old = self._objective(loss, gradient)
            rounding = ROUNDING * torch.finfo(outputs.dtype).eps * abs(old)
            with paused():
                accepted = self._try(moved, evaluate, gradient, old, predicted, rounding, before, after)
        if accepted:
            self.previous = moved
            self._adapt()
        else:
            before.restore_buffers()
            self.rejected += 1
            self.previous = self._nothing()
            self.damping = self._clamped(self.damping * REJECTION_FACTOR)
        return self._report(loss, dict(zip(names, found, strict=True)), predicted, not accepted)

    def _nothing(self) -> list[Tensor | None]:
        return [None] * len(self.parameters)

    def _with_penalty(self, gradients: Direction) -> list[Tensor | None]:
        return [
            None if g is None else g.detach() + eta * p if eta else g.detach()
            for p, g, eta in zip(self.parameters, gradients, self.weight_decay, strict=True)
        ]

    def _directions(
        self,
        gradient: list[Tensor | None],
        precondition: Callable[[list[Tensor | None], float], Direction],
        terms: float,
    ) -> tuple[list[str], list[list[Tensor | None]]]:
        """Names and tensors of the directions that have any, in the parameters' types."""
        sizes = [p.numel() for p in self.parameters]
        decay = sum(n * eta for n, eta in zip(sizes, self.weight_decay, strict=True)) / max(sum(sizes), 1)
        natural = precondition(list(gradient), self.damping + decay / (1.0 if self.likelihood.reduction == "mean" else terms))
        along: dict[str, list[Tensor | None]] = {"lr": [], "lr_others": [], "momentum": []}
        for p, h, v, delta in zip(self.parameters, gradient, natural, self.previous, strict=True):
            along["lr"].append(None if h is None or v is None else -v.to(p))
            along["lr_others"].append(-h.to(p) if h is not None and v is None else None)
            along["momentum"].append(None if h is None else delta)
        chosen = {name: d for name, d in along.items() if any(x is not None for x in d)}
        return list(chosen), list(chosen.values())

    def _slope(self, outputs: Tensor, targets: Any) -> Tensor:
        """Gradient of the loss with respect to the outputs."""
        with torch.enable_grad():
            leaf = outputs.detach().requires_grad_()
            return torch.autograd.grad(self.loss(leaf, targets), leaf)[0]

    def _minimum(
        self,
        outputs: Tensor,
        targets: Any,
        terms: float,
        gradient: Direction,
        directions: Sequence[Direction],
        products: Sequence[Tensor],
    ) -> list[float]:
        """Coefficients of the directions, and M there: the one wait for the device before the new loss."""
        if not directions:
            return [0.0]
        curved = [self.likelihood.hessian_product(outputs, product, targets) for product in products]
        is_mean = self.likelihood.reduction == "mean"
        ridge = [self.damping * (1.0 if is_mean else terms) + eta for eta in self.weight_decay]
        model = QuadraticModel.build(directions, gradient, products, curved, 1 / terms if is_mean else 1.0, ridge)
        minimum = model.solve()
        return torch.cat([minimum.coefficients, minimum.change[None]]).tolist()

    def _try(
        self,
        moved: list[Tensor | None],
        evaluate: Evaluate,
        gradient: list[Tensor | None],
        old: float,
        predicted: float,
        rounding: float,
        before: Snapshot,
        after: Snapshot,
    ) -> bool:
        """Moves the parameters, and back again unless the objective allows it."""
        pairs = [(p, d, p.clone()) for p, d in zip(self.parameters, moved, strict=True) if d is not None]
        accepted = False
        try:
            for p, d, _ in pairs:
                p.add_(d)
            before.restore()
            new = self._objective(self.loss(*outputs_and_targets(evaluate())), gradient)
            promised = -predicted > rounding
            self.reduction_ratio = (new - old) / predicted if promised else math.nan
            accepted = math.isfinite(new) and not (promised and new > old)
        finally:  # also when the closure raises
            after.restore_generators()
            if accepted:
                after.restore_buffers()  # statistics advance once a step
            else:
                for p, _, copy in pairs:
                    p.copy_(copy)
                before.restore_buffers()
        return accepted

    def _objective(self, loss: Tensor, gradient: list[Tensor | None]) -> float:
        """Loss and the penalty of the parameters that take part."""
        triples = zip(self.parameters, self.weight_decay, gradient, strict=True)
        penalties = [p.double().square().sum() * (eta / 2) for p, eta, g in triples if eta and g is not None]
        return float(sum((x.to(loss.device) for x in penalties), loss.double()))

    def _adapt(self) -> None:
        """The rule of Levenberg and Marquardt (Martens and Grosse 2015, section 6.5)."""
        if self.steps % self.damping_every:
            return
        omega = (19 / 20) ** self.damping_every
        if self.reduction_ratio > 3 / 4:
            self.damping = self._clamped(self.damping * omega)
        elif self.reduction_ratio < 1 / 4:
            self.damping = self._clamped(self.damping / omega)

    def _clamped(self, damping: float) -> float:
        return min(max(damping, self.damping_floor), self.damping_ceiling)

    def _skip(self, loss: Tensor, before: Snapshot) -> dict[str, Any]:
        before.restore_buffers()  # the batch may have brought NaN into running statistics
        self.skipped += 1
        return self._report(loss.detach(), {}, math.nan, False) | {"skipped": True}

    def _report(self, loss: Tensor, coefficients: dict[str, float], predicted: float, rejected: bool) -> dict[str, Any]:
        return {
            "loss": loss,
            "lr": coefficients.get("lr", 0.0),
            "lr_others": coefficients.get("lr_others", 0.0),
            "momentum": coefficients.get("momentum", 0.0),
            "damping": self.damping,
            "reduction_ratio": self.reduction_ratio,
            "predicted": predicted,
            "rejected": rejected,
            "skipped": False,
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs: numbers, and the previous step as a list of tensors (None: no momentum)."""
        return {
            "damping": self.damping,
            "steps": self.steps,
            "rejected": self.rejected,
            "skipped": self.skipped,
            "reduction_ratio": self.reduction_ratio,
            "previous": list(self.previous),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes what `state` gave.

        Raises:
            ValueError: if the state does not fit the parameters; nothing is changed then.
        """
        missing = self.state().keys() - state.keys()
        if missing:
            raise ValueError(f"state of the controller lacks {', '.join(sorted(missing))}; load what its state() gave")
        shapes = [None if d is None else tuple(d.shape) for d in state["previous"]]
        own = [tuple(p.shape) for p in self.parameters]
        if len(shapes) != len(own) or any(s is not None and s != o for s, o in zip(shapes, own, strict=True)):
            raise ValueError(
                f"state has previous steps of shapes {shapes}, but the parameters have {own}; load it for the same model"
            )
        damping = validation.real("damping", state["damping"], open_low=True)
        self.damping = self._clamped(damping)
        self.steps, self.rejected, self.skipped = int(state["steps"]), int(state["rejected"]), int(state["skipped"])
        self.reduction_ratio = float(state["reduction_ratio"])
        self.previous = [
            None if d is None else d.detach().to(p, copy=True) for d, p in zip(state["previous"], self.parameters, strict=True)
        ]


def _per_parameter(weight_decay: float | Sequence[float], count: int) -> list[float]:
    if not isinstance(weight_decay, Sequence):
        return [validation.real("weight_decay", weight_decay)] * count
    if len(weight_decay) != count:
        raise ValueError(f"weight_decay must be a number or one for each of {count} parameters, but has {len(weight_decay)}")
    return [validation.real("weight_decay", eta) for eta in weight_decay]


__all__ = ["REJECTION_FACTOR", "Controller"]
