"""State that all hooks of an engine share: whether passes are captured, and how they are counted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ..kernels import runtime
from ..layers import Rows
from ..warning import warn
from .calls import Call, Calls
from .compiled_calls import in_backward
from .loss_terms import Arithmetic

_NONE = -2  # the number of no backward pass
MOST_PASSES = 1 << 16  # backward passes of a Fisher pass that compiled passes tell apart
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
        is_paused: whether backward passes leave no statistics, either.
        records: whether an eager backward pass through a tap adds statistics.
        counts_terms: whether such a pass counts rows and terms and adds to A. For a GGN only the first column does.
        adds_gradients: whether such a pass adds to G.
        calls: finds the calls of the model and counts their loss terms.
        adds_calls: how several calls make one loss, see `KFAC`; "joint" if the loss is a sum.
        arithmetic: of their loss terms.
        whole: during a Fisher pass, the call that stands for all calls that its outputs come from.
        weight: the factor, 0 or 1, for the statistics of a compiled pass, which cannot read `records`.
        compiled_terms: loss terms of the running Fisher pass, for compiled passes.
        compiled_pass: the number of the running Fisher pass, 0 for the loss, likewise.
        masks: whether rows without a gradient are left out of A in every pass: rows="nonzero".
        may_leave_out: whether labels may leave out rows with rows="auto", for compiled passes, which have a mask or not.
        compiled_rows_out: whether they do in a Fisher pass.
        compiled_examples: the number of labels, if there is one for each example, or 0.
        compiled_by_example: whether compiled passes of convolutions leave out whole examples only. (For single positions they
            make the matrix of all patches, which a graph has or has not.) A graph is made before the first labels are known.
        probe: an input of every tap. Asking for its gradient, which is None, runs the backward pass through all taps without
            computing gradients of weights.
        stride: at most one row in `stride` is kept. (torch.compile could not trace a fraction as dynamic.)
        is_auto: whether layers with many tokens choose their stride.
        max_rows: the largest number of rows that a pass keeps for a layer.
        max_kept_bytes: bytes of rows that wait to be summed with those of other layers (see `RowQueue`).
        step: number of the step, which shifts the rows that are kept.
        scaler: the `torch.amp.GradScaler` that scales the loss, if one does.
        scale: its scale as it was when the first statistics of the step were taken.
        counting: the number of a backward pass that leaves statistics of all weights that it comes through.
        saw_loss: whether the loss was sent backward since the last Fisher pass.
        is_unrecorded: whether an eager backward pass of this step was outside of a CUDA graph.
    """

    def __init__(self, device: torch.device | None = None, empirical: bool = True, calls: Calls | None = None) -> None:
        self.open = True
        self.is_paused = False
        self.empirical = empirical
        self.records = empirical
        self.counts_terms = self.adds_gradients = True
        self.calls = Calls(device=device) if calls is None else calls
        self.adds_calls = "accumulated"
        self.arithmetic = Arithmetic()
        self.whole: Call | None = None
        self.weight = torch.full((), float(empirical), device=device)
        self.compiled_terms = torch.zeros((), device=device)
        self.compiled_pass = torch.zeros((), dtype=torch.long, device=device)
        self.masks = self.may_leave_out = False
        self.compiled_rows_out = torch.zeros((), dtype=torch.bool, device=device)
        self.compiled_examples = torch.zeros((), dtype=torch.int64, device=device)
        self.compiled_by_example = True
        self.probe = torch.zeros((), device=device, requires_grad=True)
        self.stride = 1
        self.is_auto = False
        self.max_rows: int | None = None
        self.max_kept_bytes = 0
        self.step = 0
        self.scaler: Any = None
        self.scale: Tensor | None = None
        self.saw_loss = self.is_unrecorded = False
        self.counting = self._noticed = self._noticed_loss = _NONE
        self._makes_all = True
        self._warned_of_drop = False

    def counts(self, task: int, weight: Tensor, call: Call) -> bool:
        """Whether the eager backward pass with this number leaves statistics of a weight: if it makes the weight's gradient.

        A backward pass that only makes gradients of other tensors, `autograd.grad(output, inputs)`, does not.

        Args:
            task: number of the pass; -1 outside of one.
            weight: as the layer used it in its forward pass.
            call: whose pass it is.
        """
        if self.is_paused:
            return False
        if task != self._noticed:
            self._noticed = task if task >= 0 else _NONE
            self._makes_all = task < 0 or self.whole is not None or _makes(self.probe)
        if not self._makes_all and not _makes(weight):
            return False
        if task != self._noticed_loss:
            self._noticed_loss = task if task >= 0 else _NONE
            self._notice_loss()
        if not self.records:
            return False
        if self._makes_all and task >= 0:
            self.counting = task
        if not call.was_used:
            call.was_used = True
            self.calls.sources.add((self.whole or call.joined or call).source)
        if call.was_dropped and not self._warned_of_drop:
            self._warned_of_drop = True
            warn(
                "zero_grad() threw away the statistics of a backward pass, and now there is another one through the same "
                "forward pass. To keep the statistics of the first one, clear gradients by model.zero_grad(), and run the "
                "second one inside paused() if it is to leave none"
            )
        return True

    def _notice_loss(self) -> None:
        """Notes that a backward pass runs that is the loss's or a Fisher pass."""
        self.is_unrecorded |= not runtime.is_recording()
        self.saw_loss |= self.empirical or not self.records
        if self.scaler is not None and self.scale is None:
            scale = self.scaler._get_scale_async()
            self.scale = None if scale is None else scale.clone()

    def has_mask(self, call: Call | None) -> bool:
        """Whether a pass through a call leaves out rows of A that carry no loss, or may do so; None for a compiled pass."""
        return self.masks or (self.may_leave_out if call is None else call.left_out is not None)

    def masked(self, rows: Rows, call: Call | None, number: Tensor | None = None) -> Rows:
        """The rows with a mask of those that carry a loss; of compiled passes the number of the call is known."""
        if self.masks:
            return rows.with_mask()
        if call is not None:
            flags = call.out_examples
            if flags is not None and len(flags) == rows.examples:
                return rows.with_mask(True, ~flags)
            return rows.with_mask(False, None if call.left_out is None else ~call.left_out)
        if number is not None and self.empirical:
            return rows.with_mask(False, ~self.calls.compiled.left_out(number, rows.gradients[0]))
        gradient = rows.gradients[0]
        is_image = gradient.dim() > 2
        by_example = self.compiled_by_example if is_image else in_backward(self.compiled_examples, gradient) == rows.examples
        return rows.with_mask(by_example, ~in_backward(self.compiled_rows_out, gradient))

    def leave_out(self, call: Call, terms: Tensor, one_each: bool) -> None:
        """Says that rows of a call carry no loss.

        Args:
            call: the call.
            terms: flags of the terms of the loss that labels leave out, in any shape.
            one_each: whether there is one term for each example.
        """
        some = terms.any()
        # The host reads results of a CPU at once. There a batch of which nothing is left out costs nothing.
        call.left_out = some if some.device.type != "cpu" or bool(some) else None
        call.out_examples = terms.flatten() if one_each and call.left_out is not None else None
        self.compiled_by_example = one_each
        self.compiled_rows_out.copy_(some)
        self.compiled_examples.fill_(terms.numel() if one_each else 0)

    def forget_pass(self) -> None:
        """Looks at the running backward pass anew; a step may be taken, or statistics paused, inside of one."""
        self.counting = self._noticed = self._noticed_loss = _NONE

    def forget(self) -> None:
        """Resets this after a step, or when its gradients are discarded."""
        self.scale, self.saw_loss, self.is_unrecorded = None, False, False
        self.forget_pass()
        self.calls.forget()
        self.arithmetic.clear()

    def stride_for(self, rows: int, least: int) -> int:
        """The n of which one row in n is kept.

        Args:
            rows: of the pass.
            least: about as many rows must be left where the stride is chosen here; 0 where it is not.
        """
        stride = auto_stride(rows, least) if self.is_auto and least else self.stride
        return stride if not self.max_rows else max(stride, -(-rows // self.max_rows))


def _makes(leaf: Tensor) -> bool:
    """Whether the running backward pass makes the gradient of a tensor."""
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(leaf).node)
    except RuntimeError:  # autograd.grad was asked for this very tensor
        return True
