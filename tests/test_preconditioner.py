"""KFACPreconditioner in front of other optimizers."""

from __future__ import annotations

import pytest
import torch
from support.helpers import mlp
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner


def _loss(model: nn.Module, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(12, 5, generator=generator, dtype=torch.float64), torch.randint(4, (12,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def _vector(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def _trained_by_kfac(steps: int) -> Tensor:
    torch.manual_seed(0)
    model = mlp()
    optimizer = KFAC(model, lr=0.3, momentum=0.9, damping=0.1, kl_clip=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        _loss(model, step).backward()
        optimizer.step()
    return _vector(model)


@pytest.mark.parametrize("how", ["precondition_", "attach", "attach and closure", "attach and keyword closure"])
def test_in_front_of_sgd_it_is_kfac(how: str) -> None:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    preconditioner = KFACPreconditioner(model, lr=0.3, damping=0.1, kl_clip=1e-3)
    if how != "precondition_":
        preconditioner.attach(optimizer)
    losses = []
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = _loss(model, step)
            loss.backward()
            return loss

        if "closure" in how:
            expected = float(_loss(model, step))
            preconditioner.engine.statistics  # noqa: B018
            result = optimizer.step(closure) if how == "attach and closure" else optimizer.step(closure=closure)
            losses.append(float(result) == expected)
        else:
            closure()
            if how == "precondition_":
                preconditioner.precondition_()
            optimizer.step()
    assert all(losses)
    torch.testing.assert_close(_vector(model), _trained_by_kfac(4), rtol=1e-12, atol=1e-12)


def test_attached_optimizers_own_learning_rate_enters_the_kl_clip() -> None:
    scales = []
    for lr in (0.1, 10.0):
        torch.manual_seed(0)
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        preconditioner = KFACPreconditioner(model, lr=1e-9, kl_clip=1e-3)
        preconditioner.attach(optimizer)
        _loss(model, 0).backward()
        optimizer.step()
        scales.append(preconditioner.diagnostics()["kl_clip_scale"])
    assert scales[0] == pytest.approx(100 * scales[1])


def test_handle_and_close_detach() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFACPreconditioner(model)
    handle = preconditioner.attach(optimizer)
    handle.remove()
    _loss(model, 0).backward()
    optimizer.step()
    assert preconditioner.engine.progress.steps == 0
    preconditioner.attach(optimizer)
    optimizer.step()
    assert preconditioner.engine.progress.steps == 1
    preconditioner.close()
    optimizer.step()
    assert preconditioner.engine.progress.steps == 1
    with pytest.raises(RuntimeError, match="closed"):
        preconditioner.precondition_()


def test_what_cannot_be_attached() -> None:
    model = mlp()
    preconditioner = KFACPreconditioner(model)
    with pytest.raises(TypeError, match="LBFGS"):
        preconditioner.attach(torch.optim.LBFGS(model.parameters()))
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, but is Sequential"):
        preconditioner.attach(model)  # type: ignore[arg-type]


def test_unknown_and_bad_settings() -> None:
    with pytest.raises(TypeError, match="dampening"):
        KFACPreconditioner(mlp(), dampening=0.1)
    with pytest.raises(ValueError, match=r"lr must be .* but is -0.1"):
        KFACPreconditioner(mlp(), lr=-0.1)
