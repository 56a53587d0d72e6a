"""Capture of layer inputs and output gradients: one forward hook a layer, whose identity Function adds to sums in backward.

Of all the hook idioms only this one fires exactly once, with the right values, under checkpointing (both modes),
torch.compile(fullgraph=True), in-place operations after the layer, shared modules and double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .kernels import ops
from .layers import Layer


class Gate:
    """One switch for every hook of an engine; torch.compile keeps a graph for each position."""

    def __init__(self) -> None:
        self.open = True


class Statistics:
    """Running sums of a a^T and g g^T of one layer since the last step, in buffers that backward writes to.

    Attributes:
        sums: per group the sum of a a^T, then per group that of g g^T.
        counts: rows of A and loss terms behind the sums, a tensor (2,): a compiled backward may not touch Python numbers.
    """

    def __init__(self, layer: Layer, gate: Gate, padded: tuple[int, int], dtype: torch.dtype) -> None:
        device = layer.weight.device
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        self.layer = layer
        self.gate = gate
        sizes = [padded[0]] * layer.groups + [padded[1]] * layer.groups
        self.sums = [torch.zeros(size, size, **options) for size in sizes]
        self.counts = torch.zeros(2, device=device)
        self._alpha = torch.ones(len(sizes), **options)
        self._beta = torch.zeros(len(sizes), **options)  # zero: the next pass overwrites, so nobody has to clear the sums
        self._ones_column = [layer.has_bias] * layer.groups + [False] * layer.groups
        self._last_backward = -1

    def add(self, x: Tensor, gradient: Tensor) -> None:
        """Adds one backward pass through the layer."""
        rows = self.layer.rows(x, gradient)
        windows = rows.input_window * len(rows.inputs) + rows.gradient_window * len(rows.gradients)
        ops.covariance_ema(self.sums, rows.inputs + rows.gradients, self._alpha, self._beta, self._ones_column, list(windows))
        self._beta.fill_(1.0)
        self.counts[0].add_(rows.input_count)
        if self._is_new_backward():
            self.counts[1].add_(rows.terms)

    def clear(self) -> None:
        """Forgets the sums; their memory is overwritten by the next backward pass."""
        self._beta.zero_()
        self.counts.zero_()

    def _is_new_backward(self) -> bool:
        """Whether this is the module's first call in the running backward pass; a second one sees the same loss terms again.

        A compiled backward cannot tell, and counts every call.
        """
        if torch.compiler.is_compiling():
            return True
        backward = torch._C._current_graph_task_id()
        is_new = backward != self._last_backward
        self._last_backward = backward
        return is_new


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
            ctx.statistics.add(_local(x), _local(gradient))
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
