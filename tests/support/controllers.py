"""Steps with lr="auto" without an engine, for their tests, and small models for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton.settings import Settings
from kfac_triton.steps.auto import AutoStep

Gradients = list[Tensor | None]


class PlainEngine:
    """Does what the engine does for a step, without curvature."""

    def __init__(self, run: Run, loss: nn.Module, damping: float) -> None:
        self.settings = Settings(loss=loss, damping=damping)
        self.run = run
        self.paused: Callable[[], AbstractContextManager[Any]] = nullcontext

    def require_open(self) -> None:
        """It always is."""

    def forget_statistics(self) -> None:
        """There are none."""

    def accumulate_fisher(self, outputs: Tensor, targets: Tensor) -> None:
        self.run.before_backward()

    def change(self, damping: float) -> None:
        self.run.dampings.append(damping)

    def precondition(self, learning_rate: Callable[[Tensor], float]) -> dict[Tensor, Tensor]:
        parameters = self.run.parameters
        natural = self.run.precondition([p.grad for p in parameters], self.run.dampings[-1])
        return {p: v for p, v in zip(parameters, natural, strict=True) if v is not None}


class Run:
    """Steps with plain gradients in place of the preconditioned ones: V = h for the first `covered` parameters."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss: nn.Module,
        covered: int | None = None,
        damping: float = 0.03,
        damping_every: int = 5,
        damping_floor: float = 1e-8,
        damping_ceiling: float = 1e8,
        weight_decay: float | list[float] = 0.0,
    ) -> None:
        self.model, self.batch, self.loss = model, batch, loss
        self.parameters = list(model.parameters())
        self.covered = len(self.parameters) if covered is None else covered
        self.weight_decay = weight_decay if isinstance(weight_decay, list) else [weight_decay] * len(self.parameters)
        self.engine = PlainEngine(self, loss, damping)
        self.auto = AutoStep(model, self.engine, self.parameters, damping_every, (damping_floor, damping_ceiling))
        self.controller = self.auto.controller
        self.dampings: list[float] = []
        self.calls = 0

    def evaluate(self) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return self.model(self.batch[0]), self.batch[1]

    def before_backward(self) -> None:
        """Where curvature has its backward passes."""

    def precondition(self, gradient: Gradients, damping: float) -> Gradients:
        return [g if i < self.covered else None for i, g in enumerate(gradient)]

    def step(self, evaluate: Callable[[], Any] | None = None) -> dict[str, Any]:
        self.auto.step(evaluate or self.evaluate, self.weight_decay)
        return self.auto.report


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
