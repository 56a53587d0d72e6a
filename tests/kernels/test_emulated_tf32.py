"""The inverse kernels as a tensor core would run them: TF32 operands, cut or in three passes, emulated in the interpreter.

The interpreter multiplies in float32 whatever precision it is told. Here its product rounds operands as an NVIDIA tensor core
does; sums stay in float32, which a tensor core cuts a little. What is printed is an emulation, not a measurement on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.curvature.factorizations import cholesky
from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.kernels import ops, runtime, tuning

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton brings the interpreter")
CONDITIONS = (1e2, 1e3, 1e4, 1e5, 1e6)
# Certified error over certificate; sums of TF32 products are rounded more than the certificate's float32 estimate knows.
SLACK = 4.0


def cut(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The TF32 number that the tensor core makes of a float32: the last 13 bits are gone."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def multiply(a: NDArray[np.float32], b: NDArray[np.float32], precision: str) -> NDArray[np.float32]:
    if "TF32x3" in precision:
        high_a, high_b = cut(a), cut(b)
        low_a, low_b = cut(a - high_a), cut(b - high_b)
        return low_a @ high_b + high_a @ low_b + high_a @ high_b
    if "TF32" in precision:
        return cut(a) @ cut(b)
    return a @ b


@pytest.fixture(autouse=True)
def _tensor_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return interpreter.TensorHandle(multiply(a.data, b.data, str(precision)) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(runtime, "target", lambda device: runtime.Target("cuda", "sm_90", 4))
    # Tiles as large as they may be: the interpreter's time goes by their number, and only the order of sums changes.
    lookup = tuning.lookup

    def large_tiles(kernel: str, size: int, target: runtime.Target) -> tuning.Config:
        config = dict(lookup(kernel, size, target))
        side = min(256, 1 << (size - 1).bit_length())
        return config | {key: side for key in config if key in ("BLOCK", "BLOCK_K")}

    monkeypatch.setattr(tuning, "lookup", large_tiles)
    yield


def spectrum(n: int, condition: float) -> tuple[Tensor, Tensor]:
    """(eigenvectors, damped eigenvalues from 1 down to 1 / condition) in float64."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return basis, torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix.tril() + matrix.tril(-1).mT).float()


def errors(n: int, condition: float) -> dict[str, tuple[float, float]]:
    """(energy error, certificate) by method, for a factor with damping 1 / condition."""
    basis, values = spectrum(n, condition)
    damping = torch.tensor([1 / condition])
    identity = torch.eye(n, dtype=torch.float64)
    factor = symmetric((basis * (values - 1 / condition)) @ basis.T)[None]
    target = factor[0].double() + damping.double() * identity

    result = {}
    exact, bound = cholesky(factor, damping, False, torch.float32)
    result["Cholesky, float32"] = (energy_error(target, exact[0]), float(bound))

    inverse, residual = torch.empty_like(factor), torch.empty(1)
    ops.newton_schulz_inverse(factor, damping, inverse, residual, 5e-3, 20, backend="triton")
    result["cold, TF32 x 3"] = (energy_error(target, inverse[0]), float(residual))

    rows = (basis * values.sqrt()) @ torch.randn(n, 2 * n, dtype=torch.float64)  # the batch that the old factor lacks
    before = 0.9 * target + 0.1 * rows @ rows.T / (2 * n)
    root = torch.linalg.inv(torch.linalg.cholesky(before)).tril().float()[None]
    for name in ("warm, TF32", "warm, five refreshes"):
        for _ in range(1 if name == "warm, TF32" else 4):
            ops.factored_newton_refresh([factor], [damping], [root], [residual], 0.05, 4, backend="triton")
        t = root[0].double()
        result[name] = (energy_error(target, t.T @ t), float(residual))
    return result


@pytest.mark.parametrize("n", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (256, 1024))])
def test_table(n: int, show: Callable[..., None]) -> None:
    """Warm refreshes are fit for use at every condition; whatever is certified is as good as its certificate."""
    table = {condition: errors(n, condition) for condition in CONDITIONS}
    show(f"\nEnergy error (certificate), n = {n}, tensor cores emulated")
    show("  condition | " + " | ".join(f"{name:20}" for name in table[1e2]))
    for condition, row in table.items():
        cells = (f"{error:.0e} ({bound:.0e})" + ("" if bound <= ACCEPT else "*") for error, bound in row.values())
        show(f"  {condition:9.0e} | " + " | ".join(f"{cell:20}" for cell in cells))
    for row in table.values():
        assert all(row[name][0] <= ACCEPT for name in row if name.startswith("warm"))
        for error, bound in row.values():
            assert bound > ACCEPT or error <= SLACK * bound
            assert bound > ACCEPT or error < 1
    assert all(table[c]["cold, TF32 x 3"][1] <= ACCEPT for c in CONDITIONS[:-1])


def test_rounding_is_that_of_tf32() -> None:
    """The emulation itself: 10 explicit bits, towards zero; three passes are almost float32."""
    ulp = 2.0**-10
    values = np.array([1 + ulp, 1 + 1.99 * ulp, -1 - 1.5 * ulp, 1e-30, np.inf], dtype=np.float32)
    assert cut(values).tolist() == [1 + ulp, 1 + ulp, -1 - ulp, float(cut(values[3:4])[0]), np.inf]
    a, b = (np.random.default_rng(0).standard_normal((40, 40)).astype(np.float32) for _ in range(2))
    exact = a.astype(np.float64) @ b.astype(np.float64)

    def error(precision: str) -> float:
        return float(np.linalg.norm(multiply(a, b, precision) - exact) / np.linalg.norm(exact))

    assert 1e-4 < error("TF32") < 2e-3
    assert error("TF32x3") < 3e-6
    assert error("IEEE") < 1e-6


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")  # of numpy; a GPU does not remark on them
@pytest.mark.parametrize("power", range(-44, -27, 2))
def test_factors_near_the_end_of_float32_are_certified_rightly_or_not_at_all(power: int) -> None:
    """A tensor core loses what is below the normal numbers: of A, whose rest after TF32 is smaller by 2000, and of T A."""
    factor = (10.0**power * torch.stack([torch.diag(spectrum(24, 10.0)[1]) for _ in range(4)])).float()
    damping = torch.full((4,), 0.01 * 10.0**power)
    target = factor.double() + damping.double()[:, None, None] * torch.eye(24, dtype=torch.float64)
    root, residual = torch.linalg.inv(torch.linalg.cholesky(1.02 * target)).tril().float(), torch.empty(4)
    ops.factored_newton_refresh([factor], [damping], [root], [residual], 0.0, 2, backend="triton")
    assert (residual <= ACCEPT).all() == (power >= -34)
    for matrix, t, bound in zip(target, root.double(), residual.tolist(), strict=True):
        assert bound > ACCEPT or energy_error(matrix, t.T @ t) <= SLACK * bound
