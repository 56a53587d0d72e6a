"""Muon as it is raced: the float32 twin of `torch.optim.Muon`, and which parameters it moves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import _muon

from benchmarks.convergence import muon
from benchmarks.convergence.models import ConvNet, TextTransformer, ViT
from benchmarks.convergence.muon import Float32Muon, MuonWithAdamW, hidden_weights, orthogonalize

SHAPES = [(12, 12), (20, 7), (7, 20)]


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's Muon computes in the dtype of the gradients."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


def moved(optimizer_class: type, steps: int) -> list[Tensor]:
    """Matrices after some steps with random gradients, the same for every optimizer."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = optimizer_class(matrices, lr=0.05, weight_decay=0.1, momentum=0.9)
    for _ in range(steps):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimizer.step()
    return [matrix.detach() for matrix in matrices]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_iteration_is_that_of_pytorch(shape: tuple[int, int], in_float32: None) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    theirs = _muon._zeropower_via_newtonschulz(matrix, muon.COEFFICIENTS, muon.ITERATIONS, 1e-7)
    assert torch.equal(orthogonalize(matrix), theirs)
    assert (muon.COEFFICIENTS, muon.ITERATIONS) == (
        (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C),
        _muon.DEFAULT_NS_STEPS,
    )


def test_in_float32_the_twin_moves_as_pytorchs_muon(in_float32: None) -> None:
    assert all(map(torch.equal, moved(Float32Muon, 4), moved(torch.optim.Muon, 4)))


def test_pytorchs_muon_differs_from_the_twin_by_bfloat16_alone() -> None:
    """Five iterations of three products, each rounded to 8 bits."""
    start = moved(Float32Muon, 0)
    for before, ours, theirs in zip(start, moved(Float32Muon, 1), moved(torch.optim.Muon, 1), strict=True):
        assert (ours - theirs).norm() < 15 * 2**-8 * (theirs - before).norm()
        assert not torch.equal(ours, theirs)


def test_a_matrix_without_gradient_stays() -> None:
    matrix = nn.Parameter(torch.ones(2, 2))
    Float32Muon([matrix], lr=1.0).step()
    assert torch.equal(matrix, torch.ones(2, 2))


def names(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    chosen = set(map(id, parameters))
    return {name for name, p in model.named_parameters() if id(p) in chosen}


def test_adamw_moves_embeddings_norms_biases_and_the_head() -> None:
    text = TextTransformer(symbols=5, context=4, width=4, heads=1, blocks=1)
    inner = {"attention.project_in", "attention.project_out", "mlp.0", "mlp.2"}
    assert names(text, hidden_weights(text)) == {f"blocks.0.{name}.weight" for name in inner}
    vit = ViT(side=4, patch=2, width=4, heads=1, blocks=1, hidden=4)
    assert names(vit, hidden_weights(vit)) == {"patches.weight", *(f"blocks.0.{name}.weight" for name in inner)}
    autoencoder = nn.Sequential(nn.Linear(4, 2), nn.Tanh(), nn.Linear(2, 4))
    assert names(autoencoder, hidden_weights(autoencoder)) == {"0.weight", "2.weight"}, "it has no classifier"


def test_kernels_are_matrices_and_every_parameter_is_moved_once() -> None:
    model = ConvNet(channels=(3, 4), side=8)
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonWithAdamW(model, lr=0.1, momentum=0.0, weight_decay=0.0, rest_lr=0.01)
    sizes = [p.numel() for group in optimizer.param_groups for p in group["params"]]
    assert sorted(sizes) == sorted(p.numel() for p in model.parameters())
    model(torch.randn(5, 1, 8, 8)).square().mean().backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    hidden = set(map(id, hidden_weights(model)))
    for p, before, gradient in zip(model.parameters(), start, gradients, strict=True):
        step = p.detach() - before
        if id(p) in hidden:
            rows, columns = p.shape[0], p[0].numel()
            expected = -0.1 * max(1, rows / columns) ** 0.5 * orthogonalize(gradient.flatten(1)).view_as(p)
            torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-6)
        else:
            seen = gradient.abs() > 1e-5  # epsilon apart, Adam's first step is the sign
            torch.testing.assert_close(step[seen], -0.01 * gradient.sign()[seen], rtol=1e-2, atol=1e-5)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
