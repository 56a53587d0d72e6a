"""The Triton kernels of the cold inverse, in the interpreter where there is no GPU: against the reference and float64."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.kernels import ops, tuning
from kfac_triton.kernels.certificate import MULTIPLIED, damped, mirror, rounding_error
from kfac_triton.kernels.newton_schulz import kernel as newton_schulz_kernel
from kfac_triton.kernels.newton_schulz import launch as newton_schulz_launch
from kfac_triton.kernels.newton_schulz.reference import EDGE, LEAST, MOST, chebyshev_step, newton_schulz_inverse_reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of infinities

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# An error is at most this many times what its certificate states: measured in test_certificate, for the reference.
SLACK = 2.5
PATHS = ["fused", "stages"]
KERNELS = [name for name in vars(newton_schulz_kernel) if name.endswith("_kernel")]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small matrices by either path; by stages with tiles so small that there are several."""
    if request.param == "stages":
        in_stages(monkeypatch)
    return request.param


def in_stages(patch: pytest.MonkeyPatch) -> None:
    tables = {"newton_schulz_fused": {"FUSED": 0}}
    patch.setattr(tuning, "lookup", lambda kernel, size, target: tables.get(kernel, {"BLOCK": 16, "BLOCK_K": 16}))


def factor(n: int, condition: float, unit: float = 1.0) -> Tensor:
    """A positive semidefinite matrix in float64, of many scales and not of full rank, its rows in units up to 30 apart.

    The units are what makes || I - B X ||_F many times the error in the energy norm.
    """
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    spectrum = condition ** -torch.rand(n, dtype=torch.float64)
    spectrum[: n // 5] = 0
    rows = torch.logspace(0, -1.5, n, dtype=torch.float64)
    return unit * mirror((basis * spectrum) @ basis.T * rows[:, None] * rows)


def stack(n: int, conditions: list[float], units: list[float]) -> tuple[Tensor, Tensor]:
    factors = torch.stack([factor(n, c, u) for c, u in zip(conditions, units, strict=True)])
    damping = torch.tensor([u / c for c, u in zip(conditions, units, strict=True)])
    return factors.float().to(DEVICE), damping.to(DEVICE)


def invert(factors: Tensor, damping: Tensor, tolerance: float = 1e-2, max_steps: int = 12) -> tuple[Tensor, Tensor]:
    """By the kernels. Outputs and every buffer start as NaN: none is read before it is written."""
    inverse, residual = torch.full_like(factors, torch.nan), torch.full_like(damping, torch.nan)
    before, empty = factors.clone(), torch.empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", lambda *size, **kind: empty(*size, **kind).fill_(torch.nan))
        ops.newton_schulz_inverse(factors, damping, inverse, residual, tolerance, max_steps, backend="triton")
    torch.testing.assert_close(factors, before, rtol=0, atol=0, equal_nan=True)
    return inverse, residual


def assert_sound(factors: Tensor, damping: Tensor, tolerance: float, max_steps: int = 20) -> None:
    """Equal to the reference, bitwise symmetric, and certified honestly.

    Both implementations evaluate one polynomial of B, each with a rounding error of at most SLACK times what
    `rounding_error` estimates: in the energy norm they are no further apart than twice that. The certificate computes its
    residual in float32, which costs it as much once.
    """
    inverse, residual = invert(factors, damping, tolerance, max_steps)
    assert torch.equal(inverse, inverse.mT)
    expected, certificate = torch.empty_like(factors), torch.empty_like(damping)
    newton_schulz_inverse_reference(factors, damping, expected, certificate, tolerance, max_steps)
    target = damped(factors, damping)
    rounding = rounding_error(target, inverse.diagonal(dim1=-2, dim2=-1), torch.float32, MULTIPLIED).tolist()
    identity = torch.eye(factors.shape[-1], dtype=torch.float64)
    for matrix, shift, x, y, stated, noise in zip(
        *(tensor.cpu().double() for tensor in (factors, damping, inverse, expected)), residual.tolist(), rounding, strict=True
    ):
        exact = matrix + shift * identity
        lower = torch.linalg.cholesky(exact)
        assert torch.linalg.matrix_norm(lower.T @ (x - y) @ lower, 2) <= 2 * SLACK * noise
        truncation = torch.linalg.matrix_norm(identity - lower.T @ x @ lower)
        assert abs(stated - truncation - noise) <= SLACK * noise
        assert energy_error(exact, x) <= SLACK * stated


@st.composite
def stacks(draw: st.DrawFn, most: int, power: float) -> tuple[Tensor, Tensor]:
    """(factors, dampings): one size, each matrix with a condition number and a unit of its own."""
    torch.manual_seed(draw(st.integers(0, 2**32)))
    n, batch = draw(st.integers(1, most)), draw(st.integers(1, 3))
    conditions = [10 ** draw(st.floats(0.5, power)) for _ in range(batch)]
    return stack(n, conditions, [10 ** draw(st.floats(-12, 12)) for _ in range(batch)])


tolerances = st.sampled_from([1e-1, 1e-2, 1e-3])


@settings(max_examples=40, deadline=None, derandomize=True)  # the slack rests on a search, not on a proof
@given(stacks(64, 7), tolerances)
def test_fused_equals_the_reference(stack: tuple[Tensor, Tensor], tolerance: float) -> None:
    assert_sound(*stack, tolerance)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(stacks(40, 3), tolerances)
def test_stages_equal_the_reference(stack: tuple[Tensor, Tensor], tolerance: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        in_stages(patch)
        assert_sound(*stack, tolerance, max_steps=11)


@pytest.mark.parametrize(
    ("n", "conditions", "steps"), [(65, [1e3, 1e1], 10), (70, [1e6], 16), (131, [1e2], 8), (200, [1e1], 6)]
)
def test_larger_matrices_as_shipped(n: int, conditions: list[float], steps: int) -> None:
    """In the second, rounding outweighs truncation."""
    assert_sound(*stack(n, conditions, [1.0, 1e-3][: len(conditions)]), 1e-2, steps)


@pytest.mark.parametrize("steps", [-1, 0, 1, 2, 3])
def test_few_steps(path: str, steps: int) -> None:
    """A step count of either parity, and none at all."""
    assert_sound(*stack(19, [1e3, 1e1], [1.0, 1.0]), 1e-2, steps)


def test_a_tolerance_that_asks_for_no_step(path: str) -> None:
    """What comes out is where the iteration starts: 1 / the Frobenius norm, which by stages is the sum of several tiles."""
    n = 18 if path == "fused" else 70
    factors, damping = stack(n, [1e2, 1e3], [1.0, 1e4])
    inverse, residual = invert(factors, damping, tolerance=1.0, max_steps=1)
    norm = torch.linalg.matrix_norm(damped(factors, damping).double()).float()
    expected = torch.diag_embed((1 / norm)[:, None].expand(-1, n))
    torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=0)
    assert (residual > 1).all()


def test_matrices_of_one_stack_do_not_know_each_other(path: str) -> None:
    """Fast and slow ones together: each as if it were alone, bit for bit."""
    factors, damping = stack(21, [1.5, 1e2, 1e3, 1e1], [1.0, 1e-6, 1.0, 1e6])
    inverse, residual = invert(factors, damping, max_steps=9)
    for i in range(4):
        alone, certificate = invert(factors[i : i + 1], damping[i : i + 1], max_steps=9)
        assert torch.equal(inverse[i], alone[0])
        assert torch.equal(residual[i], certificate[0])


def test_the_zero_matrix(path: str) -> None:
    """Only damping: the inverse is 1 / damping on the diagonal, exactly zero elsewhere, and the certificate no estimate.

    R is diagonal and each of its entries rounded twice, by u at most, since B X is close to 1.
    """
    n, u = 20, torch.finfo(torch.float32).eps / 2
    factors, damping = torch.zeros(2, n, n, device=DEVICE), torch.tensor([1e-3, 5.0], device=DEVICE)
    inverse, residual = invert(factors, damping, tolerance=1e-6)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1)
    assert torch.equal(inverse, torch.diag_embed(diagonal))
    share = damping.double()[:, None] * diagonal.double()
    assert (share - 1).abs().max() <= 1e-6 + 100 * u  # of some seven steps, each with a handful of roundings
    expected = torch.linalg.vector_norm(1 - share, dim=1) + MULTIPLIED * u * share.sum(1)
    assert (residual - expected).abs().max() <= 2 * u * n**0.5


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_never_certified_and_harms_no_other(path: str, bad: float) -> None:
    """Between two sound matrices: broken in the last entry, off the diagonal, and in the damping."""
    factors, damping = stack(18, [1e2] * 5, [1.0] * 5)
    expected, certificates = invert(factors, damping, max_steps=6)
    for i, where in ((1, (17, 17)), (2, (17, 2))):
        factors[i][where] = factors[i][where[::-1]] = bad
    damping[3] = bad
    inverse, residual = invert(factors, damping, max_steps=6)
    assert (residual[1:4] == torch.inf).all()
    assert torch.equal(inverse[::4], expected[::4])
    assert torch.equal(residual[::4], certificates[::4])


@pytest.mark.parametrize("exponent", [-100, -40, 40, 90])
def test_powers_of_two_as_units_change_nothing(path: str, exponent: int) -> None:
    """(s A + s d I)^-1 = (A + d I)^-1 / s, bit for bit: neither squares nor norms leave float32."""
    factors, damping = stack(23, [1e3], [1.0])
    inverse, residual = invert(factors, damping)
    scaled, certificate = invert(factors * 2.0**exponent, damping * 2.0**exponent)
    assert torch.equal(scaled * 2.0**exponent, inverse)
    assert torch.equal(certificate, residual)


@pytest.mark.parametrize("n", [13, 37])
def test_parts_of_wider_stacks(path: str, n: int) -> None:
    """Padded storage, as a factor bank has it: read and written inside the matrix alone. Dampings may lie apart."""
    factors, damping = stack(n, [1e1, 1e2], [1.0, 1.0])
    inverse, residual = invert(factors, damping, max_steps=5)
    wide = torch.full((2, n + 3, n + 11), torch.nan, device=DEVICE)
    wide[:, :n, :n] = factors
    out = torch.full((2, n + 2, n + 5), torch.nan, device=DEVICE)
    spread = torch.stack([damping, torch.full_like(damping, torch.nan)], 1)
    certificate = torch.full_like(damping, torch.nan)
    ops.newton_schulz_inverse(wide[:, :n, :n], spread[:, 0], out[:, :n, :n], certificate, 1e-2, 5, backend="triton")
    assert torch.equal(out[:, :n, :n], inverse)
    assert torch.equal(certificate, residual)
    assert out[:, n:].isnan().all()
    assert out[:, :, n:].isnan().all()


def test_one_matrix_for_many_dampings(path: str) -> None:
    """Stride 0 between the matrices."""
    factors, _ = stack(17, [1e2], [1.0])
    damping = torch.tensor([1e-2, 1e-1, 1.0], device=DEVICE)
    assert_sound(factors.expand(3, 17, 17), damping, 1e-2, max_steps=8)


def test_a_norm_beyond_float32_is_not_certified(path: str) -> None:
    factors, damping = stack(18, [1e1, 1e1], [1e38, 1.0])
    factors[0] = 3e38
    _, residual = invert(factors, damping)
    assert residual[0] == torch.inf
    assert residual[1] < 1


@pytest.mark.parametrize("tolerance", [5e-3, 0.0])
def test_the_schedule_is_the_references(tolerance: float) -> None:
    """Coefficients, their number and the parity that follows from it, of spectra from harmless to hopeless."""
    damping = torch.tensor([0.9999, 0.995, 0.5, 1e-1, 1e-3, 1e-8, 1e-30, 0.0, -1.0, 2.0, torch.nan], device=DEVICE)
    batch, steps = len(damping), 24
    squares = torch.full((batch, 3), 1 / 3, dtype=torch.float64, device=DEVICE)
    uppers = torch.full((batch,), torch.nan, device=DEVICE)
    schedule = torch.full((steps + 1, batch, newton_schulz_kernel.ROW), torch.nan, device=DEVICE)
    newton_schulz_kernel.schedule_kernel[(batch,)](
        squares, damping, uppers, schedule, batch, 3, steps, TOLERANCE=tolerance, EDGE=EDGE, LEAST=LEAST, MOST=MOST,
        CHUNK=2, enable_fp_fusion=False,
    )  # fmt: skip
    assert (uppers == 1).all()
    for i, lower in enumerate(damping.cpu().double().clamp(LEAST, 1.0).split(1)):
        rows = []
        while len(rows) < steps and 1 - lower > tolerance:
            h0, h1, lower = chebyshev_step(lower.clamp_max(MOST))
            rows.append(torch.cat([h0, h1]).float())
        taken = schedule[: len(rows), i].cpu()
        assert torch.equal(taken[:, :2], torch.stack(rows) if rows else taken[:, :2])
        assert schedule[:, i, 2].tolist() == [max(len(rows) - step, 0) for step in range(steps + 1)]
        assert schedule[:, i, 3].tolist() == [0.0] + [-1.0] * steps
        if not rows:
            assert schedule[0, i, :2].tolist() == [1.0, 0.0]


def counting(launches: Counter[str], name: str, kernel: Any) -> Any:
    class Counting:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
            launches[name] += 1
            return kernel[grid]

    return Counting()


def test_the_number_of_launches_does_not_depend_on_the_stack(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    launches: Counter[str] = Counter()
    for name in KERNELS:
        monkeypatch.setattr(newton_schulz_kernel, name, counting(launches, name, getattr(newton_schulz_kernel, name)))
    for batch in (1, 5):
        launches.clear()
        invert(*stack(18, [1e2] * batch, [1.0] * batch), max_steps=8)
        counts.append(dict(launches))
    assert counts[0] == counts[1]
    stages = dict.fromkeys(set(KERNELS) - {"fused_kernel"}, 1) | {"step_kernel": 8}
    assert counts[0] == ({"fused_kernel": 1} if path == "fused" else stages)
    launches.clear()
    invert(torch.zeros(0, 18, 18, device=DEVICE), torch.zeros(0, device=DEVICE))
    assert not launches


def test_the_kernels_wait_for_nobody(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No number is read on the host: the launcher runs with kernels that do nothing, on tensors without data."""

    class Idle:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **options: None

    for name in KERNELS:
        monkeypatch.setattr(newton_schulz_kernel, name, Idle())
    target = newton_schulz_launch.runtime.Target("cuda", "sm_90", 132)
    monkeypatch.setattr(newton_schulz_launch.runtime, "target", lambda device: target)
    meta = {"device": "meta"}
    newton_schulz_launch.launch(
        torch.empty(2, 70, 70, **meta), torch.empty(2, **meta), torch.empty(2, 70, 70, **meta), torch.empty(2, **meta), 1e-2, 5
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda a: {k: v.double() for k, v in a.items()}, "factor is torch.float64", id="float64"),
        pytest.param(
            lambda a: a | {"inverse": a["inverse"].new_empty(2, 6, 12)[:, :, ::2]}, "inverse has columns 2", id="step"
        ),
        pytest.param(
            lambda a: a | {"factor": a["factor"].new_empty(2, 6, 12)[:, :, ::2]}, "factor has columns 2", id="step in"
        ),
        pytest.param(lambda a: a | {"residual": a["residual"].new_empty(2, 2)[:, 0]}, "residual has numbers 2", id="residual"),
        pytest.param(lambda a: a | {"inverse": a["factor"]}, "inverse and factor are the same memory", id="in place"),
        pytest.param(lambda a: a | {k: a[k][:, :0, :0] for k in ("factor", "inverse")}, "the matrices are empty", id="empty"),
    ],
)
def test_what_the_kernels_cannot_serve(change: Callable[[dict[str, Tensor]], dict[str, Tensor]], reason: str) -> None:
    factors, damping = stack(6, [1e1, 1e2], [1.0, 1.0])
    plain = {"factor": factors, "damping": damping, "inverse": torch.zeros_like(factors), "residual": torch.zeros(2).to(DEVICE)}
    ops.newton_schulz_inverse(**plain, backend="triton")
    with pytest.raises(ValueError, match=rf"newton_schulz_inverse: {reason}"):
        ops.newton_schulz_inverse(**change(plain), backend="triton")


def test_a_stack_that_a_launch_cannot_count() -> None:
    meta = torch.empty(1, 40000, 40000, device="meta").expand(400, -1, -1)
    small = torch.empty(400, device="meta")
    assert "400 matrices of side 40000" in str(
        newton_schulz_launch.can_use(meta, small, torch.empty(400, 1, 1, device="meta"), small, 1e-2, 5)
    )
