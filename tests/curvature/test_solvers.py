"""Solves of every kind of inverse, on either side, against dense linear systems in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton.curvature.diagonal import DiagonalBasis, DiagonalFactors, DiagonalInverse
from kfac_triton.curvature.eigenbasis import EigenStack
from kfac_triton.curvature.groups import SideGroup, TileGroup
from kfac_triton.curvature.inverse import Inverse, InverseStack
from kfac_triton.curvature.solvers import EigenSolve, InverseSolve
from kfac_triton.kernels import precision

N, DAMPING = 16, 0.1
PLACES = {"neighbours": (1, 2), "shared": (2, 0), "one twice": (1, 1)}


def _dense(kind: str) -> tuple[Inverse, Tensor]:
    root = torch.randn(3, N, N, dtype=torch.float64)
    factors = root @ root.mT / N
    stack = EigenStack(factors, [N] * 3) if kind == "basis" else InverseStack(factors, kind, 1e-12)
    stack.refresh(factors, torch.full((3,), DAMPING).double())
    return stack, factors


def _diagonal(kind: str) -> tuple[Inverse, Tensor]:
    store = DiagonalFactors([N] * 3, torch.float64, torch.device("cpu"))
    store.factors.copy_(torch.rand(3 * N))
    inverse = DiagonalBasis(store) if kind == "basis" else DiagonalInverse(store)
    inverse.refresh(store.factors, torch.full((3,), DAMPING))
    return inverse, torch.diag_embed(store.factors.view(3, N))


SIDES = {"dense": _dense, "diagonal": _diagonal}


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize(("g_side", "a_side"), [*itertools.product(SIDES, repeat=2)])
@pytest.mark.parametrize("kind", ["cholesky", "factored", "basis"])
def test_a_solve_is_that_of_the_dense_system(kind: str, g_side: str, a_side: str, places: str) -> None:
    """Split damping: (G + damping I) V (A + damping I) = W. Exact damping: G V A + damping V = W."""
    (left, g_factors), (right, a_factors) = SIDES[g_side](kind), SIDES[a_side](kind)
    group = TileGroup((0, 1), SideGroup(1, PLACES[places]), SideGroup(0, PLACES[places]))
    gradient = torch.randn(2, N, N, dtype=torch.float64)
    update, product = torch.zeros_like(gradient), torch.zeros(2, dtype=torch.float64)
    solve: EigenSolve | InverseSolve
    if kind == "basis":
        solve = EigenSolve(group, left, right)  # type: ignore[arg-type]
        solve.damping = DAMPING
    else:
        solve = InverseSolve(group, left, right, "torch")
    solve(gradient, update, product)
    eye = torch.eye(N, dtype=torch.float64)
    g, a = (x[list(PLACES[places])] for x in (g_factors, a_factors))
    system = g @ update @ a + DAMPING * update if kind == "basis" else (g + DAMPING * eye) @ update @ (a + DAMPING * eye)
    torch.testing.assert_close(system, gradient)
    torch.testing.assert_close(product, (update * gradient).sum((1, 2)))


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", ["cholesky", "factored"])
def test_a_solve_uses_the_inverses_of_the_last_refresh_or_checkpoint(kind: str, places: str) -> None:
    (left, _), (right, factors) = _dense(kind), _dense(kind)
    group = TileGroup((0, 1), SideGroup(1, PLACES[places]), SideGroup(0, PLACES[places]))
    solve = InverseSolve(group, left, right, "torch")
    gradient = torch.randn(2, N, N, dtype=torch.float64)

    def solved() -> Tensor:
        update = torch.zeros_like(gradient)
        solve(gradient, update, None)
        return update

    kept, before = [right.kept(i).clone() for i in range(3)], solved()
    right.restart()
    right.refresh(factors, torch.full((3,), 2 * DAMPING).double())
    assert not torch.allclose(solved(), before)
    for i, values in enumerate(kept):
        right.restore(i, values, right.residual[i], right.damping[i])
    assert torch.equal(solved(), before)


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("has_tf32", [True, False])
@pytest.mark.parametrize(("g_side", "a_side"), [("dense", "diagonal"), ("diagonal", "dense")])
def test_beside_a_diagonal_inverses_are_multiplied_as_elsewhere(
    g_side: str, a_side: str, has_tf32: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In TF32 where the library has it and nobody has asked for another backend; the user's precision is back afterwards."""
    (left, _), (right, _) = SIDES[g_side]("factored"), SIDES[a_side]("factored")
    seen: set[str] = set()

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func._schema.name in ("aten::bmm", "aten::mm"):
                seen.add(torch.backends.cuda.matmul.fp32_precision)
            return func(*args, **(kwargs or {}))

    before = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(precision, "has_library_tf32", lambda device: has_tf32)
    gradient = torch.randn(2, N, N, dtype=torch.float64)
    solve = InverseSolve(TileGroup((0, 1), SideGroup(1, (0, 1)), SideGroup(0, (0, 1))), left, right, backend)
    with Products():
        solve(gradient, torch.zeros_like(gradient), gradient.new_zeros(2))
    assert seen == {"tf32" if has_tf32 and backend == "auto" else before}
    assert torch.backends.cuda.matmul.fp32_precision == before
