"""How layers fall into parts and tiles, and what wide sides cost and mean."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.layers import find_layers
from kfac_triton.layers.partition import Partition

DAMPING = 1e-2


@settings(deadline=None)
@given(
    inputs=st.integers(1, 40), outputs=st.integers(1, 40), bias=st.booleans(), largest=st.integers(2, 50), block=st.booleans()
)
def test_parts_and_tiles_cover_every_side_once(inputs: int, outputs: int, bias: bool, largest: int, block: bool) -> None:
    layers, _ = find_layers(nn.Linear(inputs, outputs, bias=bias))
    partition = Partition(layers, largest, "block" if block else "diagonal")
    for is_input, size in ((True, inputs + bias), (False, outputs)):
        parts = [p for p in partition.parts if p.is_input == is_input]
        assert [p.start for p in parts] == [0] + [p.stop for p in parts[:-1]]
        assert parts[-1].stop == size
        assert parts[-1].has_bias_column == (bias and is_input)
        if size <= largest:
            assert len(parts) == 1
            assert not parts[0].diagonal
        elif block:
            sizes = [p.size for p in parts]
            assert max(sizes) <= largest
            assert max(sizes) - min(sizes) <= 1 + (bias and is_input)
            assert len(parts) <= -(-size // (largest - (bias and is_input))) + 1
        else:
            assert [p.diagonal for p in parts] == [True]
    area = sum(partition.parts[t.a].size * partition.parts[t.g].size for t in partition.tiles)
    assert area == (inputs + bias) * outputs


def _run(model: nn.Module, x: Tensor, **options: object) -> KFACPreconditioner:
    model.zero_grad()
    ours = KFACPreconditioner(model, damping=DAMPING, kl_clip=None, **options)
    model(x).square().sum(-1).mean().backward()
    ours.raw = [p.grad.clone() for p in model.parameters()]  # type: ignore[attr-defined]
    ours.precondition_()
    ours.close()
    return ours


def _damped(a: Tensor, g: Tensor, bias: bool = True) -> tuple[Tensor, Tensor]:
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    root = DAMPING**0.5
    return a + root * pi * torch.eye(len(a), dtype=torch.float64), g + root / pi * torch.eye(len(g), dtype=torch.float64)


@pytest.mark.parametrize("exact", [False, True], ids=["split damping", "exact damping"])
@pytest.mark.parametrize("oversize", ["block", "diagonal"])
def test_a_wide_layer_is_preconditioned_by_its_parts(oversize: str, exact: bool) -> None:
    """Against matrices written down: the full factors with everything outside of the parts set to zero."""
    model, x = nn.Linear(11, 9).double(), torch.randn(30, 11, dtype=torch.float64)
    full = _run(model, x)
    a, g = full.factors()[""]
    ours = _run(model, x, max_factor_size=5, oversize=oversize, exact_damping=exact)
    got_a, got_g = ours.factors()[""]
    if oversize == "diagonal":
        assert torch.allclose(got_a, a.diagonal())
        assert torch.allclose(got_g, g.diagonal())
        a, g = torch.diag(got_a), torch.diag(got_g)
    else:
        a_parts, g_parts = ([p for p in ours.engine.partition.parts if p.is_input == side] for side in (True, False))
        assert len(a_parts) == 3
        assert len(g_parts) == 2
        for full_factor, parts, got in ((a, a_parts, got_a), (g, g_parts, got_g)):
            mask = torch.block_diag(*[torch.ones(p.size, p.size, dtype=torch.float64) for p in parts])
            full_factor *= mask
            torch.testing.assert_close(got, full_factor)
    gradient = torch.cat([ours.raw[0], ours.raw[1][:, None]], 1)  # type: ignore[attr-defined]
    if exact:
        kron = torch.kron(g, a) + DAMPING * torch.eye(len(a) * len(g), dtype=torch.float64)
        expected = torch.linalg.solve(kron, gradient.flatten()).view_as(gradient)
    else:
        damped_a, damped_g = _damped(a, g)
        expected = torch.linalg.solve(damped_g, gradient) @ torch.linalg.inv(damped_a)
    got = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    assert relative_error(got, expected) <= 1e-10
    assert ours.diagnostics()["layers"][""]["product"] == pytest.approx(float((got * gradient).sum()), rel=1e-10)


@pytest.mark.parametrize("inverse", ["cholesky", "factored", "newton_schulz", "eigh"])
@pytest.mark.parametrize("sizes", [(11, 5), (5, 11)], ids=["wide input", "wide output"])
def test_a_diagonal_beside_a_matrix(sizes: tuple[int, int], inverse: str) -> None:
    """Whatever the inverse of the matrix is kept as; in the second step the factored one comes from a warm refresh."""
    model = nn.Linear(*sizes).double()
    ours = KFACPreconditioner(
        model, damping=DAMPING, kl_clip=None, max_factor_size=8, inverse=inverse, inverse_tolerance=1e-10, ema_decay=0.9
    )
    for _ in range(2):
        model.zero_grad()
        model(torch.randn(30, sizes[0], dtype=torch.float64)).square().sum(-1).mean().backward()
        gradient = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
        ours.precondition_()
    a, g = (side if side.dim() == 2 else torch.diag(side) for side in ours.factors()[""])
    damped_a, damped_g = _damped(a, g)
    expected = torch.linalg.solve(damped_g, gradient) @ torch.linalg.inv(damped_a)
    assert relative_error(torch.cat([model.weight.grad, model.bias.grad[:, None]], 1), expected) <= 1e-8


@pytest.mark.parametrize("oversize", ["block", "diagonal"])
def test_a_wide_convolution_is_cut_between_channels(oversize: str) -> None:
    model = nn.Sequential(nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.Flatten(2)).double()
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    full = _run(model, x)
    ours = _run(model, x, max_factor_size=19, oversize=oversize)
    a_full, g_full = full.factors()["0"]
    a, g = ours.factors()["0"]
    torch.testing.assert_close(g, g_full)
    for group in range(2):
        if oversize == "diagonal":
            torch.testing.assert_close(a[group], a_full[group].diagonal())
        else:
            sizes = [p.size for p in ours.engine.partition.parts if p.is_input and p.block == group]
            assert sizes == [9, 19]
            mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.float64) for n in sizes])
            torch.testing.assert_close(a[group], a_full[group] * mask)


@pytest.mark.parametrize("largest", [5, 9])
def test_parts_that_cannot_hold_a_channel_are_refused(largest: int) -> None:
    """Nine kernel elements, and in the last part the bias."""
    with pytest.raises(ValueError, match=r"max_factor_size must be at least 10 to cut a side of size 55 .*; raise it, or pass"):
        KFAC(nn.Conv2d(6, 4, 3), max_factor_size=largest, oversize="block")
    KFAC(nn.Conv2d(6, 4, 3), max_factor_size=10, oversize="block").close()


@pytest.mark.parametrize("oversize", ["block", "diagonal"])
def test_factors_of_every_form_survive_a_checkpoint(oversize: str) -> None:
    def make() -> tuple[nn.Module, KFAC]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 4)).double()
        return model, KFAC(model, damping=DAMPING, max_factor_size=6, oversize=oversize)

    def train(model: nn.Module, optimizer: KFAC, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(20, 11, dtype=torch.float64)).square().sum(-1).mean().backward()
            optimizer.step()

    model, optimizer = make()
    train(model, optimizer, 2)
    other, restored = make()
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    for name, pair in optimizer.factors().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, restored.factors()[name], strict=True))
    for one, opt in ((model, optimizer), (other, restored)):
        torch.manual_seed(9)
        train(one, opt, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    wrong = KFAC(make()[0], damping=DAMPING)
    with pytest.raises(ValueError, match=r"kfac_A of layer '0' must have shape \(1, 12, 12\)"):
        wrong.load_state_dict(optimizer.state_dict())


def test_kernels_serve_layers_in_parts() -> None:
    """Parts are views with gaps between rows; the kernels read any strides."""
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(11, 9), nn.Tanh(), nn.Linear(9, 40))
        ours = KFACPreconditioner(model, damping=0.1, kl_clip=None, max_factor_size=8, oversize="block", backend=backend)
        for _ in range(2):
            model.zero_grad()
            model(torch.randn(16, 11)).square().sum(-1).mean().backward()
            ours.precondition_()
        results.append([p.grad for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) <= 1e-3
