"""State that all hooks of an engine share: whether passes are captured, and how they are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import runtime

_NONE = -2  # the number of no backward pass
# With stats_fraction="auto", one token in eight is kept, but at least about 1,024 of a pass. Training with an eighth of the
# tokens could not be told from training with all (benchmarks/README.md).
_AUTO_STRIDE, LEAST_ROWS = 8, 1024


def auto_stride(rows: int, least: int) -> int:
    """The n of which stats_fraction="auto" keeps one row in n, so that about `least` are left."""
    # Not by min and max, for each of whose outcomes torch.compile would make a graph.
    stride: int = torch.sym_max(1, torch.sym_min(_AUTO_STRIDE, rows // least))
    return stride


class Gate:
    """State that all hooks of an engine share; torch.compile keeps a graph for each value of `open`.

    Attributes:
        open: whether forward passes are tapped.
        records: whether an eager backward pass through a tap adds statistics.
        counts_terms: whether such a pass counts rows and terms and adds to A. For a GGN only the first column does.
        terms: number of loss terms of the running Fisher pass; None takes it from the shape of a layer's rows.
        weight: the factor, 0 or 1, for the statistics of a compiled pass, which cannot read `records`.
        compiled_terms: `terms` for compiled passes.
        probe: an input of every tap. Asking for its gradient, which is None, runs the backward pass through all taps without
            computing gradients of weights.
        stride: at most one row in `stride` is kept. (torch.compile could not trace a fraction as dynamic.)
        is_auto: whether layers with many tokens choose their stride.
        max_rows: the largest number of rows that a pass keeps for a layer.
        max_kept_bytes: bytes of rows that wait to be summed with those of other layers (see `RowQueue`).
        step: number of the step, which shifts the rows that are kept.
        scaler: the `torch.amp.GradScaler` that scales the loss, if one does.
        scale: its scale as it was when the first statistics of the step were taken.
        saw_loss: whether the loss was sent backward since the last Fisher pass.
        is_unrecorded: whether an eager backward pass of this step was outside of a CUDA graph.
    """

    def __init__(self, device: torch.device | None = None, empirical: bool = True) -> None:
        self.open = True
        self.empirical = empirical
        self.records = empirical
        self.counts_terms = True
        self.terms: int | Tensor | None = None
        self.weight = torch.full((), float(empirical), device=device)
        self.compiled_terms = torch.zeros((), device=device)
        self.probe = torch.zeros((), device=device, requires_grad=True)
        self.stride = 1
        self.is_auto = False
        self.max_rows: int | None = None
        self.max_kept_bytes = 0
        self.step = 0
        self.scaler: Any = None
        self.scale: Tensor | None = None
        self.saw_loss = self.is_unrecorded = False
        self._noticed = _NONE

    def notice(self, task: int) -> None:
        """Records that the eager backward pass with this number runs (-1 outside of one); all its layers call this."""
        if task == self._noticed:
            return
        self._noticed = task if task >= 0 else _NONE
        self.is_unrecorded |= not runtime.is_recording()
        self.saw_loss |= self.empirical or not self.records
        if self.scaler is not None and self.scale is None:
            scale = self.scaler._get_scale_async()
            self.scale = None if scale is None else scale.clone()

    def forget(self) -> None:
        """Resets this after a step, or when its gradients are discarded."""
        self.scale, self.saw_loss, self.is_unrecorded = None, False, False
        self._noticed = _NONE  # a step may be taken inside of a backward pass

    def stride_for(self, rows: int, least: int) -> int:
        """The n of which one row in n is kept.

        Args:
            rows: of the pass.
            least: about as many rows must be left where the stride is chosen here; 0 where it is not.
        """
        stride = auto_stride(rows, least) if self.is_auto and least else self.stride
        return stride if not self.max_rows else max(stride, -(-rows // self.max_rows))
