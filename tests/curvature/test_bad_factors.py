"""Singular, zero and badly scaled factors as training meets them, through every form of curvature and every inverse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.helpers import energy_error
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.curvature.diagonal import DiagonalFactors, DiagonalInverse
from kfac_triton.curvature.eigenbasis import EigenStack
from kfac_triton.curvature.inverse import ACCEPT
from kfac_triton.settings import METHODS

FORMS = {method: {"inverse": method} for method in METHODS if method != "auto"} | {
    "ekfac": {"curvature": "ekfac"},
    "exact damping": {"exact_damping": True},
}
Batch = tuple[Tensor, Tensor, float]  # inputs, labels, factor on the loss
EXAMPLES = 12


def _batch(examples: int = EXAMPLES, inputs: float = 1.0, loss: float = 1.0) -> Batch:
    return inputs * torch.randn(examples, 6), torch.randint(3, (examples,)), loss


def _same_example() -> Batch:
    x, y, loss = _batch(1)
    return x.expand(EXAMPLES, -1).contiguous(), y.expand(EXAMPLES), loss


SITUATIONS: dict[str, Callable[[], Batch]] = {
    "one example": lambda: _batch(1),
    "one example over and over": _same_example,
    "inputs of zero": lambda: _batch(inputs=0.0),
    "gradients of zero": lambda: _batch(loss=0.0),
    "nothing but zeros": lambda: _batch(inputs=0.0, loss=0.0),
    "inputs times 1e15": lambda: _batch(inputs=1e15),
    "inputs times 1e-15": lambda: _batch(inputs=1e-15),
    "loss times 1e12": lambda: _batch(loss=1e12),
    "loss times 1e-12": lambda: _batch(loss=1e-12),
    "loss times 1e-21": lambda: _batch(loss=1e-21),
    "inputs times 1e15, loss times 1e-12": lambda: _batch(inputs=1e15, loss=1e-12),
    "inputs times 1e-15, loss times 1e12": lambda: _batch(inputs=1e-15, loss=1e12),
}


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))


def _step(model: nn.Module, optimizer: KFAC, batch: Batch) -> None:
    inputs, labels, scale = batch
    optimizer.zero_grad()
    (scale * nn.functional.cross_entropy(model(inputs), labels)).backward()
    optimizer.step()


def assert_sound(model: nn.Module, optimizer: KFAC) -> None:
    """Finite parameters; every inverse certified, and rightly so, or zero."""
    assert all(torch.isfinite(p).all() for p in model.parameters())
    curvature = optimizer.engine.curvature
    for store, inverse in zip(curvature.bank.stacks, curvature.inverses, strict=True):
        certified = inverse.residual <= ACCEPT
        assert torch.isfinite(inverse.values).all()
        assert (inverse.values[~certified] == 0).all()
        if isinstance(inverse, EigenStack):
            continue
        values = inverse.values.double()
        inverses = values.mT @ values if inverse.factored else values
        for i in certified.nonzero().flatten().tolist():
            damping = inverse.damping[i].double() * torch.eye(values.shape[-1], dtype=torch.float64)
            assert energy_error(store.factors[i].double() + damping, inverses[i]) < 1
    optimizer.diagnostics()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("damping", "ordinary"), [(0.03, 2), (1e-10, 0)])
def test_training_goes_through_bad_factors(form: str, situation: str, damping: float, ordinary: int) -> None:
    """In the midst of ordinary steps, and from the first one."""
    model = _model()
    optimizer = KFAC(model, lr=0.1, damping=damping, ema_decay=0.5, **FORMS[form])
    for _ in range(ordinary):
        _step(model, optimizer, _batch())
    for _ in range(3):
        _step(model, optimizer, SITUATIONS[situation]())
        assert_sound(model, optimizer)
    for _ in range(3):
        _step(model, optimizer, _batch())
        assert_sound(model, optimizer)
    assert all(layer["updates"] == ordinary + 6 for layer in optimizer.diagnostics()["layers"].values())
    optimizer.change(ema_decay=0.0)  # an average over factors of 1e30 would hold the steps down for long, as it should
    before = [p.detach().clone() for p in model.parameters()]
    _step(model, optimizer, _batch())
    assert_sound(model, optimizer)
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_that_dies_and_comes_alive_again(form: str) -> None:
    """While it is dead both of its factors fade to zero; the layers around it go on."""
    model = _model()
    optimizer = KFAC(model, lr=0.1, momentum=0.0, ema_decay=0.1, **FORMS[form])
    first, middle = model[0], model[2]
    for _ in range(3):
        _step(model, optimizer, _batch())
    alive, old = first.bias.detach().clone(), middle.weight.detach().clone()
    with torch.no_grad():
        first.bias.fill_(-1e3)
    for _ in range(50):  # 0.1^46 is below float32's smallest number
        _step(model, optimizer, _batch())
        assert_sound(model, optimizer)
    assert all((side == 0).all() for side in optimizer.factors()["2"])
    assert (middle.weight - old).abs().max() <= 1e-6 + 0.1 * old.abs().max()
    with torch.no_grad():
        first.bias.copy_(alive)
    losses = []
    for _ in range(20):
        inputs = torch.randn(200, 6)
        labels = (inputs[:, 0] > 0).long()
        _step(model, optimizer, (inputs, labels, 1.0))
        losses.append(float(nn.functional.cross_entropy(model(inputs), labels).detach()))
        assert_sound(model, optimizer)
    assert not torch.equal(middle.weight, old)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_inverse_of_a_diagonal_is_finite(dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    numbers = [0.0, limits.tiny * limits.eps, limits.tiny, 1.0, 0.5 * limits.max, 0.0]
    store = DiagonalFactors([1] * len(numbers), dtype, torch.device("cpu"))
    inverse = DiagonalInverse(store)
    store.factors.copy_(torch.tensor(numbers, dtype=dtype))
    inverse.refresh(store.factors, torch.tensor([limits.tiny * limits.eps] * 5 + [0.0], dtype=dtype))
    assert torch.isfinite(inverse.values).all()
    assert (inverse.values[:5] > 0).all()
    assert inverse.values[5] == 0  # no statistics yet, and a factor that takes no damping
