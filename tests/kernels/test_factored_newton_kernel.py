"""The warm refresh as kernels, in either precision: the reference up to rounding, and what only kernels can do wrong."""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")


from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import energy_error
from support.refreshes import assert_honest, exact_root, refresh, with_condition
from torch import Tensor

from kfac_triton.kernels import ops, precision, runtime, tuning
from kfac_triton.kernels.certificate import damped, mirror, root_residual, rounding_error
from kfac_triton.kernels.factored_newton import tables
from kfac_triton.kernels.factored_newton.reference import POWER_STEPS
from kfac_triton.kernels.tiles import padded

MODES = ["ieee", "tf32"]
# The interpreter computes with numpy, which remarks on numbers that overflow; a GPU does not.
pytestmark = [
    pytest.mark.usefixtures("scratch_is_nan"),
    pytest.mark.filterwarnings("ignore:overflow|invalid value|All-NaN:RuntimeWarning"),
]
both_modes = pytest.mark.parametrize("mode", MODES)


def kernel(
    factor: Tensor, damping: Tensor, root: Tensor, tolerance: float = 0.05, max_steps: int = 8, mode: str = "ieee"
) -> tuple[Tensor, Tensor]:
    """Root and residual. NaN above the diagonal of the root that goes in, and zeros there when it comes out.

    "tf32" rounds and splits operands as on a tensor core; the interpreter then multiplies them exactly, as the core does.
    """
    above = torch.ones(factor.shape[-2:], dtype=torch.bool).triu(1)
    inputs = factor.clone(), damping.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "resolve", lambda purpose, target: mode)
        out, residual = refresh(factor, damping, root.masked_fill(above, torch.nan), tolerance, max_steps, backend="triton")
    assert torch.equal(out[:, above], torch.zeros_like(out[:, above]))
    for after, before in zip((factor, damping), inputs, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    return out, residual


def to_tf32(values: Tensor) -> Tensor:
    """Nearest number with 11 significant bits."""
    mantissa, exponent = torch.frexp(values.double())
    return torch.ldexp((mantissa * 2**11).round(), exponent - 11).float()


@st.composite
def problems(draw: st.DrawFn, most: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, damping, root): a size, and per matrix a condition number, a unit, a change of factor and of damping."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n = draw(st.integers(1, most))
    factors, dampings, roots = [], [], []
    for _ in range(draw(st.integers(1, batch))):
        unit, jump = 10 ** draw(st.floats(-6, 6)), draw(st.sampled_from([0.3, 1.0, 3.0]))
        change = draw(st.sampled_from([0.01, 0.1, 0.5, 3.0, 100.0]))
        exact = unit * with_condition(n, 10 ** draw(st.floats(0, 6)))
        identity = unit * torch.eye(n, dtype=torch.float64)
        rows = torch.randn(2 * n + 3, n, dtype=torch.float64) @ torch.linalg.cholesky(exact + identity).mT
        roots.append(exact_root((exact + change * rows.T @ rows / len(rows)) / (1 + change) + jump * identity))
        factors.append(exact)
        dampings.append(unit)
    return mirror(torch.stack(factors).float()), torch.tensor(dampings), torch.stack(roots).float()


def assert_close(
    factor: Tensor, damping: Tensor, actual: tuple[Tensor, Tensor], start: Tensor, steps: int, in_place_of: str
) -> None:
    """The kernel's root against the reference in float64, its residual against the reference in float32.

    The rounding estimate is a bound on the noise of M in energy units, and a step passes on less than that: the largest
    difference of roots in 720 draws was 0.37 of it. A residual 1.5 d^2 + 0.5 d^3 changes by its slope times that noise.
    """
    root, residual = actual
    exact, _ = refresh(factor.double(), damping.double(), start.double(), 0.0, steps, "torch")
    _, expected = refresh(factor, damping, start, 0.0, steps, "torch")
    target = damped(factor.double(), damping.double())
    noise = rounding_error(target, exact.square().sum(-2), torch.float32)
    difference = torch.linalg.matrix_norm((root.double() - exact) @ torch.linalg.cholesky(target))
    assert (difference <= noise).all(), in_place_of
    size = (expected.double() / 1.5).sqrt()
    allowed = (3 * size + 1.5 * size**2) * noise + 1.5 * noise**2 + 1e-5 * expected
    assert ((residual - expected).abs() <= allowed).all(), in_place_of


@settings(max_examples=8, deadline=None, derandomize=True)  # the fraction rests on draws, not on a proof
@given(problem=problems(200), steps=st.integers(1, 2))
def test_it_is_the_reference(problem: tuple[Tensor, Tensor, Tensor], steps: int) -> None:
    factor, damping, start = problem
    actual = kernel(factor, damping, start, tolerance=0.0, max_steps=steps)
    assert_close(factor, damping, actual, start, steps, "the root that came in")


@settings(max_examples=6, deadline=None, derandomize=True)
@given(problem=problems(120))
def test_a_step_in_tf32_is_the_reference_from_the_rounded_root(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    """T rounded to TF32 and A and Y in two parts: nothing else is lost, and the new root is not rounded."""
    factor, damping, start = problem
    actual = kernel(factor, damping, start, tolerance=0.0, max_steps=1, mode="tf32")
    assert_close(factor, damping, actual, to_tf32(start), 1, "its rounded root")


@both_modes
@settings(max_examples=6, deadline=None, derandomize=True)
@given(problem=problems(70), steps=st.integers(1, 3))
def test_what_it_certifies_holds(mode: str, problem: tuple[Tensor, Tensor, Tensor], steps: int) -> None:
    factor, damping, start = problem
    assert_honest(factor, damping, *kernel(factor, damping, start, max_steps=steps, mode=mode))


@both_modes
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    power=st.floats(0.1, 8),
    off=st.floats(-12, 12),
    kind=st.sampled_from(["noise", "scaled", "zero", "diagonal", "flipped"]),
    steps=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_starts_from_far_off(mode: str, n: int, power: float, off: float, kind: str, steps: int, seed: int) -> None:
    """Certified rightly or not at all."""
    torch.manual_seed(seed)
    factor, damping = with_condition(n, 10**power)[None], torch.ones(1, dtype=torch.float64)
    exact = exact_root(damped(factor, damping))
    start = {
        "noise": 10**off * torch.randn(1, n, n, dtype=torch.float64).tril(),
        "scaled": 10**off * exact,
        "zero": torch.zeros(1, n, n, dtype=torch.float64),
        "diagonal": 10**off * torch.eye(n, dtype=torch.float64)[None],
        "flipped": exact.flip(1, 2).mT.tril(),
    }[kind]
    factor, damping, start = factor.float(), damping.float(), start.float()
    root, residual = kernel(factor, damping, start, max_steps=steps, mode=mode)
    assert_honest(factor, damping, root, residual)
    if kind == "zero":
        assert residual == torch.inf
        assert torch.equal(root, start)


@pytest.mark.parametrize("scale", [1e-2, 10.0, 1e6])
@pytest.mark.parametrize(("n", "mode"), [(30, "tf32"), (70, "ieee")])
def test_a_wrong_unit_is_repaired(n: int, scale: float, mode: str) -> None:
    """The power iteration centres the spectrum first: a factor of a million costs no more than a factor of ten."""
    factor, damping = with_condition(n, 1e2)[None].float(), torch.ones(1)
    start = scale * exact_root(damped(factor.double(), damping.double())).float()
    root, residual = kernel(factor, damping, start, max_steps=4, mode=mode)
    assert residual <= 0.05
    assert_honest(factor, damping, root, residual)


@both_modes
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e10, 1e15, 1e18])
def test_squares_beyond_the_type_do_not_stop_a_repair(scale: float, mode: str) -> None:
    """The residual's entries are numbers, the sum of their squares is not."""
    factor, damping = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.ones(1)
    root, residual = kernel(factor, damping, scale * torch.tensor([[[1.0, 0.0], [0.5, -0.3]]]), mode=mode)
    assert_honest(factor, damping, root, residual)
    assert (residual <= 0.05) == (scale > 1e-20)


@both_modes
@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("scale", [1e20, 1e30, 3e38])
def test_a_start_whose_residual_overflows_keeps_its_root(scale: float, steps: int, mode: str) -> None:
    factor, damping = torch.diag(torch.tensor([1.0, 3.0]))[None], torch.ones(1)
    start = scale * torch.tensor([[[1.0, 0.0], [0.5, -0.3]]])
    root, residual = kernel(factor, damping, start, max_steps=steps, mode=mode)
    assert residual == torch.inf
    assert torch.equal(root, start)


@both_modes
@pytest.mark.parametrize("where", ["factor", "damping", "root"])
def test_what_is_not_finite_keeps_its_root_and_harms_no_other(where: str, mode: str) -> None:
    factor = torch.stack([with_condition(18, 1e3)] * 4).float()
    damping = torch.tensor([1.0, 1.0, 1.0, 1.5])
    start = exact_root(damped(1.2 * factor.double(), damping.double())).float()
    clean, certificates = kernel(factor, damping, start, max_steps=1, mode=mode)
    for i, bad in ((1, torch.nan), (2, torch.inf)):
        if where == "factor":
            factor[i, 4, 17] = factor[i, 17, 4] = bad
        elif where == "damping":
            damping[i] = bad
        else:
            start[i, 17, 4] = bad
    root, residual = kernel(factor, damping, start, max_steps=1, mode=mode)
    assert (residual[1:3] == torch.inf).all()
    torch.testing.assert_close(root[1:3], start[1:3], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(root[::3], clean[::3])
    assert torch.equal(residual[::3], certificates[::3])


@pytest.mark.parametrize(("n", "mode"), [(20, "tf32"), (70, "ieee")])
def test_matrices_of_one_stack_do_not_know_each_other(n: int, mode: str) -> None:
    """Near and far ones, dampings apart: to the last bit as if each were alone, also in the number of its steps."""
    factor = torch.stack([with_condition(n, c) for c in (10.0, 1e3, 1e2)])
    start = exact_root(damped(factor, torch.ones(3, dtype=torch.float64))).float()
    factor, damping = factor.float(), torch.tensor([1.0, 3.0, 0.3])
    root, residual = kernel(factor, damping, start, max_steps=5, mode=mode)
    assert (residual <= 0.05).all()
    for i in range(3):
        one = slice(i, i + 1)
        alone, certificate = kernel(factor[one], damping[one], start[one], max_steps=5, mode=mode)
        assert torch.equal(root[one], alone)
        assert torch.equal(residual[one], certificate)


@both_modes
def test_it_stops_when_the_tolerance_is_met(mode: str) -> None:
    """One step in any case; later steps change not one bit."""
    factor, damping = with_condition(15, 1e2)[None].float(), torch.ones(1)
    start = exact_root(damped(1.3 * factor.double(), damping.double())).float()
    residuals = [kernel(factor, damping, start, 0.0, steps, mode)[1] for steps in (1, 2, 3)]
    assert residuals[0] > 0.05 > residuals[1]
    twice, residual = kernel(factor, damping, start, 0.05, 2, mode)
    many, certificate = kernel(factor, damping, start, 0.05, 4, mode)
    assert torch.equal(twice, many)
    assert residual == certificate == residuals[1]
    nearer, certificate = kernel(factor, damping, start, 0.0, 3, mode)
    assert not torch.equal(nearer, many)
    assert certificate < residual


@pytest.mark.parametrize(("tolerance", "goes_on"), [(10.0, False), (0.0, True)])
def test_operands_of_the_next_step_are_written_for_matrices_that_go_on(
    tolerance: float, goes_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T rounded, and its transpose in Y's place, whose upper tiles are never written otherwise."""
    n, target = 84, runtime.target(torch.device("cpu"))
    block, plan = (tuning.lookup(key, n, target)["BLOCK"] for key in ("factored_newton", "factored_newton_plan"))
    factor, damping = with_condition(n, 1e2)[None].float(), torch.ones(1)
    start = exact_root(damped(1.3 * factor.double(), damping.double())).float()
    places = tables.layout(((1, n),), block, plan, 2 * (POWER_STEPS + 1), True, False).places[0]
    scratches: list[Tensor] = []
    empty = torch.empty

    def remembered(*size: Any, **options: Any) -> Tensor:
        scratches.append(empty(*size, **options))
        return scratches[-1]

    monkeypatch.setattr(torch, "empty", remembered)
    kernel(factor, damping, start, tolerance, 2, "tf32")
    monkeypatch.undo()
    scratch = max(scratches, key=Tensor.numel)
    side = padded(n)
    product, rounded = (
        scratch[places[field - tables.TRANSPOSED] :][: n * side].view(n, side)[:, :n]
        for field in (tables.PRODUCT, tables.ROUNDED)
    )
    corner = product[:block, block:]  # beyond the diagonal tiles
    assert corner.numel() and bool(corner.isnan().all()) != goes_on
    assert torch.equal(rounded.tril(), to_tf32(start)[0].tril()) != goes_on


def test_no_step_is_no_step() -> None:
    factor, damping = with_condition(20, 1e2)[None].float(), torch.ones(1)
    start = torch.eye(20)[None]
    root, residual = kernel(factor, damping, start, max_steps=0)
    assert torch.equal(root, start)
    assert residual == torch.inf


def test_the_residual_counts_rounding() -> None:
    """From a converged root, little else is left: the estimate of certificate.py, from sums over tiles."""
    factor, damping = with_condition(70, 1e4)[None].float(), torch.ones(1)
    start = exact_root(damped(factor.double(), damping.double())).float()
    target = damped(factor, damping)
    _, distance, rounding = root_residual(target, start)
    _, residual = kernel(factor, damping, start, max_steps=1)
    assert 1.5 * distance**2 <= 1e-3 * rounding
    torch.testing.assert_close(residual, rounding, rtol=2e-3, atol=0)


def test_a_root_from_tf32_products_is_not_a_tf32_root() -> None:
    """Rounded to TF32 it would have 20 times the error: what the tensor core multiplies is a copy."""
    factor, damping = with_condition(120, 1e4)[None].float(), torch.ones(1)
    target = damped(factor.double(), damping.double())
    start = exact_root(damped(1.1 * factor.double(), damping.double())).float()
    root, _ = kernel(factor, damping, start, tolerance=0.01, mode="tf32")
    error, rounded = (energy_error(target[0], t.mT @ t) for t in (root[0].double(), to_tf32(root)[0].double()))
    assert error <= rounded / 20


@both_modes
def test_parts_of_wider_stacks(mode: str) -> None:
    """Leading blocks of padded stacks, every other matrix, a damping with gaps; the pad is neither read nor written."""
    n, pad = 29, 5
    factor = torch.stack([with_condition(n, 1e3)] * 2).float()
    start = exact_root(damped(1.3 * factor.double(), torch.ones(2, dtype=torch.float64))).float()
    expected, certificates = kernel(factor, torch.ones(2), start, max_steps=2, mode=mode)
    wide_factor, wide_root = torch.full((4, n + pad, n + pad), torch.nan), torch.full((3, n + pad, n + pad + 3), torch.nan)
    wide_factor[::2, :n, :n], wide_root[1:, :n, :n] = factor, start
    damping, residual = torch.ones(2, 3)[:, 1], torch.full((2,), torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precision, "resolve", lambda purpose, target: mode)
        ops.factored_newton_refresh(
            [wide_factor[::2, :n, :n]], [damping], [wide_root[1:, :n, :n]], [residual], max_steps=2, backend="triton"
        )
    assert torch.equal(wide_root[1:, :n, :n], expected)
    assert torch.equal(residual, certificates)
    wide_root[1:, :n, :n] = torch.nan
    assert wide_root.isnan().all()


def test_the_default_type_of_torch_does_not_matter() -> None:
    factor, damping, start = torch.eye(20)[None], torch.ones(1), 0.9 * torch.eye(20)[None]
    expected = kernel(factor, damping, start, max_steps=1, mode="tf32")
    torch.set_default_dtype(torch.float64)
    try:
        actual = kernel(factor, damping, start, max_steps=1, mode="tf32")
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_what_is_lost_below_the_normal_numbers_is_in_the_residual() -> None:
    """T B is a number of few digits here, which makes M wrong by more than its rounding."""
    factor = torch.logspace(-43.2, -38, 200, dtype=torch.float64).float()[:, None, None]
    start = 10 ** torch.empty(len(factor)).uniform_(2.5, 4)[:, None, None]
    damping = torch.full((len(factor),), 1.4e-45)
    root, residual = kernel(factor, damping, start)
    error = (root.double() ** 2 * (factor.double() + damping.double()[:, None, None]) - 1).abs().flatten()
    certified = residual.isfinite()
    assert certified.sum() > 100
    floor = 2e-6  # below it a certificate says no more than that float32 was used
    assert error[certified].max() > floor
    assert (error <= residual.clamp_min(floor))[certified].all()
