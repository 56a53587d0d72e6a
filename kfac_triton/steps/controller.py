"""What lr="auto" keeps from one step to the next: damping and momentum (Martens and Grosse 2015, sections 6.5 and 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import validation

# Damping is multiplied by this after a rejected step, which shows that damping is far too low. The rule of Levenberg and
# Marquardt would need 28 steps for this factor.
REJECTION_FACTOR = 4.0

# Keys in the state of parameters: the previous step, and, with the first parameter, the controller's numbers.
PREVIOUS, NUMBERS = "kfac_previous", "kfac_controller"
_NUMBERS = ("damping", "steps", "rejected", "skipped", "reduction_ratio")


class Controller:
    """Adapts damping to how well the quadratic model predicts the objective, and keeps the previous step for momentum.

    Every damping_every steps damping <- omega damping if the reduction ratio rho > 3/4, damping <- damping / omega if
    rho < 1/4, with omega = (19/20)^damping_every. After a rejected step damping is four times as high, and the next step has
    no momentum.

    Args:
        parameters: the parameters that the steps update.
        damping: initial damping.
        damping_every: steps between adaptations of damping.
        damping_floor: the lowest damping.
        damping_ceiling: the highest damping.

    Attributes:
        damping: of the next step.
        steps: steps taken or rejected.
        rejected: steps rejected.
        skipped: batches without a finite loss and gradient.
        reduction_ratio: rho of the last step, NaN where the predicted change was not above rounding.
        previous: the last step, a tensor for each parameter that it moved.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if an argument is outside its range.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        damping: float = 0.03,
        damping_every: int = 5,
        damping_floor: float = 1e-8,
        damping_ceiling: float = 1e8,
    ) -> None:
        self._parameters = list(parameters)
        self.damping_every = validation.whole("damping_every", damping_every)
        self.damping_floor = validation.real("damping_range[0]", damping_floor, open_low=True)
        self.damping_ceiling = validation.real("damping_range[1]", damping_ceiling, low=self.damping_floor)
        self.damping = self._clamped(validation.real("damping", damping, open_low=True))
        self.steps = self.rejected = self.skipped = 0
        self.reduction_ratio = math.nan
        self.previous: list[Tensor | None] = [None] * len(self._parameters)

    def accept(self, step: list[Tensor | None], reduction_ratio: float) -> None:
        """Counts a step that was taken, and adapts damping by the rule of Levenberg and Marquardt (section 6.5)."""
        self.steps += 1
        self.previous, self.reduction_ratio = step, reduction_ratio
        if self.steps % self.damping_every:
            return
        omega = (19 / 20) ** self.damping_every
        if reduction_ratio > 3 / 4:
            self.damping = self._clamped(self.damping * omega)
        elif reduction_ratio < 1 / 4:
            self.damping = self._clamped(self.damping / omega)

    def reject(self, reduction_ratio: float) -> None:
        """Counts a step that was undone; the next one has more damping and no momentum."""
        self.steps += 1
        self.rejected += 1
        self.previous, self.reduction_ratio = [None] * len(self._parameters), reduction_ratio
        self.damping = self._clamped(self.damping * REJECTION_FACTOR)

    def _clamped(self, damping: float) -> float:
        return min(max(damping, self.damping_floor), self.damping_ceiling)

    def export(self) -> list[dict[str, Tensor]]:
        """The entries for the state of each parameter."""
        # Every parameter has a previous step from the start, zero before the first: all checkpoints have the same keys.
        result = [
            {PREVIOUS: torch.zeros_like(p) if previous is None else previous.clone()}
            for p, previous in zip(self._parameters, self.previous, strict=True)
        ]
        result[0][NUMBERS] = torch.tensor([float(getattr(self, name)) for name in _NUMBERS], dtype=torch.float64)
        return result

    def restore(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Restores what `export` returned. A checkpoint of a fixed learning rate has no numbers: then nothing changes.

        Raises:
            ValueError: if a previous step does not fit its parameter; nothing is changed then.
        """
        if not states or NUMBERS not in states[0]:
            return
        shapes = [tuple(state[PREVIOUS].shape) if PREVIOUS in state else None for state in states]
        own = [tuple(p.shape) for p in self._parameters]
        if len(shapes) != len(own) or any(s is not None and s != o for s, o in zip(shapes, own, strict=True)):
            raise ValueError(
                f"state has previous steps of shapes {shapes}, but the parameters have {own}; load it for the same model"
            )
        numbers = dict(zip(_NUMBERS, states[0][NUMBERS].tolist(), strict=True))
        self.damping = self._clamped(validation.real("damping", numbers["damping"], open_low=True))
        self.steps, self.rejected, self.skipped = (int(numbers[name]) for name in ("steps", "rejected", "skipped"))
        self.reduction_ratio = numbers["reduction_ratio"]
        found = [state.get(PREVIOUS) for state in states]
        self.previous = [
            None if x is None or not bool(x.any()) else x.detach().to(p, copy=True)
            for x, p in zip(found, self._parameters, strict=True)
        ]
