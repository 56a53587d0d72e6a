"""The rules that compiled kernels must keep, and the table of what they were when it was last written down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
SHARED_PER_PROGRAM = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
REMEMBERED = ("registers", "occupancy")
MARK = "codegen: "  # starts the lines of a child


# Spills that stay, by (Triton, architecture, case), in bytes. The fused inverse of 64 rows fills Hopper's registers: nothing is
# spilled with four warps under 3.6 and 3.7, with eight under 3.9. By stages it would be a dozen launches instead of one. From
# 3.8 on, some bytes are spilled for images on Ampere, and on Hopper if they are copied 8 bytes at a time. On Ampere, 3.8 alone
# spills some of six other cases: five are products of 64 rows in three parts of TF32, and spill outside of their loops.
# On Blackwell, 3.9 spills two registers of a norm, so that six programs fit, and three of a Gram matrix, so that three do,
# before its loop. Two stages would spill none there, but then no kernel of orthogonal iteration would load two blocks ahead.
KNOWN_SPILLS = {
    ("3.8.0", "sm_80", "covariance_images/any/covariance_kernel/bf16"): 24,
    ("3.8.0", "sm_80", "covariance_images/any/covariance_kernel/bf16, 8 bytes"): 64,
    ("3.8.0", "sm_80", "newton_schulz_fused/32/fused_kernel/32"): 8,
    ("3.8.0", "sm_80", "newton_schulz_step/any/step_kernel/-"): 40,
    ("3.8.0", "sm_80", "orthogonal_iteration/any/turn_kernel/aligned"): 24,
    ("3.8.0", "sm_80", "orthogonal_iteration/any/gram_kernel/aligned, start"): 24,
    ("3.8.0", "sm_80", "orthogonal_iteration/any/apply_kernel/aligned"): 64,
    ("3.8.0", "sm_80", "orthogonal_iteration/any/apply_kernel/unaligned"): 40,
    ("3.8.0", "sm_90", "covariance_images/any/covariance_kernel/bf16, 8 bytes"): 8,
    ("3.8.0", "sm_90", "newton_schulz_fused/64/fused_kernel/64"): 136,
    ("3.9.0", "sm_80", "covariance_images/any/covariance_kernel/bf16"): 24,
    ("3.9.0", "sm_80", "covariance_images/any/covariance_kernel/bf16, 8 bytes"): 64,
    ("3.9.0", "sm_90", "covariance_images/any/covariance_kernel/bf16, 8 bytes"): 8,
    ("3.9.0", "sm_90", "newton_schulz_fused/64/fused_kernel/64"): 216,
    ("3.9.0", "sm_100", "orthogonal_iteration/any/gram_kernel/aligned"): 16,
    ("3.9.0", "sm_100", "-/-/channel_sums_kernel/bf16, channels first, positions"): 8,
}
# On Blackwell, all but 3.7 read the sizes of a window for each block of rows, in loads of 4 and 8 bytes beside the patches.
READS_TABLES = {
    (triton, "sm_100", f"covariance_patches/any/covariance_kernel/{kind}")
    for triton in ("3.6.0", "3.8.0", "3.9.0")
    for kind in ("bf16, 2 dimensions", "fp32, 2 dimensions", "fp32, 3 dimensions")
}
# Loads of 4 bytes beside those of matrices, by case: a thread reads the means of four rows and four columns.
NARROW = {"-/-/direction_kernel/-": 8}


@dataclass(frozen=True)
class Outcome:
    """What became of one case.

    Attributes:
        name: of the case.
        kernel: "folder.function".
        rows: of the tile of its products, 0 for a kernel without any.
        wide: whether its copies must be wide.
        warps: that it is launched with.
        copied: bytes that a wide copy brings.
        report: fields of `audit.Report`, or None where nothing was compiled.
        error: why not.
    """

    name: str
    kernel: str
    rows: int
    wide: bool
    warps: int
    copied: int = 16
    report: dict[str, Any] | None = None
    error: str = ""


def golden_file() -> Path:
    """The table for the installed Triton."""
    return HERE / "golden" / f"triton-{version('triton')}.json"


def unit(arch: str, rows: int, warps: int) -> str:
    """How the tensor-core instructions start that a tile with this many rows should use."""
    whole_group = rows >= 64 and warps >= 4
    return {"sm_80": "HMMA", "sm_90": "HGMMA" if whole_group else "HMMA", "sm_100": "UTC" if whole_group else "HMMA"}.get(
        arch, "v_mfma"
    )


def objections(arch: str, outcome: Outcome) -> list[str]:
    """What is wrong with one case; nothing, if it may ship."""
    report = outcome.report
    if report is None:
        return [outcome.error]
    found = []
    if report["spills"] > KNOWN_SPILLS.get((version("triton"), arch, outcome.name), 0):
        found.append(f"spills {report['spills']} bytes")
    if report["shared"] > SHARED_PER_PROGRAM[arch]:
        found.append(f"shared memory of {report['shared']} bytes, and a program has {SHARED_PER_PROGRAM[arch]}")
    elif report["occupancy"] < 1:
        found.append(f"no program fits a multiprocessor with {report['registers']} registers a thread")
    if outcome.rows:
        wanted = unit(arch, outcome.rows, outcome.warps)
        if not any(kind.startswith(wanted) for kind in report["products"]):
            found.append(f"no tensor cores of kind {wanted} in the hot loop, but {report['products'] or 'none'}")
    wide = {f"async {outcome.copied}", f"load {outcome.copied}", "bulk"}
    if (version("triton"), arch, outcome.name) in READS_TABLES:
        wide |= {"load 4", "load 8"}
    if report["copies"].get("load 4", 0) <= NARROW.get(outcome.name, 0):
        wide |= {"load 4"}
    if outcome.wide and (not report["copies"] or set(report["copies"]) - wide):
        found.append(f"narrow copies in the hot loop: {report['copies'] or 'none at all'}")
    return found


def _environment(cache: str) -> dict[str, str]:
    """Of a child: kernels compiled, not interpreted; afresh; and the modules of the tests and the package in reach."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    return kept | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(ROOT)])}


def compile_all(arch: str, which: str = "shipped") -> list[Outcome]:
    """Compiles cases for one architecture; a child that dies costs only its case.

    Args:
        arch: the architecture.
        which: "shipped", all of them; "one of each", the first one of each kernel; "rejected".

    Returns:
        What became of them.
    """
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as cache:
        while True:
            command = [sys.executable, "-m", "codegen.child", arch, which, str(len(outcomes))]
            child = subprocess.run(command, cwd=ROOT, env=_environment(cache), capture_output=True, text=True, check=False)
            marked = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
            lines = [json.loads(line.removeprefix(MARK)) for line in marked]
            outcomes += [Outcome(**facts, **result) for facts, result in zip(lines[::2], lines[1::2], strict=False)]
            if child.returncode == 0:
                return outcomes
            if len(lines) % 2 == 0:  # it died between two cases: not by compiling
                raise RuntimeError(f"{' '.join(command)} failed:\n{child.stderr}")
            said = [line for line in child.stderr.splitlines() if "Assertion" in line or "LLVM ERROR" in line]
            outcomes.append(Outcome(**lines[-1], error=f"the compiler ended with {child.returncode}: {' '.join(said)[:500]}"))


def remembered(outcomes: list[Outcome]) -> dict[str, dict[str, int]]:
    """The part of the reports that the golden table keeps."""
    return {o.name: {field: o.report[field] for field in REMEMBERED} for o in outcomes if o.report is not None}


def write_golden(results: dict[str, list[Outcome]]) -> None:
    """Writes the table for the installed Triton, a line a case."""
    blocks = []
    for arch, outcomes in results.items():
        lines = [f"    {json.dumps(name)}: {json.dumps(facts)}" for name, facts in sorted(remembered(outcomes).items())]
        blocks.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    golden_file().parent.mkdir(exist_ok=True)
    golden_file().write_text("{\n" + ",\n".join(blocks) + "\n}\n")
