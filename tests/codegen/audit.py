"""What the compiler makes of a kernel for a GPU that is not there.

`triton.compile` runs down to machine code for any target, and Triton's wheel brings NVIDIA's disassembler: no GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import assembly

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_NVIDIA_MMA = re.compile(r"\b((?:HGMMA|UTC\w*MMA|HMMA|DMMA)[\w.]*)")
_AMD_MMA = re.compile(r"\b(v_mfma_\w+)")
_NVIDIA_WIDTHS = {".128": 16, ".64": 8, ".U16": 2, ".S16": 2, ".U8": 1, ".S8": 1}
_AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


@dataclass(frozen=True)
class Architecture:
    """A target and what one of its multiprocessors (compute units) holds."""

    target: GPUTarget
    shared: int  # bytes for all programs
    shared_per_program: int  # bytes that one program may have
    reserved: int  # bytes that each program takes beside its own
    warps: int
    programs: int


ARCHITECTURES = {
    "sm_80": Architecture(GPUTarget("cuda", 80, 32), 167936, 166912, 1024, 64, 32),
    "sm_90": Architecture(GPUTarget("cuda", 90, 32), 233472, 232448, 1024, 64, 32),
    "sm_100": Architecture(GPUTarget("cuda", 100, 32), 233472, 232448, 1024, 64, 32),
    "gfx942": Architecture(GPUTarget("hip", "gfx942", 64), 65536, 65536, 0, 32, 32),
}


@dataclass(frozen=True)
class Report:
    """What was read off the machine code of one kernel.

    Attributes:
        registers: of a thread (a lane); on AMD, vector registers, accumulators included.
        spills: bytes of stack, or where none is declared, instructions or registers that spill.
        shared: bytes of shared memory of a program.
        occupancy: programs that fit a multiprocessor.
        products: tensor-core instructions in the hot loop, by kind.
        copies: instructions in the hot loop that bring global memory, by kind and bytes a thread: "async 16", "load 4"; "bulk"
            is the tensor memory accelerator.
        length: instructions in the hot loop.
    """

    registers: int
    spills: int
    shared: int
    occupancy: int
    products: dict[str, int]
    copies: dict[str, int]
    length: int


def compile_kernel(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    aligned: Iterable[str],
    architecture: Architecture,
    options: Mapping[str, Any],
) -> Any:
    """Compiles as a launch would; `aligned` arguments are divisible by 16, as the launcher finds most addresses to be."""
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=dict(constants), attrs=hints)
    return triton.compile(source, target=architecture.target, options={"enable_fp_fusion": True, **options})


def read(compiled: Any, architecture: Architecture) -> Report:
    """Reads the machine code."""
    return (_read_nvidia if architecture.target.backend == "cuda" else _read_amd)(compiled, architecture)


def _hot_loop(listing: assembly.Listing, product: re.Pattern[str], other: str) -> list[str]:
    """The loop with the most products; of two with as many, the inner one."""

    def heat(body: list[str]) -> tuple[int, int, int]:
        return sum(bool(product.search(i)) for i in body), sum(other in i for i in body), -len(body)

    return max(assembly.loops(listing), key=heat, default=[])


def _kinds(body: list[str], product: re.Pattern[str]) -> dict[str, int]:
    return dict(sorted(Counter(match[1] for i in body if (match := product.search(i))).items()))


def _run(tool: str, *arguments: str | Path) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_nvidia(compiled: Any, architecture: Architecture) -> Report:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, text = _run("cuobjdump", "-res-usage", path), _run("nvdisasm", "-c", "-ndf", path)  # without dataflow: quicker
    match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    if match is None:
        raise ValueError(f"cuobjdump said nothing of registers: {usage}")
    registers, stack, local = map(int, match.groups())
    # A kernel whose warps have separate tasks launches more of them than num_warps.
    threads = re.search(r"\.reqntid (\d+)", compiled.asm["ptx"])
    warps = int(threads[1]) // 32 if threads else compiled.metadata.num_warps
    listing = assembly.sass(text)
    body = _hot_loop(listing, _NVIDIA_MMA, "FFMA")
    copies: Counter[str] = Counter()
    for instruction in body:
        if "UTMALDG" in instruction:
            copies["bulk"] += 1
        elif match := re.search(r"\bLDG(STS)?\b([.\w]*)", instruction):
            kind = "async" if match[1] else "load"
            copies[f"{kind} {next((size for mark, size in _NVIDIA_WIDTHS.items() if mark in match[2]), 4)}"] += 1
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed out to warps by 256
    shared = compiled.metadata.shared
    return Report(
        registers=registers,
        spills=stack + local or sum(bool(re.search(r"\b(STL|LDL)\b", i)) for i in listing.instructions),
        shared=shared,
        occupancy=min(
            65536 // per_warp // warps,
            architecture.shared // (shared + architecture.reserved),
            architecture.warps // warps,
            architecture.programs,
        ),
        products=_kinds(body, _NVIDIA_MMA),
        copies=dict(copies),
        length=len(body),
    )


def _read_amd(compiled: Any, architecture: Architecture) -> Report:
    text = compiled.asm["amdgcn"]

    def declared(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", text)
        if match is None:
            raise ValueError(f"the assembler text does not declare {name}")
        return int(match[1])

    registers, shared, warps = declared("vgpr_count"), compiled.metadata.shared, compiled.metadata.num_warps
    listing = assembly.amdgcn(text)
    body = _hot_loop(listing, _AMD_MMA, "v_fma")
    copies: Counter[str] = Counter()
    for instruction in body:
        if match := re.match(r"(?:global|buffer|flat)_load_(?:lds_)?(\w+)", instruction):
            copies[f"load {_AMD_WIDTHS.get(match[1], 2)}"] += 1
    per_simd = min(8, 512 // (-(-registers // 8) * 8))  # waves; four such units share the programs
    return Report(
        registers=registers,
        # Scalar registers are spilled to lanes of vector registers, which are counted; memory is what counts here.
        spills=declared("private_segment_fixed_size") or declared("vgpr_spill_count"),
        shared=shared,
        occupancy=min(
            4 * per_simd // warps, architecture.shared // shared if shared else architecture.programs, architecture.programs
        ),
        products=_kinds(body, _AMD_MMA),
        copies=dict(copies),
        length=len(body),
    )
