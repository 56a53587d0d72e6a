"""Cold starts and fallbacks as on a GPU: a few calls for a whole stack, one wait for a decision, and the CPU's results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.hard_matrices import hard_stack
from support.helpers import energy_error
from support.launches import CountedOperators, CountedWaits
from torch import Generator, Tensor

from kfac_triton.curvature import factorizations, triangular
from kfac_triton.curvature import inverse as inverse_module
from kfac_triton.curvature.factorizations import cholesky
from kfac_triton.curvature.inverse import ACCEPT, InverseStack
from kfac_triton.curvature.triangular import prefers_batches, symmetric_product, triangular_inverse
from kfac_triton.kernels import precision


@pytest.fixture
def _in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, on a CPU."""
    for module in (triangular, factorizations):
        monkeypatch.setattr(module, "prefers_batches", lambda device: True)


def _factors(count: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = torch.randn(count, 2 * n, n, dtype=torch.float64)
    return (rows.mT @ rows / (2 * n)).to(dtype)


def _cold(factors: Tensor) -> InverseStack:
    stack = InverseStack(factors, "factored", 0.05, "torch", wait=False)
    stack.refresh(factors, torch.full((len(factors),), 0.1))
    return stack


def _operators(count: int, n: int) -> int:
    """Of a cold start of so many matrices."""
    factors, damping = _factors(count, n), torch.full((count,), 0.1)
    stack = InverseStack(factors, "factored", 0.05, "torch", wait=False)
    with CountedOperators() as operators:
        stack.refresh(factors, damping)
    return sum(operators.counts.values())


def test_only_a_cpu_loops() -> None:
    assert not prefers_batches(torch.device("cpu"))
    assert prefers_batches(torch.device("cuda"))


def test_a_cold_start_launches_as_much_for_large_stacks_as_for_small_ones(
    monkeypatch: pytest.MonkeyPatch, show: Callable[..., None]
) -> None:
    looped = _operators(4, 768)
    for module in (triangular, factorizations):
        monkeypatch.setattr(module, "prefers_batches", lambda device: True)
    small, large = (_operators(count, n) for count, n in ((1, 8), (4, 768)))
    show(f"\nOperators of a cold start, four matrices of 768 rows: {looped} by recursion, {large} in batches")
    assert small == large < 100 < looped / 4


@pytest.mark.usefixtures("_in_batches")
def test_pieces_bound_the_work_space_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    factors, sizes = _factors(7, 40), []
    whole = _cold(factors)
    monkeypatch.setattr(factorizations, "_PIECE_IN_BATCHES", 3 * factors[0].nbytes + 1)

    def watched(factor: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        sizes.append(len(factor))
        return cholesky(factor, *rest)

    monkeypatch.setattr(inverse_module, "cholesky", watched)
    pieces = _cold(factors)
    assert sizes == [3, 3, 1]
    torch.testing.assert_close(pieces.values, whole.values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pieces.residual, whole.residual, rtol=1e-2, atol=1e-6)


@pytest.mark.usefixtures("_in_batches")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 17, 130])
def test_roots_are_triangular_and_products_symmetric_bit_for_bit(n: int, dtype: torch.dtype) -> None:
    lower = torch.linalg.cholesky(_factors(3, n, torch.float64) + torch.eye(n)).to(dtype)
    before = lower.clone()
    root = triangular_inverse(lower)
    assert root.dtype == dtype
    assert torch.equal(root, root.tril())
    torch.testing.assert_close(lower @ root, torch.eye(n, dtype=dtype).expand(3, n, n), rtol=0, atol=1e-5)
    product = symmetric_product(root)
    assert torch.equal(product, product.mT)
    torch.testing.assert_close(product, root.mT @ root)
    assert torch.equal(lower, before)


def test_what_a_library_leaves_above_the_diagonal_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triangular, "prefers_batches", lambda device: True)
    solve = torch.linalg.solve_triangular
    monkeypatch.setattr(torch.linalg, "solve_triangular", lambda *args, **kwargs: solve(*args, **kwargs) + 1e-3)
    root = triangular_inverse(torch.eye(5)[None])
    assert torch.equal(root, root.tril())


@pytest.mark.usefixtures("_in_batches")
@pytest.mark.parametrize("as_root", [False, True])
def test_hard_matrices_get_the_inverses_of_the_cpu(as_root: bool) -> None:
    """Where both are certified the two are as close as their certificates say; where one is refused, the other is, too."""
    random, compared = Generator().manual_seed(0), 0
    for n in (1, 6, 24, 70):
        case = hard_stack(random, 100, n)
        batched = cholesky(case.factors, case.damping, as_root, torch.float32)
        with pytest.MonkeyPatch.context() as patch:
            for module in (triangular, factorizations):
                patch.setattr(module, "prefers_batches", lambda device: False)
            looped = cholesky(case.factors, case.damping, as_root, torch.float32)
        accepted = [residual <= 0.5 * ACCEPT for _, residual in (batched, looped)]
        assert (batched[1][accepted[1]] <= ACCEPT).all()
        assert (looped[1][accepted[0]] <= ACCEPT).all()
        for i in (accepted[0] & accepted[1]).nonzero().flatten().tolist():
            target = case.factors[i].double() + case.damping[i].double() * torch.eye(n, dtype=torch.float64)
            if not torch.linalg.cond(target) < 1e12:  # beyond, float64 could not tell
                continue
            values, certificates = ([x[i].double() for x in pair] for pair in zip(batched, looped, strict=True))
            inverses = [x.mT @ x if as_root else x for x in values]
            for inverse, certificate in zip(inverses, certificates, strict=True):
                assert energy_error(target, inverse) <= max(1.01 * float(certificate), 2e-6)
            compared += 1
    assert compared > 100


@pytest.mark.usefixtures("_in_batches")
def test_a_cold_start_and_a_fallback_wait_once_for_their_decision(show: Callable[..., None]) -> None:
    factors, damping = _factors(3, 24), torch.full((3,), 0.1)
    stack = _cold(factors)
    with CountedWaits() as waits:
        stack._fall_back(factors, torch.arange(3))
    assert waits.counts == {"tolist": 1}
    assert (stack.residual <= ACCEPT).all()
    scales = torch.logspace(0, 2, 24)
    far = scales[:, None] * factors * scales  # too far for the four Newton steps of a refresh that nobody waits for
    stack.refresh(far, damping)
    assert stack.fallbacks.tolist() == [1, 1, 1]
    with CountedWaits() as waits:
        stack.refresh(far, damping)
    show(f"\nWaits of a refresh that recomputes refused inverses: {dict(waits.counts)}")
    assert waits.counts == {"tolist": 2}  # of the flags that have arrived by themselves, and of the decision
    assert (stack.residual <= ACCEPT).all()


@pytest.mark.usefixtures("_in_batches")
def test_each_further_attempt_waits_once_more_and_is_made_for_those_that_need_it() -> None:
    """One is served by float32, one by float64, one needs more damping, one is not finite."""
    factors = torch.eye(4).repeat(4, 1, 1)
    factors[1] = torch.diag(torch.tensor([1.0, 1e-7, 1.0, 1.0]))
    factors[1, 0, 1] = factors[1, 1, 0] = 0.999 * 1e-7**0.5
    factors[2, 0, 0], factors[3, 0, 1], factors[3, 1, 0] = -0.5, torch.nan, torch.nan
    stack = InverseStack(factors, "factored", 0.05, "torch", wait=False)
    damping = torch.tensor([0.1, 1e-12, 0.1, 0.1])
    stack.damping.copy_(damping)
    with CountedWaits() as waits:
        stack._fall_back(factors, torch.arange(4))
    assert waits.counts == {"tolist": 3}
    assert stack.raised.tolist() == [0, 0, 1, 0]
    assert (stack.residual <= ACCEPT).tolist() == [True, True, True, False]
    assert stack.residual[3] == torch.inf
    assert (stack.values[3] == 0).all()
    torch.testing.assert_close(stack.damping, torch.tensor([0.1, 1e-12, 1.0, 0.1]))


def test_a_fallback_leaves_those_alone_that_were_not_refused() -> None:
    factors = _factors(4, 12)
    stack = _cold(factors)
    before = [x.clone() for x in (stack.values, stack.residual, stack.damping)]
    stack.damping[2] = 0.2
    stack._fall_back(2 * factors, torch.tensor([2]))
    for new, old in zip((stack.values, stack.residual, stack.damping), before, strict=True):
        assert torch.equal(new[[0, 1, 3]], old[[0, 1, 3]])
    inverse = stack.values[2].mT @ stack.values[2]
    assert energy_error(2 * factors[2] + 0.2 * torch.eye(12), inverse) < ACCEPT


def test_tf32_that_the_user_allows_is_not_used_by_cholesky(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither for the inverse nor for its certificate, which would refuse what is right."""
    seen: list[str] = []
    honest = factorizations.root_residual

    def watched(*args: Any) -> Any:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return honest(*args)

    monkeypatch.setattr(factorizations, "root_residual", watched)
    with precision.library_tf32():  # as the user's own choice
        _cold(_factors(2, 8))
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert seen == ["ieee"]
