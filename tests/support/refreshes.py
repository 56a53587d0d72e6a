"""Warm refreshes for the tests of both implementations: factors of known spectrum, calls, and what holds after any of them."""

from __future__ import annotations

import math

import torch
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.kernels import ops
from kfac_triton.kernels.certificate import mirror

# Certified error over certificate, see test_certificate.py. Tests that rest on a search, not on a proof, are derandomized.
SLACK = 2.5


def with_condition(n: int, condition: float, damping: float = 1.0) -> Tensor:
    """A factor in float64 whose damped eigenvalues go from damping to damping * condition."""
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    return mirror((basis * damping * (torch.logspace(0, math.log10(condition), n, dtype=torch.float64) - 1)) @ basis.T)


def exact_root(target: Tensor) -> Tensor:
    return torch.linalg.inv(torch.linalg.cholesky(target)).tril()


def refresh(
    factor: Tensor,
    damping: Tensor,
    root: Tensor,
    tolerance: float = 0.05,
    max_steps: int = 8,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Root and residual after a refresh; the residual starts as NaN, the root that came in stays."""
    root, residual = root.clone(), torch.full_like(damping, torch.nan)
    ops.factored_newton_refresh([factor], [damping], [root], [residual], tolerance, max_steps, backend=backend)
    return root, residual


def assert_honest(factor: Tensor, damping: Tensor, root: Tensor, residual: Tensor) -> None:
    """Finite and triangular whatever happened; where it is certified, certified rightly."""
    assert root.isfinite().all()
    assert torch.equal(root, root.tril())
    assert not residual.isnan().any()
    identity = torch.eye(factor.shape[-1], dtype=torch.float64)
    for a, d, t, certificate in zip(factor.double(), damping.double(), root.double(), residual.tolist(), strict=True):
        if certificate <= ACCEPT:
            error = energy_error(a + d * identity, t.T @ t)
            assert error < 1
            assert error <= SLACK * certificate
