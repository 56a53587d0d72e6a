"""Triton, or a stand-in with which the package can be imported without it, and the device that the kernels run on.

Kernel modules take `triton` and `tl` from here. Without Triton, `jit` leaves a function unchanged, and `obstacle` says
why no kernel can run.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _unchanged(function: Any = None, **options: Any) -> Any:
    """Stands in for `triton.jit`, with options or without."""
    return functools.partial(_unchanged, **options) if function is None else function


try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
    WHY_UNAVAILABLE = ""
except ImportError as error:
    # Triton itself is missing, or something that it needs: its interpreter needs NumPy.
    WHY_UNAVAILABLE = "Triton is not installed" if error.name == "triton" else f"Triton cannot be imported: {error}"
    triton, tl = SimpleNamespace(jit=_unchanged, __version__="none"), None

AVAILABLE: bool = tl is not None
# Decided when the kernels are decorated: TRITON_INTERPRET=1 must be set before this package is imported.
INTERPRETED: bool = AVAILABLE and bool(triton.knobs.runtime.interpret)

BACKENDS = ("auto", "triton", "torch")
# What kernels read, and Triton's names for it.
TYPES = {
    dtype: getattr(tl, str(dtype).removeprefix("torch."), None) for dtype in (torch.float32, torch.bfloat16, torch.float16)
}


@dataclass(frozen=True)
class Target:
    """What a kernel is compiled for.

    Attributes:
        backend: "cuda", "hip" or "interpreter".
        arch: "sm_90", "gfx942", ..., or "interpreter".
        processors: number of multiprocessors; long sums are split to keep them busy.
    """

    backend: str
    arch: str
    processors: int

    @property
    def capability(self) -> int:
        """Compute capability of an NVIDIA device, 90 for sm_90; 0 for others."""
        return int(self.arch.removeprefix("sm_")) if self.backend == "cuda" else 0


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.multi_processor_count)
    return Target("cuda", f"sm_{properties.major}{properties.minor}", properties.multi_processor_count)


def target(device: torch.device) -> Target:
    """What kernels on this device are compiled for."""
    if INTERPRETED:
        return Target("interpreter", "interpreter", 4)
    return _device_target(device.index if device.index is not None else torch.cuda.current_device())


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a GPU the current one: Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def is_recording() -> bool:
    """Whether a CUDA graph is being captured."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def obstacle(device: torch.device) -> str | None:
    """Why no Triton kernel can run on this device; None if one can."""
    if not AVAILABLE:
        return WHY_UNAVAILABLE
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"Triton compiles for GPUs, and this is {device.type}; set TRITON_INTERPRET=1 before importing to interpret"
    if torch.version.hip is None and target(device).capability < 80:
        return f"the kernels need an NVIDIA GPU of compute capability 8.0 or newer, and this is {target(device).arch}"
    return None


def unreadable(name: str, tensor: Tensor) -> str | None:
    """Why kernels that take several types cannot read a tensor; None if they can."""
    return None if tensor.dtype in TYPES else f"{name} is {tensor.dtype}, and the kernel reads float32, bfloat16 and float16"


def choose(operation: str, backend: str, device: torch.device, why_not: Callable[[], str | None]) -> bool:
    """Whether a Triton kernel serves a call: `auto` uses it on a GPU if it can, `triton` requires it.

    Args:
        operation: name of the operation, for the message.
        backend: "auto", "triton" or "torch".
        device: of the tensors.
        why_not: tells why the operation's kernel cannot serve this call; None if it can.

    Raises:
        ValueError: if backend is unknown, or "triton" and no kernel can serve the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, but is {backend!r}")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return False
    reason = obstacle(device) or why_not()
    if reason and backend == "triton":
        raise ValueError(f"backend is 'triton', but no kernel can serve {operation}: {reason}; use 'auto' or 'torch'")
    return reason is None
