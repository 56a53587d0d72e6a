"""Capture of layer inputs and output gradients: one forward hook a layer, whose identity Function adds to sums in backward.

Of all the hook idioms only this one fires exactly once, with the right values, under checkpointing (both modes),
torch.compile(fullgraph=True), in-place operations after the layer, shared modules and double backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .kernels import ops
from .layers import Layer, Rows


class Gate:
    """One switch for every hook of an engine; torch.compile keeps a graph for each position."""

    def __init__(self) -> None:
        self.open = True


class Shared(NamedTuple):
    """One layer's part of what all layers share, so that one operation clears it for all.

    Attributes:
        counts: rows of A and loss terms of compiled passes, (2,): they may not touch Python numbers.
        beta: weight of what a sum holds when the next pass comes, one a sum. With zero it is overwritten, never cleared.
    """

    counts: Tensor
    beta: Tensor


class Statistics:
    """What backward passes left of one layer since the last step.

    A pass is summed at once, in buffers of the factors' size. Where kernels take many layers in one launch, a pass whose rows
    take no more memory than those buffers waits for the step instead, and goes straight into the factors.

    Attributes:
        sums: per group the sum of a a^T, then per group that of g g^T.
        passes: rows of the passes that wait.
        summed: whether an eager pass was summed.
        compiled_counts: rows of A and loss terms of compiled passes, (2,).
        eager_counts: those of eager passes.
    """

    def __init__(self, layer: Layer, gate: Gate, sums: list[Tensor], shared: Shared, backend: str, may_wait: bool) -> None:
        self.layer = layer
        self.gate = gate
        self.sums = sums
        self.passes: list[Rows] = []
        self.summed = False
        self.compiled_counts = shared.counts
        self.eager_counts = [0, 0]
        self.ones_column = [layer.has_bias] * layer.groups + [False] * layer.groups
        self._backend = backend
        self._may_wait = may_wait
        self._alpha = torch.ones_like(shared.beta)
        self._beta = shared.beta
        self._last_backward = -1

    @property
    def counts(self) -> Tensor:
        """Rows of A and loss terms of all passes, (2,)."""
        return self.compiled_counts + torch.tensor(self.eager_counts, device=self.compiled_counts.device)

    def add(self, x: Tensor, gradient: Tensor, is_ours: bool = False) -> None:
        """Adds one backward pass through the layer.

        Args:
            x: input of the module.
            gradient: with respect to its output.
            is_ours: whether nobody but autograd holds x; a batch that the user may overwrite before the step cannot wait.
        """
        rows = self.layer.rows(x, gradient)
        if torch.compiler.is_compiling():  # cannot tell a second call in one backward pass, and counts every one
            self._sum(rows)
            self.compiled_counts[0].add_(rows.input_count)
            self.compiled_counts[1].add_(rows.terms)
            return
        if is_ours and self._may_wait and _bytes(rows.inputs + rows.gradients) <= _bytes(self.sums):
            self.passes.append(rows)
        else:
            self._sum(rows)
            self.summed = True
        self.eager_counts[0] += rows.input_count
        if self._is_new_backward():
            self.eager_counts[1] += rows.terms

    def clear(self) -> None:
        """Forgets everything, but for what it shares."""
        self.eager_counts = [0, 0]
        self.passes = []
        self.summed = False

    def _sum(self, rows: Rows) -> None:
        sources, windows = rows.inputs + rows.gradients, rows.windows
        ops.covariance_ema(self.sums, sources, self._alpha, self._beta, self.ones_column, windows, backend=self._backend)
        self._beta.fill_(1.0)

    def _is_new_backward(self) -> bool:
        """Whether this is the module's first call in the running backward pass; a second one sees the same loss terms again."""
        backward = torch._C._current_graph_task_id()
        is_new = backward != self._last_backward
        self._last_backward = backward
        return is_new


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _local(tensor: Tensor) -> Tensor:
    """The rank's own part of a DTensor."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward adds (input, output gradient) to the layer's statistics."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
        """Returns the output itself, detached: an in-place operation on it stays legal, and no memory is copied."""
        # Only x is saved through autograd. The sums would fail its version check in a second backward pass.
        ctx.save_for_backward(x)
        ctx.statistics = statistics
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Adds to the statistics and hands the gradient on."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.statistics.add(_local(x), _local(gradient), is_ours=x.requires_grad)
        return gradient, None, None


class CaptureHook:
    """Forward hook of one layer. Copies and pickles of it are inert, so a copied model drags nothing along."""

    def __init__(self, statistics: Statistics | None) -> None:
        self.statistics = statistics

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Taps the output unless nothing can or should be captured; None leaves it as it is."""
        statistics = self.statistics
        if statistics is None or not statistics.gate.open or not torch.is_grad_enabled():
            return None
        if not output.requires_grad or not module.weight.requires_grad:
            return None
        if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
            return None  # under torch.func the sums would be filled with transformed tensors
        return Tap.apply(output, args[0] if args else kwargs["input"], statistics)

    def __deepcopy__(self, memo: dict[int, Any]) -> CaptureHook:
        return CaptureHook(None)

    def __reduce__(self) -> tuple[type[CaptureHook], tuple[None]]:
        return CaptureHook, (None,)


__all__ = ["CaptureHook", "Gate", "Statistics", "Tap"]
