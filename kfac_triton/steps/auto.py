"""lr="auto": the controller's wishes, as calls of the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..fisher.losses import likelihood_of
from .controller import Controller

if TYPE_CHECKING:
    from ..engine import Engine
    from ..settings import Settings

# Keys in the state of parameters: the step before, and, with the first of them, the controller's numbers.
PREVIOUS, NUMBERS = "kfac_previous", "kfac_controller"
_NUMBERS = ("damping", "steps", "rejected", "skipped", "reduction_ratio")


def auto_settings(lr: Any, settings: Settings, **options: bool) -> Settings:
    """Settings for lr="auto": no KL clip, and the reduction of the loss that it evaluates.

    Raises:
        TypeError: if lr is another string.
        ValueError: if one of the options is set, which it does not have.
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


class AutoStep:
    """Steps whose length, momentum and damping the controller chooses (Martens and Grosse 2015).

    Args:
        model: the module to train.
        engine: K-FAC of it.
        parameters: those of all groups, in order.
        weight_decay: L2 penalty, one a parameter.
        damping_every: steps between adaptations of damping.
        damping_range: the least and the highest damping.

    Raises:
        TypeError, ValueError: if the loss is none that can be evaluated, damping is no number, or a value is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        engine: Engine,
        parameters: Sequence[nn.Parameter],
        weight_decay: Sequence[float],
        damping_every: int,
        damping_range: tuple[float, float],
    ) -> None:
        settings = engine.settings
        loss = settings.loss
        if loss is None or not callable(loss):
            raise ValueError(
                f"lr is 'auto', which evaluates the loss itself: pass loss=nn.CrossEntropyLoss(), say, but it is {loss!r} (a "
                "Likelihood of your own also needs __call__(outputs, targets))"
            )
        if callable(settings.damping):
            raise ValueError("lr is 'auto', which adapts damping by itself: pass a number to begin with, not a function")
        if not isinstance(damping_range, (tuple, list)) or len(damping_range) != 2:
            raise TypeError(f"damping_range must be a pair of numbers, but is {damping_range!r}")
        self._engine = engine
        self._model = model
        self._parameters = list(parameters)
        self.controller = Controller(
            model,
            self._parameters,
            loss,
            likelihood_of(loss),
            damping=settings.damping,
            weight_decay=weight_decay,
            damping_every=damping_every,
            damping_floor=damping_range[0],
            damping_ceiling=damping_range[1],
        )
        self.report: dict[str, Any] = {}

    def arguments(self) -> dict[str, Any]:
        """What `from_arguments` makes another from."""
        controller = self.controller
        bounds = controller.damping_floor, controller.damping_ceiling
        return {"damping_every": controller.damping_every, "damping_range": bounds, "states": self.export()}

    @classmethod
    def from_arguments(
        cls,
        model: nn.Module,
        engine: Engine,
        parameters: Sequence[nn.Parameter],
        weight_decay: Sequence[float],
        arguments: dict[str, Any],
    ) -> AutoStep:
        """One that goes on where another stood, with more parameters, perhaps, behind those that it had."""
        other = cls(model, engine, parameters, weight_decay, arguments["damping_every"], arguments["damping_range"])
        states = arguments["states"]
        other.restore(states + [{}] * (len(parameters) - len(states)))
        return other

    def step(self, closure: Callable[[], Any] | None, weight_decay: Sequence[float]) -> Tensor:
        """One step, with these L2 penalties; returns the loss before it.

        Raises:
            TypeError: if there is no closure.
        """
        if closure is None:
            raise TypeError(
                "lr is 'auto', so step needs a closure that runs the model and returns (outputs, targets): "
                "optimizer.step(lambda: (model(inputs), targets))"
            )
        self._engine.require_open()
        self.controller.weight_decay = list(weight_decay)
        try:
            self.report = self.controller.step(closure, self._differentiate, self._precondition, self._engine.paused)
        finally:
            # Of a step that was skipped, or that an error in the closure ended, nothing may stay.
            self._engine.forget_statistics()
        loss: Tensor = self.report["loss"]
        return loss

    def _differentiate(self, outputs: Tensor, targets: Any, loss: Tensor) -> list[Tensor | None]:
        for p in self._parameters:
            p.grad = None
        self._engine.accumulate_fisher(outputs, targets)
        loss.backward()
        return [p.grad for p in self._parameters]

    def _precondition(self, gradient: list[Tensor | None], damping: float) -> list[Tensor | None]:
        for p, g in zip(self._parameters, gradient, strict=True):
            p.grad = g
        self._engine.change(damping=damping)
        updates = self._engine.precondition(lambda _: 0.0)
        return [updates.get(p) for p in self._parameters]

    def diagnostics(self) -> dict[str, Any]:
        """Of the last step: "learning_rate", "momentum", "reduction_ratio", "predicted", and "rejected_steps" so far."""
        report = self.report
        return {
            "learning_rate": report.get("lr", 0.0),
            "momentum": report.get("momentum", 0.0),
            "reduction_ratio": self.controller.reduction_ratio,
            "predicted": report.get("predicted", 0.0),
            "rejected_steps": self.controller.rejected,
            "skipped_steps": self.controller.skipped,
        }

    def export(self) -> list[dict[str, Tensor]]:
        """What belongs into the state of each parameter."""
        state = self.controller.state()
        # Every parameter has one from the start, zero where there was no step: a checkpoint has the same keys at any time.
        result = [
            {PREVIOUS: torch.zeros_like(p) if previous is None else previous.clone()}
            for p, previous in zip(self._parameters, state["previous"], strict=True)
        ]
        result[0][NUMBERS] = torch.tensor([float(state[name]) for name in _NUMBERS], dtype=torch.float64)
        return result

    def restore(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Takes what `export` gave; without the numbers (a checkpoint of fixed learning rates) it begins anew.

        Raises:
            ValueError: if a step before does not fit its parameter.
        """
        if not states or NUMBERS not in states[0]:
            return
        numbers = dict(zip(_NUMBERS, states[0][NUMBERS].tolist(), strict=True))
        found = [state.get(PREVIOUS) for state in states]
        pairs = zip(found, self._parameters, strict=True)
        previous = [x.to(p.device, copy=True) if x is not None and bool(x.any()) else None for x, p in pairs]
        self.controller.load({**numbers, "previous": previous})
