"""K-FAC's own arithmetic in its own precision, also where the user calls it under autocast.

`with torch.autocast(...): loss.backward(); optimizer.step()` is legal, but autocast would then compute sums, inverses and
preconditioned gradients in 16 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])


class NoAutocast:
    """Context without autocast on any device; costs next to nothing where none is enabled."""

    def __init__(self) -> None:
        self._guard: Any = None

    def __enter__(self) -> NoAutocast:
        if torch._C._is_any_autocast_enabled():
            self._guard = torch._C._DisableAutocast()
            self._guard.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._guard is not None:
            self._guard.__exit__(kind, error, traceback)
            self._guard = None

    def call_outside(self, function: Callable[[], Any]) -> Any:
        """The result of a function under the autocast around this context, called inside of the context.

        Autocast keeps the weights that it has cast until the end of its outermost context. The parameters may have moved
        between two calls, so that these copies must be made anew.
        """
        if self._guard is None:
            return function()
        self.__exit__(None, None, None)
        torch.clear_autocast_cache()
        try:
            return function()
        finally:
            torch.clear_autocast_cache()
            self.__enter__()


def without_autocast(function: _Function) -> _Function:
    """Decorator: the function runs without autocast on any device."""

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args, **kwargs)
        with NoAutocast():
            return function(*args, **kwargs)

    return outside  # type: ignore[return-value]
