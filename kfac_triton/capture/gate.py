"""One switch for all hooks of an engine: whether passes are captured, and how they are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels import runtime


class Gate:
    """One switch for every hook of an engine; torch.compile keeps a graph for each position of `open`.

    Attributes:
        open: whether forward passes are tapped.
        records: whether an eager backward pass through a tap leaves statistics.
        counts_terms: whether such a pass counts rows and terms and adds to A. Of the columns of a GGN only the first does.
        terms: loss terms of the Fisher pass that runs; None counts them by the shapes of a layer's rows.
        weight: what a compiled pass, which cannot ask `records`, multiplies its statistics by: 0 or 1.
        compiled_terms: `terms` for compiled passes.
        probe: requires a gradient and gets none: asking for it runs a backward pass through all taps, and past all weights.
        stride: at most one row in `stride` is taken. (torch.compile could not trace a fraction as dynamic.)
        max_rows: most rows that a pass takes of a layer.
        step: shifts the rows that are taken.
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
        self.max_rows: int | None = None
        self.step = 0
        self.scaler: Any = None
        self.scale: Tensor | None = None
        self.saw_loss = self.is_unrecorded = False

    def notice(self) -> None:
        """Takes note of an eager backward pass."""
        self.is_unrecorded |= not runtime.is_recording()
        self.saw_loss |= self.empirical or not self.records
        if self.scaler is not None and self.scale is None:
            scale = self.scaler._get_scale_async()
            self.scale = None if scale is None else scale.clone()

    def forget(self) -> None:
        """The step is over, or its gradients were thrown away."""
        self.scale, self.saw_loss, self.is_unrecorded = None, False, False

    def stride_for(self, rows: int) -> int:
        """One row in how many is taken."""
        return self.stride if not self.max_rows else max(self.stride, -(-rows // self.max_rows))
