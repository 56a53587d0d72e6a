"""Capture for modules whose own forward applies weights by `F.linear`, so that no module has the layer's input and output.

`F.multi_head_attention_forward` does that. The query is passed to it as a tensor subclass, whose `__torch_function__` runs it
under a mode that sees every `F.linear`. Nothing global is set outside of a `with`, so an exception, an early stop of
checkpointing or a KeyboardInterrupt leaves nothing behind, and calls may be nested.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from ..layers import Layer
from ..warning import warn
from .calls import Call
from .hook_order import LastHook, put_last, runs_before_others
from .hooks import Tap, weight_to_tap
from .inert import remove_inert
from .statistics import Statistics, Use


class _Split:
    """Replaces the statistics of one layer in a `Tap` by those of several, each with its columns of the output."""

    def __init__(self, members: Sequence[tuple[slice, Statistics]], call: Call) -> None:
        self._members = [(columns, own, (call, own.layer.weight)) for columns, own in members]

    def add(self, x: Tensor, gradient: Tensor, owned_by_autograd: bool, use: Use) -> None:
        """See `Statistics.add`."""
        for columns, statistics, own in self._members:
            statistics.add(x, gradient[..., columns], owned_by_autograd, own)


class _Watch(TorchFunctionMode):
    """Taps the results of `F.linear` with the weight of one of the layers, or with whole rows of it.

    Args:
        statistics: those of the layers.
        batch: examples of the call; an input (positions * batch, n) is passed on as (positions, batch, n).
    """

    def __init__(self, statistics: Sequence[Statistics], batch: int) -> None:
        super().__init__()
        self._statistics = statistics
        self._batch = batch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return output
        x, weight = args[:2]
        members = []
        for statistics in self._statistics:
            columns = _columns(statistics.layer, weight)
            if columns is not None and weight_to_tap(statistics, output) is not None:
                members.append((columns, statistics))
        if not members:
            return output
        if x.dim() == 2:
            x = x.reshape(len(x) // max(1, self._batch), self._batch, x.shape[1])
        first = members[0][1]
        call = first.gate.calls.alone(args, kwargs or {}, output)
        call.last = first.layer, output.shape
        return Tap.apply(output, x, first.gate.probe, _Split(members, call), (call, first.layer.weight))


def _columns(layer: Layer, used: Tensor) -> slice | None:
    """The columns of the output of `F.linear` that belong to the layer; None unless all its rows of the weight are used."""
    weight = layer.weight
    first: int | torch.SymInt = 0  # as PyTorch types strides from 2.14 on
    if used is not weight:
        # A slice is recognized by the tensor that it is a view of, because addresses repeat once memory is freed.
        if used._base is None or used._base is not (weight if weight._base is None else weight._base):
            return None
        offset = used.storage_offset() - weight.storage_offset()
        if used.shape[1:] != weight.shape[1:] or used.stride() != weight.stride() or offset % weight.stride(0):
            return None
        first = offset // weight.stride(0)
    rows = layer.part_of(weight) or slice(0, len(weight))
    if rows.start < first or rows.stop > first + len(used):
        return None
    return slice(rows.start - first, rows.stop - first)


@functools.cache
def _body(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of torch without its dispatch to tensor subclasses and modes, which would not end while a mode is active."""
    assert isinstance(function, types.FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class _Marked(Tensor):
    """The query on its way to `F.multi_head_attention_forward`; other operations on it return plain tensors.

    Attributes:
        plain: the query.
        watch: the mode to run the function under.
    """

    plain: Tensor
    watch: _Watch

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        marked = [x for x in (*args, *kwargs.values()) if isinstance(x, cls)]
        args = tuple(x.plain if isinstance(x, cls) else x for x in args)
        kwargs = {name: x.plain if isinstance(x, cls) else x for name, x in kwargs.items()}
        if func is F.multi_head_attention_forward and marked:
            with marked[0].watch:
                return _body(func)(*args, **kwargs)
        result = func(*args, **kwargs)
        return _mark(result, marked[0].watch) if marked and func is Tensor.transpose else result


def _mark(x: Tensor, watch: _Watch) -> _Marked:
    marked = x.detach().as_subclass(_Marked)
    marked.plain, marked.watch = x, watch
    return marked


class AttentionHook(LastHook):
    """Forward pre-hook of nn.MultiheadAttention: marks the query.

    A pre-hook of others that ran after this one could replace the marked query, or pass it to an autograd Function, which would
    not see the graph behind it. `BeginHook` puts the hooks in order before the model's call reaches the attention.

    Args:
        statistics: those of the module's projections.
    """

    def __init__(self, statistics: Sequence[Statistics] = ()) -> None:
        self.statistics = statistics

    def __call__(
        self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the query marked, unless nothing can or should be captured; None leaves them as they are."""
        if not self.statistics or not self.statistics[0].gate.open or not torch.is_grad_enabled():
            return None
        # Dynamo cannot trace methods written in Python (unflatten) under a mode; under torch.func nothing is captured at all.
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return None
        query = args[0] if args else kwargs["query"]
        if type(query) not in (Tensor, nn.Parameter) or query.is_nested:
            return None
        if runs_before_others(module, self):
            put_last(module, self)
            names = ", ".join(repr(own.layer.name) for own in self.statistics)
            warn(
                f"this forward pass leaves no statistics of layers {names}, but later ones do: a forward pre-hook was "
                "registered on their attention module after the optimizer was made, and the module was called alone, or the "
                "hook was registered inside of the model's call. Register it before the optimizer is made"
            )
            return None
        batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
        if query.dim() == 2:
            self.statistics[0].gate.calls.enter_unbatched(query)
        marked = _mark(query, _Watch(self.statistics, batch))
        # In every argument that it is, because the forward pass compares query, key and value by identity.
        marks = tuple(marked if x is query else x for x in args)
        return marks, {name: marked if x is query else x for name, x in kwargs.items()}


def attach_functional(layers: list[Layer], statistics: list[Statistics]) -> list[RemovableHandle]:
    """Hooks that fill the statistics of layers whose module applies the weight itself, one for all layers of a module."""
    members: dict[nn.Module, list[Statistics]] = defaultdict(list)
    for layer, own in zip(layers, statistics, strict=True):
        if layer.applies_weight_itself:
            members[layer.module].append(own)
    for module in members:
        remove_inert(module, "_forward_pre_hooks", AttentionHook())
    return [module.register_forward_pre_hook(AttentionHook(own), with_kwargs=True) for module, own in members.items()]
