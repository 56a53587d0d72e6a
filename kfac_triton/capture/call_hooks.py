"""Hooks that tell where calls of the model begin and end: on each module that contains covered layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..layers import Layer
from ..layers.hf_labels import is_hugging_face
from .gate import Gate
from .hook_order import put_last
from .inert import InertCopies, remove_inert


class _CallHook(InertCopies):
    def __init__(self, gate: Gate | None = None, has_labels: bool = False, functional: Sequence[nn.Module] = ()) -> None:
        self.gate, self.has_labels, self.functional = gate, has_labels, functional


class BeginHook(_CallHook):
    """Forward pre-hook. Without gradients, nothing is captured, and there is no call."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a call, unless one runs already."""
        gate = self.gate
        if gate is None:
            return
        outermost = gate.calls.outermost
        if outermost is module:
            gate.calls.begin_again()
            outermost = gate.calls.outermost
            if outermost is module:
                return
        if outermost is not None and not self.has_labels:  # inside of a call, as usual
            return
        if not gate.open or not torch.is_grad_enabled():
            return
        # Under torch.func the arguments are of another batch, and nothing is captured.
        if not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None:
            return
        if gate.calls.current is None and not torch.compiler.is_compiling():
            for other in self.functional:
                if other is not module:  # whose hooks run already, in the order that they had
                    put_last(other)
        gate.calls.begin(module, args, kwargs)
        if self.has_labels:
            gate.calls.read_labels(module, args, kwargs)


class EndHook(_CallHook):
    """Forward hook, which also runs after an exception."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Ends the call, if the module has begun it."""
        if self.gate is not None and self.gate.calls.outermost is module:
            self.gate.calls.end(args, kwargs, output)


def _run_eagerly() -> None:
    """Keeps torch.compile from making graphs of these hooks alone.

    It would where torch.compile(module) runs the module's own hooks, before it begins to trace. As parts of a larger graph they
    are traced all the same.
    """
    try:
        from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
    except ImportError:  # then there are two small graphs more
        return
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for hook in (BeginHook, EndHook):
        set_code_exec_strategy(hook.__call__.__code__, skip)


def attach_calls(model: nn.Module, layers: Sequence[Layer], gate: Gate) -> list[RemovableHandle]:
    """Hooks on each module that contains covered layers; a layer that is called alone is its own call without any."""
    covered = {id(module) for layer in layers for module in layer.modules}
    modules = list(dict.fromkeys(layer.module for layer in layers if layer.applies_weight_itself))
    functional = {id(module) for module in modules}
    handles = []
    _run_eagerly()
    for module in _containers(model, covered | functional, functional):
        remove_inert(module, "_forward_pre_hooks", BeginHook())
        remove_inert(module, "_forward_hooks", EndHook())
        has_labels = is_hugging_face(module)
        # The first of all hooks, so that the arguments are those of the user; the last, so that all layers have run.
        begin = BeginHook(gate, has_labels, modules)
        handles.append(module.register_forward_pre_hook(begin, prepend=True, with_kwargs=True))
        handles.append(module.register_forward_hook(EndHook(gate, has_labels), with_kwargs=True, always_call=True))
    return handles


def _containers(model: nn.Module, covered: set[int], functional: set[int]) -> list[nn.Module]:
    """The modules that contain covered layers, and those whose several weights are layers."""
    found: dict[int, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) not in covered:
            continue
        if id(module) in functional:
            found[id(module)] = module
        parts = name.split(".") if name else []
        parent = model
        for part in parts:
            found[id(parent)] = parent
            parent = parent._modules[part]  # type: ignore[assignment]
    return list(found.values())
