"""backward() and step() under autocast: bit for bit what they are outside of it, as K-FAC's own arithmetic keeps its types."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.autocast import NoAutocast, without_autocast

loss_of = nn.functional.cross_entropy


class Words(nn.Module):
    """Embedding, attention and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.words(words)
        return self.head(self.norm(x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Tanh(), nn.Linear(9, 4))


def _images() -> nn.Module:
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3), nn.GroupNorm(2, 4)
    return nn.Sequential(*layers, nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.Linear(144, 4))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (_mlp, lambda: torch.randn(32, 6)),
    "images": (_images, lambda: torch.randn(16, 2, 6, 6)),
    "words": (Words, lambda: torch.randint(11, (16, 5))),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ekfac": {"curvature": "ekfac"},
    "exact damping": {"exact_damping": True},
    "adamw": {"tail": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "adam": {"curvature": "adam", "tail": "adamw", "nesterov": True, "lr": 0.01, "weight_decay": 0.1},
    "clip": {"kl_clip": 1e-4, "nesterov": True},
    "reduce": {"weight_sharing": "reduce"},
    "blocks": {"max_factor_size": 20, "oversize": "block"},
    "diagonals": {"max_factor_size": 6},
    "fewer rows": {"stats_fraction": 0.5},
    "mc": {"fisher": "mc"},
    "ggn": {"fisher": "ggn"},
    "16-bit factors": {"factor_dtype": "bfloat16"},
    **{name: {"inverse": name} for name in ("newton_schulz", "factored", "cholesky", "eigh")},
}


def _autocast(enabled: bool, dtype: torch.dtype = torch.bfloat16) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype) if enabled else nullcontext()


def _state(model: nn.Module, optimizer: KFAC | KFACPreconditioner) -> list[Tensor]:
    return [p.detach() for p in model.parameters()] + [side for pair in optimizer.factors().values() for side in pair]


def _train(net: str, around: bool, settings: dict[str, Any], dtype: torch.dtype, backend: str | None = None) -> list[Tensor]:
    """The parameters and factors after three steps; `around` is whether backward and step are under autocast, too."""
    torch.compiler.reset()
    torch.manual_seed(0)
    make, draw = NETS[net]
    model = make()
    optimizer = KFAC(model, **{"lr": 0.1, "damping": 0.05, "loss": nn.CrossEntropyLoss(), **settings})
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    for _ in range(3):
        x = draw()
        y = torch.randint(4, (len(x),))
        with _autocast(True, dtype):
            outputs = run(x)
            loss = loss_of(outputs, y)
        with _autocast(around, dtype):
            optimizer.accumulate_fisher(outputs, y)
            loss.backward()
            optimizer.step()
        assert optimizer.diagnostics()["without_statistics"] == []
        optimizer.zero_grad()
    return _state(model, optimizer)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("net", NETS)
def test_a_step_is_that_outside_of_autocast(net: str, name: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        inside, outside = (_train(net, around, SETTINGS[name], dtype) for around in (True, False))
        assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("name", ["plain", "ekfac", "diagonals", "ggn"])
@pytest.mark.parametrize("net", ["mlp", "images"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_passes(backend: str, net: str, name: str) -> None:
    inside, outside = (_train(net, around, SETTINGS[name], torch.bfloat16, backend) for around in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
    if backend == "aot_eager" and name in (
        "plain",
        "diagonals",
    ):  # the graph of the backward pass was traced under the forward pass's autocast
        eager = _train(net, False, SETTINGS[name], torch.bfloat16)
        assert all(torch.equal(a, b) for a, b in zip(inside, eager, strict=True))


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
@pytest.mark.parametrize("attached", [True, False])
def test_a_preconditioner(attached: bool, curvature: str) -> None:
    results = []
    for around in (True, False):
        torch.manual_seed(0)
        model = _mlp()
        sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        preconditioner = KFACPreconditioner(model, damping=0.05, curvature=curvature)
        if attached:
            preconditioner.attach(sgd)
        for _ in range(3):
            sgd.zero_grad()
            with _autocast(True):
                loss = loss_of(model(torch.randn(32, 6)), torch.randint(4, (32,)))
            with _autocast(around):
                loss.backward()
                if not attached:
                    preconditioner.precondition_()
                sgd.step()
        results.append(_state(model, preconditioner))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("attached", [True, False])
def test_a_closure_runs_under_the_autocast_of_its_step(attached: bool) -> None:
    inside, outside = (_train_by_closure(attached, around) for around in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def _train_by_closure(attached: bool, around: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model, seen = _mlp(), []
    optimizer: torch.optim.Optimizer
    if attached:
        optimizer, kfac = torch.optim.SGD(model.parameters(), lr=0.1), KFACPreconditioner(model, damping=0.05)
        kfac.attach(optimizer)
    else:
        optimizer = kfac = KFAC(model, damping=0.05)

    def closure() -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        optimizer.zero_grad()
        x, y = torch.randn(32, 6), torch.randint(4, (32,))
        with _autocast(not around):
            outputs = model(x)
            loss = loss_of(outputs, y)
        assert outputs.dtype == torch.bfloat16
        loss.backward()
        return loss

    for _ in range(3):
        with _autocast(around):
            optimizer.step(closure)
    assert seen == [around] * 3
    return _state(model, kfac)


@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_every_evaluation_of_lr_auto_runs_under_the_autocast_of_its_step(curvature: str, fisher: str) -> None:
    """And sees the parameters as they are then, not the copies that autocast made for an earlier evaluation."""
    results = []
    for around in (True, False):
        torch.manual_seed(0)
        model, seen, losses = _mlp(), [], []
        optimizer = KFAC(model, lr="auto", loss=nn.CrossEntropyLoss(), damping=0.1, curvature=curvature, fisher=fisher)
        x = torch.randn(64, 6)
        y = x[:, :4].argmax(1)

        def closure(
            x: Tensor = x, y: Tensor = y, model: nn.Module = model, seen: list[bool] = seen, inside: bool = not around
        ) -> tuple[Tensor, Tensor]:
            seen.append(torch.is_autocast_enabled("cpu"))
            with _autocast(inside):
                outputs = model(x)
            assert outputs.dtype == torch.bfloat16
            return outputs.float(), y

        for _ in range(8):
            with _autocast(around):
                losses.append(float(optimizer.step(closure)))
        assert set(seen) == {around}
        assert len(seen) >= 8 * 3
        assert losses[-1] < 0.5 * losses[0]
        results.append(_state(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_loop_inside_of_one_autocast() -> None:
    """Autocast keeps the weights that it has cast until its context ends; a step moves the weights."""
    results = []
    for around in (True, False):
        torch.manual_seed(0)
        model = _mlp()
        optimizer = KFAC(model, damping=0.05)
        with _autocast(around):
            for _ in range(3):
                optimizer.zero_grad()
                with _autocast(True):
                    loss = loss_of(model(torch.randn(32, 6)), torch.randint(4, (32,)))
                loss.backward()
                optimizer.step()
        results.append(_state(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def _modes() -> tuple[bool, bool, torch.dtype]:
    return torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cpu")


def test_the_context_is_for_all_devices_and_leaves_nothing_behind() -> None:
    seen = []

    @without_autocast
    def fails() -> None:
        seen.append(_modes()[:2])
        raise ArithmeticError

    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", torch.float16):
            before = _modes()
            assert before == (True, True, torch.float16)
            with pytest.raises(ArithmeticError):
                fails()
            assert _modes() == before
            with NoAutocast() as context:
                assert context.call_outside(_modes) == before
                assert _modes()[:2] == (False, False)
                with pytest.raises(ArithmeticError):
                    context.call_outside(fails)
                assert _modes()[:2] == (False, False)
            assert _modes() == before
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert seen == [(False, False)] * 2
    with NoAutocast() as context:
        assert context.call_outside(_modes)[:2] == (False, False)


def test_a_closure_that_fails_leaves_autocast_as_it_was() -> None:
    model = _mlp()
    optimizer = KFAC(model, lr="auto", loss=nn.CrossEntropyLoss())

    def closure() -> tuple[Tensor, Tensor]:
        raise ArithmeticError

    with torch.autocast("cpu", torch.bfloat16):
        before = _modes()
        with pytest.raises(ArithmeticError):
            optimizer.step(closure)
        assert _modes() == before
