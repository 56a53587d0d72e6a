"""Oracles for the adapters' tests: gradients of single loss terms, Kronecker solves, checkpoints."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner

Losses = Callable[[nn.Module], Tensor]  # one loss a term, any shape; the loss is their mean

DAMPING = 0.1


def gradients_of_terms(model: nn.Module, losses: Losses, parameters: list[nn.Parameter]) -> Tensor:
    """Gradient of every loss term by itself, by as many backward passes: (terms, numbers in the parameters)."""
    terms = losses(model).flatten()
    gradients = (torch.autograd.grad(term, parameters, retain_graph=True) for term in terms)
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in gradients])


def preconditioned(model: nn.Module, losses: Losses, **settings: object) -> tuple[KFACPreconditioner, list[Tensor]]:
    """One backward pass of the mean loss; the preconditioner and copies of the gradients before it worked on them."""
    preconditioner = KFACPreconditioner(model, damping=DAMPING, kl_clip=None, **settings)
    model.zero_grad()
    losses(model).mean().backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    preconditioner.precondition_()
    return preconditioner, before


def kronecker_solve(gradient: Tensor, a: Tensor, g: Tensor, damping: float = DAMPING) -> Tensor:
    """(A kron G)^-1 vec W as one dense system, damped by the split of Martens and Grosse 2015, section 6.3."""
    a, g = (torch.diag(x) if x.dim() == 1 else x for x in (a, g))
    pi = ((a.trace() / len(a)) / (g.trace() / len(g))).sqrt()
    a = a + damping**0.5 * pi * torch.eye(len(a), dtype=a.dtype)
    g = g + damping**0.5 / pi * torch.eye(len(g), dtype=g.dtype)
    return torch.linalg.solve(torch.kron(g, a), gradient.flatten()).view_as(gradient)


def assert_close(value: Tensor | None, truth: Tensor, tolerance: float = 1e-12) -> None:
    assert value is not None
    torch.testing.assert_close(value, truth, rtol=tolerance, atol=tolerance * float(truth.abs().max()))


def assert_checkpoint_keeps_the_run(make: Callable[[], nn.Module], losses: Losses, **settings: object) -> None:
    """Three steps more, from a checkpoint in a new model and optimizer, end where the first run ends, bit for bit."""
    model = make()
    optimizer = KFAC(model, lr=0.1, damping=DAMPING, **settings)
    _steps(model, optimizer, losses)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    _steps(model, optimizer, losses)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = make()
    other.load_state_dict(saved["model"])
    resumed = KFAC(other, lr=0.7, damping=DAMPING, **settings)
    resumed.load_state_dict(saved["optimizer"])
    _steps(other, resumed, losses)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for name, pair in optimizer.factors().items():
        assert all(torch.equal(*sides) for sides in zip(pair, resumed.factors()[name], strict=True))


def _steps(model: nn.Module, optimizer: KFAC, losses: Losses) -> None:
    for _ in range(3):
        optimizer.zero_grad()
        losses(model).mean().backward()
        optimizer.step()


class Experts(nn.Module):
    """Two experts; the second one gets the examples that the router sends it: none of them, or no call at all."""

    def __init__(self, first: nn.Module, second: nn.Module, calls: bool) -> None:
        super().__init__()
        self.first, self.second, self.calls = first, second, calls

    def forward(self, x: Tensor) -> Tensor:
        out = self.first(x)
        return torch.cat([out, self.second(x[:0])]) if self.calls else out


def assert_an_idle_expert_stays(first: nn.Module, second: nn.Module, x: Tensor, **settings: object) -> None:
    """No token: no factor, no update, nothing dropped, and the other expert is as if alone."""
    for calls in (False, True):
        model = Experts(first, second, calls)
        with KFACPreconditioner(model, damping=DAMPING, **settings) as preconditioner:
            model.zero_grad()
            model(x).square().mean().backward()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "no statistics came")
                preconditioner.precondition_()
            layers = preconditioner.diagnostics()["layers"]
            assert layers["first"]["updates"] == 1
            assert layers["second"]["updates"] == 0
            assert all(layer["dropped_gradients"] == layer["dropped_statistics"] == 0 for layer in layers.values())
            assert all(p.grad is None or bool((p.grad == 0).all()) for p in second.parameters())
            assert all(bool(torch.isfinite(p.grad).all()) for p in first.parameters() if p.grad is not None)
