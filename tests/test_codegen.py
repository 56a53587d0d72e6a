"""Every shipped kernel and configuration compiles well for every architecture, and the gate that says so can say no."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from codegen import assembly, gate

KERNELS = gate.ROOT / "kernels"
Results = dict[str, list[gate.Outcome]]


# Hopper, where the kernels were measured. Each of the others takes as long again.
QUICK = "sm_90"
each_architecture = pytest.mark.parametrize(
    "arch", [arch if arch == QUICK else pytest.param(arch, marks=pytest.mark.slow) for arch in gate.ARCHITECTURES]
)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Results:
    """All shipped cases of the tested architectures, each compiled once, side by side on as many processors as there are."""
    own = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    tested = {item.callspec.params.get("arch") for item in own}
    architectures = [arch for arch in gate.ARCHITECTURES if arch in tested]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(architectures, pool.map(gate.compile_all, architectures), strict=True))


@each_architecture
def test_nothing_is_wrong_with_what_ships(results: Results, arch: str) -> None:
    found = {outcome.name: gate.objections(arch, outcome) for outcome in results[arch]}
    assert {name: wrong for name, wrong in found.items() if wrong} == {}


@each_architecture
def test_registers_and_occupancy_are_those_of_the_golden_table(results: Results, arch: str) -> None:
    """After a change that is meant: `PYTHONPATH=tests:. python -m codegen --update`, and look at the difference."""
    golden = json.loads(gate.golden_file().read_text())
    assert gate.remembered(results[arch]) == golden[arch]


def shipped_configurations(arch: str) -> set[tuple[str, str]]:
    """(key, up_to) of every entry that tells a kernel anything: the last of the fused inverse only says not to fuse."""
    table = json.loads((KERNELS / "configs" / f"{arch}.json").read_text())
    return {
        (key, str(entry["up_to"] or "any")) for key, entries in table.items() for entry in entries if entry.get("FUSED") != 0
    }


@each_architecture
def test_every_configuration_has_a_case(results: Results, arch: str) -> None:
    named = {tuple(outcome.name.split("/")[:2]) for outcome in results[arch]} - {("-", "-")}
    assert named == shipped_configurations(arch)


def test_every_architecture_configures_the_same_kernels() -> None:
    """The interpreter's among them: its keys are those that the launchers look up under test."""
    tables = {path.stem: set(json.loads(path.read_text())) for path in (KERNELS / "configs").glob("*.json")}
    assert tables.keys() == {*gate.ARCHITECTURES, "interpreter"}
    assert len({frozenset(keys) for keys in tables.values()}) == 1, tables


def jitted(path: Path) -> set[str]:
    """Public functions of a module under @triton.jit, with options or without."""
    return {
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
        and not node.name.startswith("_")
        and any(ast.unparse(decorator).partition("(")[0] == "triton.jit" for decorator in node.decorator_list)
    }


def launched(path: Path) -> set[str]:
    """Names of the functions that a module launches: function[grid](arguments)."""
    calls = [node.func.value for node in ast.walk(ast.parse(path.read_text())) if _is_launch(node)]
    return {ast.unparse(function).rpartition(".")[2] for function in calls}


def _is_launch(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)


def all_kernels() -> set[str]:
    """Folder and name of each, with a point between."""
    return {f"{path.parent.name}.{name}" for path in KERNELS.glob("*/*kernel.py") for name in jitted(path)}


def test_the_other_compiler_takes_one_case_of_each_kernel() -> None:
    """AMD's; the other cases of gfx942 are slow."""
    outcomes = gate.compile_all("gfx942", "one of each")
    assert {outcome.kernel for outcome in outcomes} == all_kernels()
    assert [(outcome.name, wrong) for outcome in outcomes if (wrong := gate.objections("gfx942", outcome))] == []
    golden, found = json.loads(gate.golden_file().read_text())["gfx942"], gate.remembered(outcomes)
    assert found == {name: golden[name] for name in found}


@each_architecture
def test_every_kernel_has_a_case(results: Results, arch: str) -> None:
    """Kernels are the public functions of the modules kernels/*/*kernel.py; what is launched is one of them."""
    kernels = all_kernels()
    assert {outcome.kernel for outcome in results[arch]} == kernels
    names = {kernel.partition(".")[2] for kernel in kernels}
    assert set().union(*(launched(path) for path in KERNELS.rglob("*.py"))) == names


def test_numbers_of_matrices_and_tiles_cost_no_compilations() -> None:
    """In the stages of the cold inverse Triton looks at sides and strides alone: 1, 2 and 16 matrices are one compilation."""
    program = (
        "from kfac_triton.kernels.newton_schulz import kernel\n"
        "for name, value in vars(kernel).items():\n"
        "    for p in getattr(value, 'params', []) if name.endswith('_kernel') else []:\n"
        "        print(p.name, p.do_not_specialize)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    plain, looked_at = (
        {name for name, flag in map(str.split, run.stdout.splitlines()) if flag == x} for x in ("True", "False")
    )
    assert plain == {"batch", "count", "max_steps"}
    assert not plain & looked_at
    assert {"n", "side", "factor_batch", "factor_stride"} <= looked_at


@pytest.fixture(scope="module")
def rejected() -> dict[str, gate.Outcome]:
    return {outcome.name.partition("/")[2]: outcome for outcome in gate.compile_all("sm_90", "rejected")}


REASONS = {
    "unhinted pointers": "narrow copies in the hot loop: {'load 2'",
    "too few registers": "spills",
    "exact float32": "no tensor cores of kind HGMMA in the hot loop, but none",
    "too many stages": "bytes, and a program has 232448",
    "a compiler that crashes": "the compiler ended with -6",
    "a kernel that is wrong": "CompilationError",
}


@pytest.mark.parametrize("name", REASONS)
def test_the_gate_rejects(rejected: dict[str, gate.Outcome], name: str) -> None:
    """And names the reason; the cases after a crash are compiled all the same."""
    assert any(REASONS[name] in reason for reason in gate.objections("sm_90", rejected[name]))


def test_what_is_rejected_is_all_that_was_tried(rejected: dict[str, gate.Outcome]) -> None:
    assert list(rejected) == list(REASONS)


# A loop whose second half was moved behind the end, as ptxas does with waits; an inner one in it; a branch that is no loop.
SASS = """
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   IADD3 R1, R1, 0x1, RZ ;
.L_x_3:
        /*0040*/               @P1 BRA `(.L_x_0) ;
        /*0050*/                   BRA `(.L_x_4) ;
.L_x_2:
        /*0060*/                   SYNCS R3 ;
        /*0070*/               @P2 BRA `(.L_x_2) ;
        /*0080*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*0090*/                   STG.E [R2], R4 ;
        /*00a0*/                   EXIT ;
"""

AMDGCN = """
\ts_mov_b32 s0, 0
.LBB0_1:                                ; %loop
\tv_mfma_f32_32x32x2_f32 a[0:15], v0, v1, a[0:15]
\ts_cbranch_scc0 .LBB0_1
\ts_branch .LBB0_3
\t.p2align 2
.LBB0_2:
\tv_mov_b32 v0, 0
.LBB0_3:
\ts_endpgm
"""


def opcodes(body: list[str]) -> list[str]:
    return [instruction.replace("@!P0 ", "").replace("@P1 ", "").replace("@P2 ", "").split()[0] for instruction in body]


def test_loops_are_found_wherever_their_blocks_lie() -> None:
    inner, outer = sorted(assembly.loops(assembly.sass(SASS)), key=len)
    assert opcodes(inner) == ["SYNCS", "BRA"]
    assert opcodes(outer) == ["HMMA.1688.F32.TF32", "BRA", "IADD3", "BRA", "SYNCS", "BRA", "BRA"]


def test_loops_of_amd_listings() -> None:
    (body,) = assembly.loops(assembly.amdgcn(AMDGCN))
    assert opcodes(body) == ["v_mfma_f32_32x32x2_f32", "s_cbranch_scc0"]


def test_code_without_loops_has_none() -> None:
    assert assembly.loops(assembly.sass("/*0000*/ EXIT ;\n/*0010*/ BRA `(.L_x_9) ;")) == []
    assert assembly.loops(assembly.sass("")) == []
