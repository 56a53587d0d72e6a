"""Capture of layer inputs and output gradients: a forward hook on each layer, whose identity Function adds to sums in backward.

Of the possible kinds of hooks only this one runs exactly once, with the right values, under checkpointing (both modes),
torch.compile(fullgraph=True), in-place operations after the layer, shared modules and double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..autocast import NoAutocast
from ..layers import Layer
from ..layers.dtensor import local
from .compiled_calls import note_compiled_tap
from .hook_order import LastHook, put_last, runs_before_others
from .inert import InertCopies, remove_inert
from .statistics import Statistics, Use


class Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward adds (input, output gradient) to the layer's statistics."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, probe: Tensor, statistics: Statistics, use: Use) -> Tensor:
        """Returns the output itself, detached: an in-place operation on it stays legal, and no memory is copied."""
        # Only x is saved through autograd. The sums would fail its version check in a second backward pass.
        ctx.save_for_backward(x)
        ctx.statistics, ctx.use = statistics, use
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Adds to the statistics and passes the gradient on."""
        (x,) = ctx.saved_tensors
        # `local` detaches, so that rows that are kept do not keep the graph, nor the call that it belongs to.
        if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():  # create_graph, or backward under autocast
            with torch.no_grad(), NoAutocast():
                ctx.statistics.add(local(x), local(gradient), x.requires_grad, ctx.use)
        else:
            ctx.statistics.add(local(x), local(gradient), x.requires_grad, ctx.use)
        return gradient, None, None, None, None


class CompiledTap(torch.autograd.Function):
    """The same inside of a graph of torch.compile, which carries the number of the call in place of the call."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, probe: Tensor, number: Tensor, statistics: Statistics) -> Tensor:
        """Returns the output itself, detached."""
        ctx.save_for_backward(x, number)
        ctx.statistics = statistics
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Adds to the statistics and passes the gradient on."""
        x, number = ctx.saved_tensors
        ctx.statistics.add_compiled(local(x), local(gradient), number)
        return gradient, None, None, None, None


def weight_to_tap(statistics: Statistics, output: Tensor) -> Tensor | None:
    """The layer's weight, if a forward pass is to be captured, and can be; None otherwise."""
    gate = statistics.gate
    if not gate.open:
        return None
    if not torch.is_grad_enabled():
        if not torch.compiler.is_compiling():
            gate.calls.note_ungraded()
        return None
    weight = statistics.layer.weight
    if not output.requires_grad or not weight.requires_grad or weight.device != statistics.device:
        return None
    # Under torch.func the sums would be filled with transformed tensors.
    if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
        return None
    return weight


def tapped(
    output: Tensor, x: Tensor, weight: Tensor, statistics: Statistics, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """The output of a layer with the input x and this weight, with a tap behind it; args and kwargs are those of its call."""
    gate = statistics.gate
    calls = gate.calls
    if torch.compiler.is_compiling():
        note_compiled_tap(calls.compiled.handle)
        return CompiledTap.apply(output, x, gate.probe, calls.compiled.running, statistics)
    call = calls.current or calls.alone(args, kwargs, output)
    if call.watches_first:
        call.enter(statistics.layer, x)
    if call.watches_last:
        call.last = statistics.layer, output.shape
    return Tap.apply(output, x, gate.probe, statistics, (call, weight))


class Hook(InertCopies):
    """Hook of one layer."""

    def __init__(self, statistics: Statistics | None = None) -> None:
        self.statistics = statistics


class CaptureHook(Hook):
    """Forward hook of one layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Taps the output unless nothing can or should be captured; None leaves it as it is."""
        statistics = self.statistics
        if statistics is None or (weight := weight_to_tap(statistics, output)) is None:
            return None
        x = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
        return tapped(output, x, weight, statistics, args, kwargs)


class CastHook(Hook, LastHook):
    """Forward pre-hook of one layer, which casts the input under autocast, as the layer itself would do.

    Autograd then saves one tensor for the layer and the tap. Without it the tap would keep another copy. A pre-hook of others
    must not see the cast input, with which it would compute less precisely. So where one comes after this hook, nothing is cast
    in this call, and from the next one on the order is right.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with the input cast; None leaves them as they are."""
        if self.statistics is None or not args or not self.statistics.gate.open or not torch.is_grad_enabled():
            return None
        x = args[0]
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
            return None
        if runs_before_others(module, self):
            if not torch.compiler.is_compiling():
                put_last(module, self)
            return None
        return (x.to(torch.get_autocast_dtype(x.device.type)), *args[1:])


def attach(layers: list[Layer], statistics: list[Statistics]) -> list[RemovableHandle]:
    """Hooks that fill the statistics, on each module of each layer, unless `capture.attention.attach_functional` makes them."""
    handles: list[RemovableHandle] = []
    for layer, own in zip(layers, statistics, strict=True):
        for use, module in enumerate(layer.modules):
            remove_inert(module, "_forward_hooks", CaptureHook())
            remove_inert(module, "_forward_pre_hooks", CastHook())
            if layer.applies_weight_itself:
                continue
            of_use = own.tied if layer.uses_weight_transposed(use) else own
            if of_use is not None and of_use.layer.autocasts:
                handles.append(module.register_forward_pre_hook(CastHook(of_use)))
            # The first of all, because the forward hooks of others may change the output.
            handles.append(module.register_forward_hook(CaptureHook(of_use), with_kwargs=True, prepend=True))
    return handles
