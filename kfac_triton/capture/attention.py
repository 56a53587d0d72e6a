"""Capture where a module's forward applies weights by `F.linear` itself, so that no module has the layer's input and output.

`F.multi_head_attention_forward` does. On its way there the query is marked: a tensor subclass of which that function asks what
to do. The answer is to run it with every `F.linear` watched. Nothing global is set outside a `with`, so nothing stays behind an
exception, an early stop of checkpointing or a KeyboardInterrupt, and calls may nest.
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
from .hooks import InertCopies, Tap, remove_inert, should_tap
from .statistics import Statistics


class _Split:
    """Stands in a `Tap` for the statistics of several layers, each with its columns of the output."""

    def __init__(self, members: Sequence[tuple[slice, Statistics]]) -> None:
        self._members = members

    def add(self, x: Tensor, gradient: Tensor, owned_by_autograd: bool = False) -> None:
        """See `Statistics.add`."""
        for columns, statistics in self._members:
            statistics.add(x, gradient[..., columns], owned_by_autograd)


class _Watch(TorchFunctionMode):
    """Taps the results of `F.linear` with one of the layers' weights, or whole rows of it.

    Args:
        layers: with their statistics.
        batch: examples of the call; an input (positions * batch, n) is handed on as (positions, batch, n).
    """

    def __init__(self, layers: Sequence[tuple[Layer, Statistics]], batch: int) -> None:
        super().__init__()
        self._layers = layers
        self._batch = batch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is not F.linear:
            return output
        x, weight = args[:2]
        members = []
        for layer, statistics in self._layers:
            columns = _columns(layer, weight)
            if columns is not None and should_tap(statistics, output, layer.weight):
                members.append((columns, statistics))
        if not members:
            return output
        if x.dim() == 2:
            x = x.reshape(len(x) // max(1, self._batch), self._batch, x.shape[1])
        return Tap.apply(output, x, members[0][1].gate.probe, _Split(members))


def _columns(layer: Layer, used: Tensor) -> slice | None:
    """Columns of `F.linear`'s output that are the layer's, if its rows of its weight are among the used ones."""
    weight = layer.weight
    first: int | torch.SymInt = 0  # as PyTorch types strides from 2.14 on
    if used is not weight:
        # A slice is told by what it is a view of: addresses repeat once memory is freed.
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
    """A function of torch that asks no tensor and no mode to take over: with a mode in place it would ask for ever."""
    assert isinstance(function, types.FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    body = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class _Marked(Tensor):
    """The query on its way to `F.multi_head_attention_forward`; what else is done with it gives plain tensors.

    Attributes:
        plain: the query.
        watch: what to run the function under.
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


class AttentionHook(InertCopies):
    """Forward pre-hook of nn.MultiheadAttention: marks the query.

    Args:
        layers: those that the module is made of, with their statistics.
    """

    def __init__(self, layers: Sequence[tuple[Layer, Statistics]] = ()) -> None:
        self.layers = layers

    def __call__(
        self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The arguments with the query marked, unless nothing can or should be captured; None leaves them as they are."""
        if not self.layers or not self.layers[0][1].gate.open or not torch.is_grad_enabled():
            return None
        # Dynamo traces no method written in Python (unflatten) under a mode; under torch.func nothing is captured at all.
        if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
            return None
        query = args[0] if args else kwargs["query"]
        if type(query) not in (Tensor, nn.Parameter) or query.is_nested:
            return None
        batch = 1 if query.dim() == 2 else query.shape[0 if module.batch_first else 1]
        marked = _mark(query, _Watch(self.layers, batch))
        # Wherever it is given: the forward pass asks whether query, key and value are identical.
        marks = tuple(marked if x is query else x for x in args)
        return marks, {name: marked if x is query else x for name, x in kwargs.items()}


def attach_functional(layers: list[Layer], statistics: list[Statistics]) -> list[RemovableHandle]:
    """Hooks that feed the statistics of functional layers, one for all that a module is made of."""
    members: dict[nn.Module, list[tuple[Layer, Statistics]]] = defaultdict(list)
    for layer, own in zip(layers, statistics, strict=True):
        if layer.applies_weight_itself:
            members[layer.module].append((layer, own))
    for module in members:
        remove_inert(module, "_forward_pre_hooks", AttentionHook())
    return [module.register_forward_pre_hook(AttentionHook(own), with_kwargs=True) for module, own in members.items()]
