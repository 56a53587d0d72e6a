"""Hooks that do nothing on copies of a module, and their removal."""

from __future__ import annotations

from typing import Any

from torch import nn


class InertCopies:
    """Copies and pickles are made without arguments and do nothing, so that copying a model does not copy statistics."""

    def __deepcopy__(self, memo: dict[int, Any]) -> InertCopies:
        return type(self)()

    def __reduce__(self) -> tuple[type[InertCopies], tuple[()]]:
        return type(self), ()


def remove_inert(module: nn.Module, kind: str, like: Any) -> None:
    """Removes the hooks that copying or pickling has left on a module: those equal to `like`."""
    hooks = getattr(module, kind)
    for key in [key for key, hook in hooks.items() if type(hook) is type(like) and vars(hook) == vars(like)]:
        del hooks[key]
        for flags in ("with_kwargs", "always_called"):  # in another process the number may be given to another hook
            getattr(module, f"{kind}_{flags}", {}).pop(key, None)
