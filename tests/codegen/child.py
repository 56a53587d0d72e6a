"""Compiles the cases of one architecture, a line of JSON before and after each: `python -m codegen.child ARCH SET FIRST`.

A process of its own, because the tests' kernels are interpreted, and because a compiler that fails an assertion takes its
process with it: the last line then says which case it was, and another child goes on behind it. Compilers print too, so our
lines are marked.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from . import audit, cases, rejected
from .gate import MARK


def _say(facts: dict[str, Any]) -> None:
    print(MARK + json.dumps(facts), flush=True)


def run(arch: str, which: str, first: int) -> None:
    """Prints what became of the cases from `first` on."""
    architecture = audit.ARCHITECTURES[arch]
    chosen = rejected.cases() if which == "rejected" else cases.shipped(arch)
    if which == "one of each":
        chosen = list({case.kernel: case for case in reversed(chosen)}.values())
    for case in chosen[first:]:
        folder = case.kernel.__module__.split(".")[-2]
        facts = {
            "name": case.name, "kernel": f"{folder}.{case.kernel.__name__}", "rows": case.rows, "wide": case.wide,
            "warps": case.options.get("num_warps", 4), "copied": case.copied,
        }  # fmt: skip
        _say(facts)
        types, aligned = case.signature()
        try:
            compiled = audit.compile_kernel(case.kernel, types, case.constants, aligned, architecture, case.options)
            result: dict[str, Any] = {"report": asdict(audit.read(compiled, architecture))}
        except Exception as error:  # whatever a compiler may raise is this case's failure, and no other's
            cause = error.__cause__ or error
            result = {
                "error": f"{type(error).__name__}: {str(cause).strip().splitlines()[-1] if str(cause).strip() else cause!r}"
            }
        _say(result)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
