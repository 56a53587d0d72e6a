"""A driver for Triton that compiles kernels for an H100 and launches them into nothing: what is left is the work of the host.

`install` also takes the way through the package that it takes on a GPU, with tensors that are in the memory of a CPU: the
kernels are used, the library is called where it is on NVIDIA GPUs, but multiplies single numbers instead of the stacks of
matrices, which would take the CPU a tenth of a step, and the host reads nothing. The kernels write nothing, so
numbers mean nothing afterwards; a process that has called `install` is good for nothing else.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

LAUNCHES: Counter[str] = Counter()  # by name of the kernel


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, ...]:
        """Module, function, registers, spills and the most threads of a kernel; the numbers pass Triton's checks."""
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self._name = metadata.name

    def __call__(self, *args: Any) -> None:
        LAUNCHES[self._name] += 1


class _Driver:
    launcher_cls = _Launcher

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.utils = _Utils()
        self._target = GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def get_device_capability(self, device: int) -> tuple[int, int]:
        return 9, 0

    @staticmethod
    def is_active() -> bool:
        return True


def install() -> None:
    """Replaces Triton's driver, and what the package asks of the device, in this process."""
    from triton.runtime import driver

    from kfac_triton.curvature.async_flags import AsyncFlags
    from kfac_triton.kernels import runtime
    from kfac_triton.kernels.operators import OPERATORS

    driver.set_active(_Driver())
    target = runtime.Target("cuda", "sm_90", 132)

    def choose(operation: str, backend: str, device: torch.device, why_not: Any) -> bool:
        return backend != "torch" and why_not() is None

    for name, value in {"obstacle": lambda device: None, "target": lambda device: target, "choose": choose}.items():
        setattr(runtime, name, value)
    for operation in OPERATORS.values():
        if operation.library is not None:
            object.__setattr__(operation, "launch", operation.library)
            object.__setattr__(operation, "can_use", lambda *args: None)
    multiply, number = torch.bmm, torch.zeros(1, 1, 1)

    def product(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
        if a.requires_grad or b.requires_grad:
            return multiply(a, b)
        multiply(number, number, out=number)
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2]) if out is None else out

    setattr(torch, "bmm", product)  # noqa: B010
    # What the kernels never wrote would look like refused inverses.
    setattr(AsyncFlags, "arrived", lambda self: [])  # noqa: B010
