"""Capture of layer inputs and output gradients: one forward hook per layer, whose identity Function adds to sums in backward.

Of all the hook idioms only this one fires exactly once, with the right values, under checkpointing (both modes),
torch.compile(fullgraph=True), in-place operations after the layer, shared modules and double backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layers import Layer
from ..layers.dtensor import local
from .statistics import Statistics


class Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward adds (input, output gradient) to the layer's statistics."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, probe: Tensor, statistics: Statistics) -> Tensor:
        """Returns the output itself, detached: an in-place operation on it stays legal, and no memory is copied."""
        # Only x is saved through autograd. The sums would fail its version check in a second backward pass.
        ctx.save_for_backward(x)
        ctx.statistics = statistics
        return output.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """Adds to the statistics and hands the gradient on."""
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            ctx.statistics.add(local(x), local(gradient), owned_by_autograd=x.requires_grad)
        return gradient, None, None, None


def should_tap(statistics: Statistics | None, output: Tensor, weight: Tensor) -> bool:
    """Whether a forward pass is to be captured, and can be."""
    if statistics is None or not statistics.gate.open or not torch.is_grad_enabled():
        return False
    if not output.requires_grad or not weight.requires_grad or weight.device != statistics.device:
        return False
    # Under torch.func the sums would be filled with transformed tensors.
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None


class InertCopies:
    """Copies and pickles are made without arguments, and inert, so a copied model drags nothing along."""

    def __deepcopy__(self, memo: dict[int, Any]) -> InertCopies:
        return type(self)()

    def __reduce__(self) -> tuple[type[InertCopies], tuple[()]]:
        return type(self), ()


class Hook(InertCopies):
    """Hook of one layer."""

    def __init__(self, statistics: Statistics | None = None) -> None:
        self.statistics = statistics


class CaptureHook(Hook):
    """Forward hook of one layer."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Taps the output unless nothing can or should be captured; None leaves it as it is."""
        statistics = self.statistics
        if statistics is None or not should_tap(statistics, output, statistics.layer.weight):
            return None
        x = args[0] if args else kwargs["input"] if "input" in kwargs else next(iter(kwargs.values()))
        return Tap.apply(output, x, statistics.gate.probe, statistics)


class CastHook(Hook):
    """Forward pre-hook of one layer, which does under autocast what the layer would do: it casts the input.

    Autograd then saves one tensor for both. The layer's own cast would be out of reach, and a tap would keep another copy.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """The arguments with the input cast; None leaves them as they are."""
        if self.statistics is None or not args or not self.statistics.gate.open or not torch.is_grad_enabled():
            return None
        x = args[0]
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or not torch.is_autocast_enabled(x.device.type):
            return None
        return (x.to(torch.get_autocast_dtype(x.device.type)), *args[1:])


def remove_inert(module: nn.Module, kind: str, like: Any) -> None:
    """Drops hooks that copying or pickling has left on a module, those equal to `like`."""
    hooks = getattr(module, kind)
    for key in [key for key, hook in hooks.items() if type(hook) is type(like) and vars(hook) == vars(like)]:
        del hooks[key]
        getattr(module, f"{kind}_with_kwargs").pop(key, None)  # in another process the number may be given to another hook


def attach(layers: list[Layer], statistics: list[Statistics]) -> list[RemovableHandle]:
    """Hooks that feed the statistics, one for each module of a layer (`capture.attention.attach_functional` has the others)."""
    for layer in layers:
        for module in layer.modules:
            remove_inert(module, "_forward_hooks", CaptureHook())
            remove_inert(module, "_forward_pre_hooks", CastHook())
    pairs = [
        (module, own.tied if layer.uses_weight_transposed(use) else own)
        for layer, own in zip(layers, statistics, strict=True)
        if not layer.applies_weight_itself
        for use, module in enumerate(layer.modules)
    ]
    casts = [
        module.register_forward_pre_hook(CastHook(own)) for module, own in pairs if own is not None and own.layer.autocasts
    ]
    return casts + [module.register_forward_hook(CaptureHook(own), with_kwargs=True) for module, own in pairs]
