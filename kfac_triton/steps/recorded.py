"""What a recorded step depends on: learning rates, which it reads from tensors, and options, which must stay as they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..engine import Engine


class RecordedRates:
    """The tensors from which recorded steps read the learning rates of the groups.

    Args:
        device: of the parameters.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rates: list[Tensor | None] = []  # one for each group
        self._own: set[int] = set()  # groups whose rate is not a tensor of the user's

    def keep(self, groups: list[dict[str, Any]]) -> None:
        """Puts the rates that a scheduler or the user has assigned into the tensors, and the tensors into the groups."""
        self._rates += [None] * (len(groups) - len(self._rates))
        for i, group in enumerate(groups):
            value, kept = group["lr"], self._rates[i]
            if value is kept or not group.get("capturable", False):
                continue
            if kept is None and isinstance(value, Tensor) and value.device == self._device:
                self._rates[i] = value
                continue
            if kept is None or i not in self._own:
                # The user's tensor is never written: other groups may share it, and new rates may be computed from it.
                kept = self._rates[i] = torch.empty((), device=self._device)
                self._own.add(i)
            kept.copy_(value) if isinstance(value, Tensor) else kept.fill_(value)
            group["lr"] = kept


@dataclass
class Watch:
    """Options and objects of a recorded step, as they were at the last step."""

    objects: list[Any] = field(default_factory=list)

    def differs(self, objects: list[Any]) -> bool:
        """Whether these are others, and notes them. Tensors and settings are compared by identity, numbers by value."""
        same = len(objects) == len(self.objects) and all(
            x is y or (not isinstance(x, Tensor | Engine) and not isinstance(y, Tensor | Engine) and x == y)
            for x, y in zip(objects, self.objects, strict=True)
        )
        self.objects = objects
        return not same
