"""Names of kernels' parameters that Triton refuses when it launches compiled kernels; its interpreter takes them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

import kfac_triton.kernels.runtime as runtime

jit = pytest.importorskip("triton.runtime.jit")
FOLDER = Path(runtime.__file__).parent
MODULES = sorted(f"kfac_triton.kernels.{file.parent.name}.{file.stem}" for file in FOLDER.glob("*/*kernel.py"))


def kernels(module: str) -> dict[str, Any]:
    """Those that the module itself defines, as functions in Python."""
    functions = {name: getattr(value, "fn", None) for name, value in vars(importlib.import_module(module)).items()}
    return {name: fn for name, fn in functions.items() if name.endswith("_kernel") and fn.__module__ == module}


@pytest.mark.parametrize("module", MODULES)
def test_a_compiled_kernel_takes_its_arguments(module: str) -> None:
    """Triton writes a Python function with the kernel's parameters and one of its own, whose name must be another."""
    found = kernels(module)
    assert found
    for fn in found.values():
        kernel = jit.JITFunction(fn)
        jit.create_function_from_signature(kernel.signature, kernel.params, None)
