"""Eigenbases: cold, warm, refused, and what exact damping and EKFAC make of them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.curvature.eigenbasis import EigenStack, off_diagonal
from kfac_triton.curvature.inverse import ACCEPT


def _spd(n: int, side: int, condition: float, dtype: torch.dtype = torch.float64) -> Tensor:
    q = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    out = torch.zeros(side, side, dtype=dtype)
    out[:n, :n] = ((q * torch.logspace(0, -torch.tensor(condition).log10().item(), n, dtype=torch.float64)) @ q.T).to(dtype)
    return (out + out.T) / 2


def _energy_error(stack: EigenStack, index: int, factor: Tensor, damping: float, n: int) -> float:
    target = factor[:n, :n].double() + damping * torch.eye(n, dtype=torch.float64)
    q, values = stack.vectors[index, :n, :n].double(), stack.eigenvalues[index, :n].double()
    inverse = (q / (values + damping)) @ q.T
    root = torch.linalg.cholesky(target)
    return float(torch.linalg.matrix_norm(torch.eye(n, dtype=torch.float64) - root.T @ inverse @ root, 2))


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 16), min_size=1, max_size=4),
    condition=st.sampled_from([1.0, 1e2, 1e6]),
    drift=st.sampled_from([0.0, 1e-3, 0.3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_refresh_is_certified_and_right(sizes: list[int], condition: float, drift: float, seed: int) -> None:
    """Cold, then after a drift of the factors; the pad keeps vectors of its own."""
    torch.manual_seed(seed)
    factors = torch.stack([_spd(n, 16, condition) for n in sizes])
    stack = EigenStack(factors, sizes)
    damping = torch.full((len(sizes),), 1e-3, dtype=torch.float64)
    for step in range(3):
        if step:
            factors = (1 - drift) * factors + drift * torch.stack([_spd(n, 16, condition) for n in sizes])
        stack.refresh(factors, damping)
        assert (stack.residual <= ACCEPT).all()
        for i, n in enumerate(sizes):
            eye = torch.eye(16, dtype=torch.float64)
            assert torch.allclose(stack.vectors[i].T @ stack.vectors[i], eye, atol=1e-10)
            assert (stack.vectors[i, n:, :n].abs() <= 1e-8).all()
            assert (stack.eigenvalues[i, n:] <= 1e-12).all()
            error = _energy_error(stack, i, factors[i], 1e-3, n)
            # The certificate is of first order; below 0.3 the rest of the series is less than it again.
            assert error <= 2 * float(stack.residual[i]) + 1e-9


def test_a_basis_that_drifted_too_far_is_made_anew() -> None:
    stack, damping = EigenStack(torch.zeros(1, 16, 16).double(), [12]), torch.tensor([1e-4]).double()
    stack.refresh(_spd(12, 16, 1e4)[None], damping)
    assert stack.fallbacks.tolist() == [0]
    stack.refresh(_spd(12, 16, 1e4)[None], damping)  # another one altogether
    assert stack.fallbacks.tolist() == [1]
    assert stack.residual[0] <= 1e-8


def test_a_warm_basis_costs_no_eigh(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = _spd(12, 16, 1e2)[None]
    stack, damping = EigenStack(factor, [12]), torch.tensor([0.1]).double()
    stack.refresh(factor, damping)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("eigh was asked"))
    stack.refresh(0.999 * factor + 0.001 * _spd(12, 16, 1e2)[None], damping)
    assert stack.residual[0] <= 0.1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_factor_without_eigenvectors_keeps_its_last_basis(bad: float) -> None:
    """At first it has none: then nothing goes along it."""
    factors = torch.stack([_spd(12, 16, 1e2), _spd(12, 16, 1e2)])
    stack, damping = EigenStack(factors, [12, 12]), torch.full((2,), 1e-2).double()
    poisoned = factors.clone()
    poisoned[0, 3, 4] = bad
    stack.refresh(poisoned, damping)
    assert (stack.vectors[0] == 0).all()
    assert stack.residual[0] == torch.inf
    assert stack.residual[1] <= ACCEPT
    stack.refresh(factors, damping)
    before = stack.vectors.clone()
    assert (stack.residual <= ACCEPT).all()
    stack.refresh(poisoned, damping)
    assert torch.equal(stack.vectors[0], before[0])


def test_the_null_space_is_not_mixed_with_the_pad() -> None:
    """Both have eigenvalue zero, but EKFAC's moments belong to vectors, and the pad has none."""
    half = torch.randn(6, 2, dtype=torch.float64)
    factor = torch.zeros(1, 16, 16, dtype=torch.float64)
    factor[0, :6, :6] = half @ half.T
    stack = EigenStack(factor, [6])
    stack.refresh(factor, torch.tensor([1e-3]).double())
    assert (stack.vectors[0, 6:, :6].abs() <= 1e-12).all()
    assert (stack.vectors[0, :6, 6:].abs() <= 1e-12).all()


def test_off_diagonal_certificate_by_hand() -> None:
    rotated = torch.tensor([[[3.0, 0.5], [0.5, 1.0]]]).double()
    values, residual = off_diagonal(rotated, torch.tensor([1.0]).double())
    assert values.tolist() == [[3.0, 1.0]]
    assert residual[0] == pytest.approx((2 * 0.5**2 / (4 * 2)) ** 0.5)


# In the engine


def _train(ours: KFACPreconditioner, model: nn.Module, steps: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(12, 5, generator=generator, dtype=torch.float64)
        y = torch.randint(4, (12,), generator=generator)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        ours.precondition_()


def test_exact_damping_solves_the_damped_kronecker_product() -> None:
    model = mlp()
    ours = KFACPreconditioner(model, damping=0.05, kl_clip=None, exact_damping=True)
    _train(ours, model, 3)  # the last basis is a warm one
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(4, (12,))
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    raw = [p.grad.clone() for p in model.parameters()]
    ours.precondition_()
    for k, name in enumerate(("0", "2", "4")):
        a, g = ours.factors()[name]
        gradient = torch.cat([raw[2 * k], raw[2 * k + 1][:, None]], 1)
        expected = torch.linalg.solve(torch.kron(g, a) + 0.05 * torch.eye(gradient.numel()), gradient.flatten())
        layer = model[int(name)]
        got = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
        assert relative_error(got.flatten(), expected) <= 0.1  # what a warm basis may be off


def test_a_change_of_exact_damping_needs_no_new_basis() -> None:
    model = mlp()
    ours = KFACPreconditioner(model, damping=0.05, kl_clip=None, exact_damping=True, inverse_every=100)
    _train(ours, model, 2)
    assert ours.diagnostics()["refreshes"] == 1
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randint(4, (12,))
    updates = []
    for damping in (0.05, 50.0):
        ours.change(damping=damping)
        model.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        raw = [p.grad.clone() for p in model.parameters()]
        ours.precondition_()
        updates.append([p.grad for p in model.parameters()])
    assert ours.diagnostics()["refreshes"] == 1
    for g, small, large in zip(raw, updates[0], updates[1], strict=True):
        assert relative_error(large * 50.0, g) <= 0.1  # far above the spectrum, it is the gradient over damping
        assert relative_error(small * 0.05, g) > 0.1


def test_ekfac_stays_finite_and_descends_through_warm_bases() -> None:
    model = mlp()
    ours = KFACPreconditioner(model, damping=0.01, kl_clip=1e-2, curvature="ekfac", inverse_every=3)
    for step in range(10):
        _train(ours, model, 1, seed=step)
        layers = ours.diagnostics()["layers"].values()
        assert all(layer["product"] > 0 for layer in layers)
        assert all(p.grad.isfinite().all() for p in model.parameters())
    assert ours.diagnostics()["refreshes"] == 4
    assert ours.diagnostics()["memory"]["moments"] > 0


def test_the_kronecker_eigenvalues_count_as_the_first_moments() -> None:
    """The average after one true update, with bias correction: weights 1 - d and d (1 - d), over their sum."""
    found = {}
    for decay in (0.0, 0.5):
        torch.manual_seed(0)
        model = mlp()
        ours = KFACPreconditioner(model, damping=0.01, curvature="ekfac", ema_decay=decay, inverse_every=100)
        _train(ours, model, 1)
        solves = ours.engine.curvature._ekfac_solves
        first = [solve.values.clone() for solve in solves]
        for one, solve in zip(first, solves, strict=True):
            torch.testing.assert_close(one, solve.kronecker())
        _train(ours, model, 1, seed=1)
        found[decay] = [solve.values.clone() for solve in solves]
    for old, new, got in zip(first, found[0.0], found[0.5], strict=True):
        torch.testing.assert_close(got, old + (new - old) * 0.5 / 0.75)


def test_ekfac_drops_moments_that_overflow() -> None:
    """In float32 the square of a product of numbers that the factors still can hold."""
    model = nn.Linear(5, 4)
    ours = KFACPreconditioner(model, damping=0.01, kl_clip=None, curvature="ekfac")
    for scale in (1.0, 1.0, 1e10):
        model.zero_grad()
        (scale * model(scale * torch.randn(12, 5)).sum()).backward()
        ours.precondition_()
    assert ours.diagnostics()["layers"][""]["updates"] == 3
    assert all(solve.values.isfinite().all() for solve in ours.engine.curvature._ekfac_solves)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_ekfac_moments_are_turned_with_the_basis() -> None:
    """Entry by entry: W' = R_G W R_A^T has E[W'_kl^2] = sum_ij R_G,ki^2 S_ij R_A,lj^2 where entries of W are uncorrelated."""
    model = mlp()
    ours = KFACPreconditioner(model, damping=0.01, kl_clip=None, curvature="ekfac", inverse_every=100)
    _train(ours, model, 3)
    curvature = ours.engine.curvature
    bases = [solve.basis() for solve in curvature._ekfac_solves]
    before = [solve.values.clone() for solve in curvature._ekfac_solves]
    for slot in ours.engine.bank.slots:
        n = len(ours.engine.bank.view(slot))
        ours.engine.bank.write(slot, _spd(n, n, 1e3))
    curvature.refresh(0.01, restart=False)
    for solve, (left, right), old in zip(curvature._ekfac_solves, bases, before, strict=True):
        new_left, new_right = solve.basis()
        for b in range(len(old)):
            r_g, r_a = new_left[b].T @ left[b], new_right[b].T @ right[b]
            expected = torch.einsum("ki,ij,lj->kl", r_g**2, old[b], r_a**2)
            torch.testing.assert_close(solve.values[b], expected)


@pytest.mark.parametrize("with_moments", [True, False])
def test_ekfac_moments_of_a_checkpoint(with_moments: bool) -> None:
    """They come with their basis; without it a used optimizer forgets those that it has, and begins with the factors'."""
    (model, other), moments = (mlp(), mlp()), []
    for one in (model, other):
        optimizer = KFAC(one, damping=0.01, curvature="ekfac", inverse_every=5)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(12, 5, dtype=torch.float64) * (1 + step)
            nn.functional.cross_entropy(one(x), torch.randint(4, (12,))).backward()
            optimizer.step()
        if one is model:
            state = copy.deepcopy(optimizer.state_dict(include_inverses=with_moments))
            moments = [solve.values.clone() for solve in optimizer.engine.curvature._ekfac_solves]
    optimizer.load_state_dict(state)
    optimizer.zero_grad()
    optimizer.engine.precondition(lambda _: 0.1)  # a step without statistics
    for solve, saved in zip(optimizer.engine.curvature._ekfac_solves, moments, strict=True):
        torch.testing.assert_close(solve.values, saved if with_moments else solve.kronecker())
        assert not torch.allclose(saved, solve.kronecker())


def test_ekfac_moments_follow_a_turned_basis() -> None:
    """On one batch, over and over, they are the same function of the basis; a turn that is exact changes nothing."""
    model = mlp()
    ours = KFACPreconditioner(model, damping=0.01, kl_clip=None, curvature="ekfac", ema_decay=0.5)
    results = []
    for _ in range(6):
        _train(ours, model, 1)
        results.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(results[-1], results[-2], strict=True):
        assert relative_error(one, other) <= 0.05


def test_ekfac_drops_moments_that_are_not_finite() -> None:
    model = mlp()
    ours = KFACPreconditioner(model, damping=0.01, kl_clip=None, curvature="ekfac")
    _train(ours, model, 2)
    before = [s.values.clone() for s in ours.engine.curvature._ekfac_solves]
    model.zero_grad()
    (model(torch.full((3, 5), torch.nan).double())).sum().backward()
    ours.precondition_()
    for old, solve in zip(before, ours.engine.curvature._ekfac_solves, strict=True):
        assert relative_error(solve.values, old) <= 1e-6  # a warm basis turns a little
    _train(ours, model, 1)
    assert all(p.grad.isfinite().all() for p in model.parameters())
