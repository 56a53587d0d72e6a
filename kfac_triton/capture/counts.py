"""Numbers of rows, loss terms and passes of one layer between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.device_tables import device_vector


@dataclass
class Counts:
    """Counts for one layer: numbers on the host, or tensors on the device, which may have an entry for each layer.

    Attributes:
        rows: rows of A.
        terms: loss terms.
        taken: rows of A that were kept; fewer than `rows` if they are sampled.
        passes: passes that were summed.
    """

    rows: Any = 0
    terms: Any = 0
    taken: Any = 0
    passes: Any = 0

    def values(self) -> tuple[float, float, float, float]:
        """Those on the host, as a row of a table."""
        return float(self.rows), float(self.terms), float(self.taken), float(self.passes)


class MaskedCount(NamedTuple):
    """The rows of a pass with a mask, which only the device can count.

    Attributes:
        left_out: how many of the taken rows do not count.
        rows: rows of A in the pass.
        taken: those of them that were kept by sampling.
    """

    left_out: Tensor
    rows: int
    taken: int


def counted(passes: Sequence[MaskedCount]) -> Tensor:
    """`Counts` of some passes with a mask, (passes, 4), on their device: sampled rows stand for as many as all others."""
    left_out = torch.stack([one.left_out for one in passes]).double()
    rows = device_vector([one.rows for one in passes], left_out.device, torch.float64)
    taken = device_vector([one.taken for one in passes], left_out.device, torch.float64)
    counting, nothing = taken - left_out, torch.zeros_like(rows)
    return torch.stack([counting * rows / taken.clamp(min=1), nothing, counting, nothing], 1)
