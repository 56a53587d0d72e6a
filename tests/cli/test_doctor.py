"""`kfac-triton doctor`: what it says of a machine, and that it finds wrong kernels."""

import dataclasses
import math
import re

import pytest
import torch

from kfac_triton import __version__
from kfac_triton.cli import main
from kfac_triton.cli.tuning import doctor
from kfac_triton.cli.tuning.checks import (
    ColdInverses,
    Covariance,
    Preconditioning,
    RowSource,
    WarmInverses,
    kernel_obstacle,
    worst,
)
from kfac_triton.kernels import operators, ops, runtime
from kfac_triton.kernels.covariance import launch as covariance_launch

CPU = torch.device("cpu")
OPERATIONS = ("covariance_ema", "newton_schulz_inverse", "factored_newton_refresh", "orthogonal_iteration", "precondition")


@pytest.mark.parametrize("sides", [(16,), pytest.param(doctor._INTERPRETED_SIDES, marks=pytest.mark.slow)], ids=str)
def test_a_sound_installation(sides, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_INTERPRETED_SIDES", sides)
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert f"kfac_triton {__version__}, torch {torch.__version__}" in out
    assert "Kernels: in Triton's interpreter, configurations from interpreter.json" in out
    assert "All kernels and references are right." in out
    for operation in OPERATIONS:
        assert re.search(rf"  {operation}: torch \(the interpreter is for checks", out)
        for backend in ("torch", "triton"):
            assert re.search(rf"right  {operation} of .*, {backend}: error .*, allowed .*, .* s", out)


def test_a_machine_where_no_kernel_can_run(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "Kernels: none can run; Triton compiles for GPUs, and this is cpu; set TRITON_INTERPRET=1" in out
    assert re.search(r"precondition: torch \(Triton compiles for GPUs, and this is cpu", out)
    assert ", triton: " not in out
    assert "All references (no kernel can run) are right." in out


def test_without_triton_the_reason_is_said(monkeypatch, capsys):
    monkeypatch.setattr(runtime, "AVAILABLE", False)
    monkeypatch.setattr(runtime, "WHY_UNAVAILABLE", "Triton is not installed")
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "covariance_ema: torch (Triton is not installed)" in capsys.readouterr().out


def damaged(monkeypatch, operation, damage):
    right = getattr(ops, operation)

    def wrong(*arguments, backend):
        right(*arguments, backend=backend)
        if backend == "triton":
            damage(*arguments)

    monkeypatch.setattr(ops, operation, wrong)


@pytest.mark.parametrize(
    ("operation", "damage"),
    [
        ("covariance_ema", lambda factors, *rest: factors[0][3, 3].add_(1.0)),
        ("covariance_ema", lambda factors, *rest: factors[-1][0, 1].mul_(1 + 1e-5)),  # not symmetric
        ("newton_schulz_inverse", lambda factor, damping, inverse, *rest: inverse.mul_(1.1)),
        ("newton_schulz_inverse", lambda factor, damping, inverse, residual, *rest: residual.fill_(1e-12)),  # a false promise
        ("factored_newton_refresh", lambda factors, dampings, roots, *rest: roots[0].mul_(1.1)),
        ("factored_newton_refresh", lambda factors, dampings, roots, residuals, *rest: residuals[0].fill_(1e-12)),
        ("orthogonal_iteration", lambda factors, bases, *rest: bases[0].mul_(1.001)),
        ("orthogonal_iteration", lambda factors, bases, *rest: bases[0].copy_(bases[0].roll(1, -1))),  # not that of the factor
        ("precondition", lambda gradient, left, right, out, *rest: out[0, 0].zero_()),
        ("precondition", lambda gradient, left, right, out, product, *rest: product[0].mul_(1.1)),
        ("precondition", lambda gradient, left, right, out, *rest: out[0, 0, 0].fill_(math.nan)),
    ],
)
def test_a_wrong_kernel_is_an_exit_status(operation, damage, monkeypatch, capsys):
    alone = [problem for problem in doctor.problems(CPU, (16,)) if problem.operation == operation]
    monkeypatch.setattr(doctor, "problems", lambda device: iter(alone))
    damaged(monkeypatch, operation, damage)
    assert main(["doctor", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"WRONG  {operation} of .*, triton", out) and not re.search("WRONG .*, torch:", out)
    assert re.search(r"\d+ of \d+ results are wrong", out)


def test_a_kernel_that_does_not_compile_is_a_finding(monkeypatch):
    def fail(*arguments, backend):
        raise RuntimeError("PassManager::run failed\nmany lines")

    monkeypatch.setattr(ops, "precondition", fail)
    finding = doctor.examine(Preconditioning("p", {(16, 16): 1}, CPU), "triton")
    assert not finding.right
    assert str(finding) == "  WRONG  precondition of p, triton: RuntimeError: PassManager::run failed"


def test_an_error_that_is_no_number_is_not_right():
    assert not doctor.Finding(Preconditioning("p", {(16, 16): 1}, CPU), "triton", math.nan, 0.0).right
    assert worst([0.1, math.nan, 0.2]) == math.inf and worst([0.1, 0.2]) == 0.2


def test_what_a_kernel_cannot_serve_is_said():
    problem = Covariance("float64 rows", [RowSource(torch.randn(8, 4, dtype=torch.float64))])
    assert "inputs[0] is torch.float64" in kernel_obstacle(problem)
    assert doctor.choice(problem) == ("torch", kernel_obstacle(problem))
    assert covariance_launch.can_use(*problem.operands[0]) == kernel_obstacle(problem)


def test_where_the_library_is_preferred_that_is_said_and_checked(monkeypatch, capsys):
    preferred = dataclasses.replace(operators.OPERATORS["precondition"], prefers_library=lambda device: True)
    monkeypatch.setitem(operators.OPERATORS, "precondition", preferred)
    problem = Preconditioning("wide", {(16, 528): 1}, CPU)
    assert kernel_obstacle(problem) is None, "the kernel could serve"
    assert doctor.choice(problem)[0] == "library"
    monkeypatch.setattr(doctor, "problems", lambda device: [problem])
    assert main(["doctor", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "precondition: library (its TF32 products" in printed
    assert "right  precondition of wide, auto: error" in printed


def test_every_problem_starts_from_poison():
    """Nothing that a kernel leaves out passes for its result."""
    for problem in (
        ColdInverses("c", {16: 2}, CPU),
        WarmInverses("w", {16: 2}, CPU),
        Preconditioning("p", {(16, 32): 2}, CPU),
        Covariance("a", [RowSource(torch.randn(8, 4))]),
    ):
        problem.check("torch")
        problem.prepare()
        assert not problem.is_right(problem.error()), problem.operation
        assert problem.is_right(problem.check("torch")), problem.operation


def test_patches_are_those_of_the_operation():
    """The oracle unfolds; a border, a stride and a dilation of its own kind in each dimension."""
    images = torch.randint(-3, 4, (3, 2, 9, 8)).float()
    rows = RowSource(images, ops.window((3, 2), (2, 1), (1, 0), (1, 2)), ones=True)
    problem = Covariance("conv", [rows], whole=True)
    assert rows.matrix(torch.float32).shape == (3 * 5 * 6, 2 * 3 * 2 + 1)
    assert problem.check("torch") == problem.check("triton") == 0.0
