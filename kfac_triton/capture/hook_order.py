"""The order of this package's hooks among those of others on the same module.

A layer's own input and output are what its forward takes and returns. So pre-hooks that replace the input run after those of
others, and forward hooks that read the output run before those of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from ..layers import Layer
from ..warning import warn
from .inert import InertCopies

GLOBAL = -1  # stands for global hooks among the numbers of layers


class LastHook(InertCopies):
    """A forward pre-hook that has to be the last one, so that no hook of others sees what it makes of the input."""


def runs_before_others(module: nn.Module, own: LastHook | None = None) -> bool:
    """Whether a pre-hook of others, which was registered later, comes after this one; after any last hook if none is given."""
    found = False
    for hook in module._forward_pre_hooks.values():
        if not isinstance(hook, InertCopies):
            if found:
                return True
        elif hook is own or (own is None and isinstance(hook, LastHook)):
            found = True
    return False


def put_last(module: nn.Module, own: LastHook | None = None) -> None:
    """Moves a last hook behind those of others, or all of them if none is given.

    PyTorch follows the new order from the next call on. A hook may therefore move itself alone: another one in a call that runs
    would take itself for the last.
    """
    if not runs_before_others(module, own):
        return
    hooks: Any = module._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(hook, LastHook) and (own is None or hook is own) and runs_before_others(module, hook):
            hooks.move_to_end(key)


def warn_of_earlier_hooks(layers: Sequence[Layer], warned: set[int]) -> None:
    """Warns, once a layer, of forward hooks of others that run before the layer is captured.

    Args:
        layers: those of the engine.
        warned: the numbers of layers that the user has been warned of, which this adds to; `GLOBAL` for global hooks.
    """
    found = {}
    for number, layer in enumerate(layers):
        if layer.applies_weight_itself:
            continue  # it is captured inside of its forward, before any forward hook
        for module in layer.modules:
            for hook in module._forward_hooks.values():
                if not isinstance(hook, InertCopies) and number not in warned:
                    found[number] = hook
                break
    if found:
        warned.update(found)
        warn(
            f"forward hooks ({_names(found.values())}) of layers {', '.join(repr(layers[i].name) for i in found)} run before "
            "those of K-FAC, because they were registered with prepend=True after the optimizer was made. If they change the "
            "output, G is that of the changed output, and not of the layer's own. Register them without prepend, or before the "
            "optimizer is made"
        )
    if _global_forward_hooks and GLOBAL not in warned and not all(layer.applies_weight_itself for layer in layers):
        warned.add(GLOBAL)
        warn(
            f"global forward hooks ({_names(_global_forward_hooks.values())}, from register_module_forward_hook) run before "
            "those of K-FAC. If they change the output of a layer, G may be that of the changed output, and not of the layer's "
            "own; if they only look at it, nothing is wrong. Register hooks that change outputs on the modules themselves"
        )


def _names(hooks: Iterable[Callable[..., Any]]) -> str:
    return ", ".join(dict.fromkeys(getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks))
