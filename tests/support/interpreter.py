"""Makes the interpreter of kernels quicker, without a change of what it computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kfac_triton.kernels import runtime


def make_quicker() -> None:
    """Leaves out what takes half of the interpreter's time and has no effect."""
    if not runtime.INTERPRETED:
        return
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # without it, each sum and product of integers is checked, and the result is not looked at
        builder.options = replace(builder.options, sanitize_overflow=False)
    _patch_language_once(interpreter)


def _patch_language_once(interpreter: Any) -> None:
    """Functions of `triton.language` are replaced once for each launch.

    The interpreter does so again for each call of a device function, where everything is replaced already.
    """
    original, modules = interpreter._patch_lang, (runtime.tl, runtime.tl.core)
    replaced: set[str] = set()

    def patch_lang(fn: Any) -> Any:
        seen = {module.__name__ for module in modules if any(value is module for value in fn.__globals__.values())}
        if seen and seen <= replaced:
            return interpreter._LangPatchScope()
        scope = original(fn)
        if not replaced:  # a launch, which restores everything when it ends
            restore = scope.restore

            def end() -> None:
                replaced.clear()
                restore()

            scope.restore = end
        replaced.update(seen)
        return scope

    interpreter._patch_lang = patch_lang
