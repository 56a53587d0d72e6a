"""What the gate must not let pass."""

from __future__ import annotations

from typing import Any

from kfac_triton.kernels.covariance import kernel as covariance_kernel
from kfac_triton.kernels.runtime import tl, triton

from .cases import Case


@triton.constexpr_function
def _abort() -> None:
    __import__("os").abort()  # by name, an import would be looked into, and refused before it is called


@triton.jit
def aborting_kernel(out):
    """Ends the process that compiles it, as a failed assertion of the compiler does."""
    _abort()
    tl.store(out, 0)


def _rows(name: str, constants: dict[str, Any], options: dict[str, Any]) -> Case:
    usual = {
        "DTYPE": tl.bfloat16, "BLOCK": 64, "BLOCK_K": 64, "PRECISION": "tf32", "IMAGES": False, "WIDTH": 8,
        "SPATIAL": 0, "UPCAST": False, "HAS_ACCEPT": True,
    }  # fmt: skip
    return Case(
        name, covariance_kernel.covariance_kernel, "*i64 *i64 *i32 *fp32 *fp32 *u8 *fp32", usual | constants, options,
        rows=64, wide=True,
    )  # fmt: skip


def cases() -> list[Case]:
    """Compiled for sm_90."""
    float32 = {"DTYPE": tl.float32, "BLOCK_K": 32}
    return [
        _rows("rejected/unhinted pointers", {"WIDTH": 1}, {"num_warps": 4, "num_stages": 3}),
        _rows("rejected/too few registers", {"BLOCK": 128}, {"num_warps": 8, "num_stages": 3, "maxnreg": 96}),
        _rows("rejected/exact float32", float32 | {"PRECISION": "ieee"}, {"num_warps": 4, "num_stages": 1}),
        _rows("rejected/too many stages", {}, {"num_warps": 4, "num_stages": 16}),
        Case("rejected/a compiler that crashes", aborting_kernel, "*fp32", {}, {}),
        _rows("rejected/a kernel that is wrong", {"BLOCK": 65}, {"num_warps": 4}),
    ]
