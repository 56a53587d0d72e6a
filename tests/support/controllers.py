"""A controller without an engine, for its tests, and small models for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.fisher.losses import likelihood_of
from kfac_triton.steps.controller import Controller

Gradients = list[Tensor | None]


class Run:
    """A controller with plain gradients in place of the engine: V = h for the first `covered` parameters."""

    def __init__(self, model: nn.Module, batch: Any, loss: nn.Module, covered: int | None = None, **options: Any) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.parameters = list(model.parameters())
        self.covered = len(self.parameters) if covered is None else covered
        self.controller = Controller(model, self.parameters, loss, likelihood_of(loss), **options)
        self.dampings: list[float] = []
        self.calls = 0

    def evaluate(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.model(self.batch[0]), self.batch[1]

    def differentiate(self, outputs: Tensor, targets: Tensor, loss: Tensor) -> Gradients:
        return list(torch.autograd.grad(loss, self.parameters, allow_unused=True))

    def precondition(self, gradient: Gradients, damping: float) -> Gradients:
        self.dampings.append(damping)
        return [g if i < self.covered else None for i, g in enumerate(gradient)]

    def step(self, **options: Any) -> dict[str, Any]:
        return self.controller.step(self.evaluate, self.differentiate, self.precondition, **options)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def loss_of(run: Run) -> Tensor:
    return run.loss(run.model(run.batch[0]), run.batch[1])


def gradient_of(run: Run) -> Tensor:
    return flat(torch.autograd.grad(loss_of(run), run.parameters))


def regression(reduction: str = "mean") -> tuple[nn.Linear, tuple[Tensor, Tensor], nn.Module]:
    torch.manual_seed(0)
    model = nn.Linear(4, 2).double()
    x = torch.randn(20, 4, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    return model, (x, torch.randn(20, 2, dtype=torch.float64)), nn.MSELoss(reduction=reduction)


def curvature_of(run: Run) -> Tensor:
    """The dense Hessian of a regression's loss."""
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss_of(run), run.parameters, create_graph=True)])
    return torch.stack([flat(torch.autograd.grad(g, run.parameters, retain_graph=True)) for g in gradient])


def bn_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 4)).double()


def spoiling(run: Run, value: float = 1e3) -> Callable[[], tuple[Tensor, Tensor]]:
    """A closure whose outputs are off as soon as a parameter has moved, which its derivatives do not show."""
    before, plain = flat(run.parameters).clone(), run.evaluate

    def evaluate() -> tuple[Tensor, Tensor]:
        outputs, targets = plain()
        moved = all(type(p) is nn.Parameter for p in run.model.parameters()) and not torch.equal(flat(run.parameters), before)
        return (outputs * value if moved else outputs), targets

    return evaluate
