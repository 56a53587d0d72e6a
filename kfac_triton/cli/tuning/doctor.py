"""`kfac-triton doctor`: which device and backend each operation uses, why, and whether its results are right."""

from __future__ import annotations

import argparse
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import __version__
from ...kernels import ops, runtime, tuning
from ..arguments import add_device
from .checks import Bases, ColdInverses, Covariance, Preconditioning, Problem, RowSource, WarmInverses, kernel_obstacle

HELP = "say which backend serves each operation, and check every kernel"
DESCRIPTION = (
    "Print the device, the versions and the backend that serves each operation with the reason, and check "
    "every kernel, and what stands in for it, against float64. Exit status 1 if a result is wrong."
)
_HARDWARE_SIDES = (64, 200, 513)  # fused, tiled with a rest, and odd
_INTERPRETED_SIDES = (16, 72)  # fused and tiled; the interpreter takes seconds for more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    add_device(parser, "cpu, cuda, cuda:1, ...")


@dataclass(frozen=True)
class Finding:
    """One problem solved by one backend.

    Attributes:
        problem: what was computed.
        backend: "torch", "triton" or "auto".
        error: against float64; infinite for no result at all.
        seconds: that it took, compilation included.
        complaint: the exception that it ended with, if it did.
    """

    problem: Problem
    backend: str
    error: float
    seconds: float
    complaint: str = ""

    @property
    def right(self) -> bool:
        """Whether the result passes."""
        return self.problem.is_right(self.error)

    def __str__(self) -> str:
        figures = f"error {self.error:.1e}, allowed {self.problem.allowed:.1e}, {self.seconds:.1f} s"
        what = f"{self.problem.operation} of {self.problem.name}, {self.backend}"
        return f"  {'right' if self.right else 'WRONG'}  {what}: {self.complaint or figures}"


def problems(device: torch.device, sides: Sequence[int] = ()) -> Iterator[Problem]:
    """A few problems for every operation: all input types, biases, convolutions, stacks.

    Args:
        device: of the tensors.
        sides: of the factors; some that suit the device if there are none.
    """
    sides = sides or (_INTERPRETED_SIDES if runtime.INTERPRETED or device.type == "cpu" else _HARDWARE_SIDES)
    yield Covariance("whole numbers", _layers(sides, device, torch.float32, whole=True), whole=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield Covariance(f"{str(dtype).removeprefix('torch.')} rows", _layers(sides, device, dtype))
    images = torch.randn(4, 5, 9, 8, device=device)
    strided = RowSource(images, ops.window((3, 3), (2, 1), (1, 1)), ones=True)
    channels_last = RowSource(images.contiguous(memory_format=torch.channels_last), ops.window((1, 1)))
    yield Covariance("convolution", [strided, channels_last])
    stacks = dict.fromkeys(sides, 2)
    yield ColdInverses("stacks", stacks, device)
    yield WarmInverses("stacks", stacks, device)
    yield Bases("stacks", stacks, device)
    shapes = {(m, n): 2 for m in sides[:2] for n in sides[-2:]}
    yield Preconditioning("inverses", shapes, device, factored=False)
    yield Preconditioning("inverse roots", shapes, device)


def _layers(sides: Sequence[int], device: torch.device, dtype: torch.dtype, whole: bool = False) -> list[RowSource]:
    def numbers(*shape: int) -> Tensor:
        values = torch.randn(*shape, device=device)
        return (2 * values).round().clamp(-3, 3) if whole else values.to(dtype)

    layers = [RowSource(numbers(3 * side, side), ones=side % 2 == 0) for side in sides]
    return [*layers, RowSource(numbers(sides[0], 2 * sides[0]).T, ones=True)]


def examine(problem: Problem, backend: str) -> Finding:
    """Solves a problem with a backend; whatever goes wrong is in the finding."""
    start = time.perf_counter()
    try:
        error, complaint = problem.check(backend), ""
    except Exception as exception:  # a compiler fails in many ways, and each is a finding
        error, complaint = float("inf"), f"{type(exception).__name__}: {str(exception).strip().partition(chr(10))[0]}"
    return Finding(problem, backend, error, time.perf_counter() - start, complaint)


def choice(problem: Problem) -> tuple[str, str]:
    """The backend that `auto` chooses, and why."""
    if problem.prefers_library():
        return "library", "its TF32 products were faster wherever that was measured"
    if (obstacle := kernel_obstacle(problem)) is not None:
        return "torch", obstacle
    if problem.device.type != "cuda":
        return "torch", "the interpreter is for checks: backend='triton' asks for it"
    return "triton", f"compiled for {runtime.target(problem.device).arch}"


def run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    torch.manual_seed(0)
    print(describe(arguments.device))
    reasons: dict[tuple[str, str, str], list[str]] = {}
    findings: list[Finding] = []
    for problem in problems(arguments.device):
        backend, reason = choice(problem)
        reasons.setdefault((problem.operation, backend, reason), []).append(problem.name)
        runs = {"torch": True, "auto": backend == "library", "triton": kernel_obstacle(problem) is None}
        findings += [examine(problem, name) for name, is_run in runs.items() if is_run]
    print("\nBackend that 'auto' chooses")
    choices = Counter(operation for operation, *_ in reasons)
    for (operation, backend, reason), names in reasons.items():
        which = f" for {', '.join(names)}" if choices[operation] > 1 else ""
        print(f"  {operation}{which}: {backend} ({reason})")
    print("\nErrors against float64")
    print(*findings, sep="\n")
    wrong = [finding for finding in findings if not finding.right]
    checked = "kernels and references" if any(f.backend == "triton" for f in findings) else "references (no kernel can run)"
    print(f"\n{len(wrong)} of {len(findings)} results are wrong." if wrong else f"\nAll {checked} are right.")
    return 1 if wrong else 0


def describe(device: torch.device) -> str:
    """Device, versions, and where the kernels' configurations come from."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, {properties.multi_processor_count} multiprocessors, {properties.total_memory >> 30} GiB"
    obstacle = runtime.obstacle(device)
    kernels = f"none can run; {obstacle}"
    if obstacle is None:
        target = runtime.target(device)
        user, shipped = tuning.user_file(target.arch), tuning.shipped_file(target).name
        how = "in Triton's interpreter" if runtime.INTERPRETED else f"compiled for {target.arch}"
        kernels = f"{how}, configurations from {f'{user} over {shipped}' if user.exists() else shipped}"
    versions = f"torch {torch.__version__}, Triton {runtime.triton.__version__}, Python {platform.python_version()}"
    return f"kfac_triton {__version__}, {versions}\nDevice {device}: {name}\nKernels: {kernels}"
