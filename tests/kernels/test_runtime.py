"""Which implementation serves a call, and with what precision."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

from kfac_triton.kernels import precision, runtime
from kfac_triton.kernels.runtime import Target

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def nothing() -> str | None:
    return None


def something() -> str | None:
    return "inputs[0] is torch.float64"


@pytest.fixture
def capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the kernels can run on, as far as the choice goes."""
    monkeypatch.setattr(runtime, "obstacle", lambda device: None)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(
    ("backend", "device", "why_not", "chosen"),
    [
        ("auto", GPU, nothing, True),
        ("auto", GPU, something, False),
        ("auto", CPU, nothing, False),
        ("torch", GPU, nothing, False),
        ("triton", GPU, nothing, True),
        ("triton", CPU, nothing, True),
    ],
)
def test_choice(backend: str, device: torch.device, why_not: object, chosen: bool) -> None:
    assert runtime.choose("squares", backend, device, why_not) is chosen


@pytest.mark.usefixtures("capability")
def test_what_insists_is_told_why_not() -> None:
    with pytest.raises(ValueError, match=r"no kernel can serve squares: inputs\[0\] is torch.float64; use 'auto' or 'torch'"):
        runtime.choose("squares", "triton", GPU, something)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, but is 'cuda'"):
        runtime.choose("squares", "cuda", CPU, nothing)


@pytest.mark.parametrize(
    ("changes", "device", "message"),
    [
        ({"AVAILABLE": False, "WHY_UNAVAILABLE": "Triton is not installed"}, GPU, "Triton is not installed"),
        ({"INTERPRETED": False}, CPU, "compiles for GPUs, and this is cpu; set TRITON_INTERPRET=1"),
        ({"INTERPRETED": False, "target": lambda device: Target("cuda", "sm_75", 40)}, GPU, "8.0 or newer, and this is sm_75"),
        ({"INTERPRETED": False, "target": lambda device: Target("cuda", "sm_90", 132)}, GPU, None),
        ({"INTERPRETED": True}, CPU, None),
    ],
)
def test_obstacles(
    changes: dict[str, object], device: torch.device, message: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(runtime, name, value)
    reason = runtime.obstacle(device)
    assert reason is None if message is None else message in str(reason)


@pytest.mark.parametrize(
    ("target", "modes"),
    [
        (Target("cuda", "sm_80", 108), ("tf32", "tf32x3", "tf32")),
        (Target("cuda", "sm_100", 148), ("tf32", "tf32x3", "tf32")),
        (Target("hip", "gfx942", 304), ("ieee", "ieee", "ieee")),
        (Target("interpreter", "interpreter", 4), ("ieee", "ieee", "ieee")),
    ],
)
def test_precision(target: Target, modes: tuple[str, ...]) -> None:
    """tf32x3 is NVIDIA's alone; AMD's matrix cores multiply float32 as it is."""
    assert tuple(precision.resolve(purpose, target) for purpose in precision.PURPOSES) == modes
    with pytest.raises(ValueError, match="purpose must be one of rows, exact, coarse, but is 'fast'"):
        precision.resolve("fast", target)


@pytest.mark.parametrize(
    ("blocked", "message"), [("triton", "Triton is not installed"), ("numpy", "Triton cannot be imported: .*numpy")]
)
def test_a_missing_package_is_named(blocked: str, message: str) -> None:
    """In a process of its own. Triton's interpreter needs NumPy, and that is not Triton's absence."""
    code = (
        f"import sys; sys.modules[{blocked!r}] = None\n"
        "import torch, kfac_triton.kernels.runtime as r; print(r.obstacle(torch.device('cpu')))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=True)
    assert re.search(message, result.stdout)


def test_kernels_are_launched_where_their_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on the current device: a model on the second GPU would be computed on the first."""
    entered = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    with runtime.current(torch.device("cuda", 1)):
        assert entered == [torch.device("cuda", 1)]
    with runtime.current(CPU):
        assert len(entered) == 1


def test_capability() -> None:
    assert Target("cuda", "sm_103", 1).capability == 103
    assert Target("hip", "gfx942", 1).capability == 0


def test_the_users_precision_comes_back_after_an_error() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    with pytest.raises(RuntimeError, match="out of memory"), precision.library_tf32():
        assert matmul.fp32_precision == "tf32"
        raise RuntimeError("out of memory")
    assert matmul.fp32_precision == before
