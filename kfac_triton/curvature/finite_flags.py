"""Which parameters have a finite gradient, where only the device knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels.device_tables import device_table


class FiniteFlags:
    """Flags on a device, and for each parameter those that must all be true.

    Args:
        flags: bool (flags,).
        places: parameter -> indices of its flags.
    """

    def __init__(self, flags: Tensor, places: Mapping[Any, tuple[int, ...]]) -> None:
        self.flags = flags
        self._places = dict(places)

    @classmethod
    def of(cls, flags: Mapping[Any, Tensor]) -> FiniteFlags:
        """From one flag, a scalar, for each parameter; they may be on several devices."""
        home = next((flag.device for flag in flags.values()), torch.device("cpu"))
        vector = torch.stack([x.to(home) for x in flags.values()]) if flags else torch.zeros(0, dtype=torch.bool, device=home)
        return cls(vector, {p: (i,) for i, p in enumerate(flags)})

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._places

    def __getitem__(self, parameter: Any) -> Tensor:
        return self.gathered([parameter], self.flags.device)[0]

    def add(self, parameters: Iterable[Any], flags: Tensor) -> None:
        """Adds a flag for each of these parameters, which may have some already."""
        start = len(self.flags)
        self.flags = torch.cat([self.flags, flags.to(self.flags.device)])
        for i, parameter in enumerate(parameters, start):
            self._places[parameter] = (*self._places.get(parameter, ()), i)

    def gathered(self, parameters: Sequence[Any], device: torch.device) -> Tensor:
        """Whether the gradient of each of these parameters is finite, (parameters,)."""
        places = [self._places[p] for p in parameters]
        most = max(map(len, places), default=1)
        table = device_table(tuple((*row, *row[:1] * (most - len(row))) for row in places), self.flags.device)
        found = self.flags[table[:, 0]] if most == 1 else self.flags[table].all(1)
        return found.to(device)
