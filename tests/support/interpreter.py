"""Makes the interpreter of kernels quicker, without a change of what it computes."""

from __future__ import annotations

from typing import Any

from kfac_triton.kernels import runtime


def patch_language_once() -> None:
    """Lets the interpreter replace the functions of `triton.language` once for each launch.

    It does so again for each call of a device function, where everything is replaced already, and needs a third of its time to
    find that out.
    """
    if not runtime.INTERPRETED:
        return
    from triton.runtime import interpreter

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
