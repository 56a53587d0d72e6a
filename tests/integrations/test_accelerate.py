"""Hugging Face accelerate: every loop is the plain PyTorch loop, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.small_net import OPTIONS, STEPS, batches, label, loss_of, make, net
from torch import nn

from kfac_triton import KFAC, KFACAdam

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:no statistics came:UserWarning")]


@pytest.fixture
def accelerator_of() -> Iterator[Callable[..., Any]]:
    """Makes an Accelerator on the CPU; its process-wide state is taken down before each and after the last."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def make(**options: Any) -> Any:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        return Accelerator(cpu=True, **options)

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def plain(
    count: int,
    accumulate: int = 1,
    clip: float | None = None,
    bfloat16: bool = False,
    method: type[KFAC] = KFAC,
    **options: Any,
) -> Any:
    """(losses of the batches, model) of the loop without a trainer."""
    model = net()
    optimizer = make(method, model, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    losses = []
    optimizer.zero_grad()
    for number, (x, y) in enumerate(batches(count), 1):
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext():
            logits = model(x)
        loss = loss_of(logits, y)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, model


def prepared(
    accelerator: Any, count: int, seed: int | None = None, method: type[KFAC] = KFAC, **options: Any
) -> tuple[Any, Any, Any, Any]:
    model = net()
    if seed is not None:
        torch.manual_seed(seed)
        for p in model.parameters():
            p.data.normal_()
    optimizer = make(method, model, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + 0.1 * step))
    return accelerator.prepare(model, optimizer, batches(count), scheduler)


def run(
    accelerator: Any, parts: tuple[Any, Any, Any, Any], clip: float | None = None, skip: int = 0, stop: int = 0
) -> list[float]:
    """Losses of the batches, after some that are left out."""
    model, optimizer, loader, scheduler = parts
    losses = []
    for number, (x, y) in enumerate(accelerator.skip_first_batches(loader, skip) if skip else loader, 1 + skip):
        with accelerator.accumulate(model):
            loss = loss_of(model(x), y)
            accelerator.backward(loss)
            losses.append(loss.item())
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if number == stop:
            break
    return losses


def require_same(losses: list[float], model: nn.Module, truth: Any) -> None:
    expected, twin = truth
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    print(f"{len(losses)} batches, loss {losses[0]:.3f} to {losses[-1]:.3f}: losses differ by {worst}, parameters by {apart}")
    assert worst == 0
    assert apart == 0


@pytest.mark.parametrize(
    ("method", "options"),
    [(KFAC, {}), (KFAC, {"inverse_every": 10, "statistics_every": 2}), (KFAC, {"curvature": "ekfac"}), (KFACAdam, {})],
    ids=label,
)
def test_as_the_plain_loop(accelerator_of: Callable[..., Any], method: type[KFAC], options: dict[str, Any]) -> None:
    """prepare() loads the optimizer's own state into it, before there are factors."""
    accelerator = accelerator_of()
    parts = prepared(accelerator, STEPS, method=method, **options)
    losses = run(accelerator, parts)
    require_same(losses, parts[0], plain(STEPS, method=method, **options))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_accumulation_and_clipping(accelerator_of: Callable[..., Any], method: type[KFAC]) -> None:
    """The wrapper leaves out steps and zero_grad of ours between; a clip of 0.1 changes the run."""
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    parts = prepared(accelerator, 2 * STEPS, method=method)
    losses = run(accelerator, parts, clip=0.1)
    require_same(losses, parts[0], plain(2 * STEPS, accumulate=2, clip=0.1, method=method))
    assert losses != plain(2 * STEPS, accumulate=2, method=method)[0]
    assert parts[1].optimizer.engine.progress.steps == STEPS


def test_a_remainder_is_scaled_as_a_whole_step(accelerator_of: Callable[..., Any]) -> None:
    """Three batches, two a step: accelerate steps at the end of the data, with a gradient that is half of the mean's.

    G is that of this loss, a quarter; the page says how to keep clear of it.
    """
    accelerator = accelerator_of(gradient_accumulation_steps=2)
    parts = prepared(accelerator, 3, ema_decay=0.0)
    run(accelerator, parts)
    optimizer = parts[1].optimizer
    assert optimizer.engine.progress.steps == 2

    model = net()
    twin = KFAC(model, **OPTIONS, ema_decay=0.0)
    model.load_state_dict(plain(2, accumulate=2)[1].state_dict())
    x, y = list(batches(3))[2]
    loss_of(model(x), y).backward()
    twin.step()
    for name, (_, G) in optimizer.factors().items():
        torch.testing.assert_close(4 * G, twin.factors()[name][1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("method", "options"), [(KFAC, {}), (KFAC, {"inverse_every": 10}), (KFACAdam, {})], ids=label)
def test_save_state_and_load_state(
    accelerator_of: Callable[..., Any], tmp_path: Path, method: type[KFAC], options: dict[str, Any]
) -> None:
    """Half a run, saved; the other half from other weights, that load overwrites."""
    accelerator = accelerator_of()
    parts = prepared(accelerator, STEPS, method=method, **options)
    first = run(accelerator, parts, stop=STEPS // 2)
    accelerator.save_state(str(tmp_path))

    accelerator = accelerator_of()
    parts = prepared(accelerator, STEPS, seed=9, method=method, **options)
    accelerator.load_state(str(tmp_path))
    second = run(accelerator, parts, skip=STEPS // 2)
    require_same(first + second, parts[0], plain(STEPS, method=method, **options))


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_bfloat16(accelerator_of: Callable[..., Any], method: type[KFAC]) -> None:
    """The forward pass runs under autocast; factors have 32 bits."""
    accelerator = accelerator_of(mixed_precision="bf16")
    parts = prepared(accelerator, STEPS, method=method)
    losses = run(accelerator, parts)
    require_same(losses, parts[0], plain(STEPS, bfloat16=True, method=method))
    assert losses != plain(STEPS, method=method)[0]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert {x.dtype for pair in parts[1].optimizer.factors().values() for x in pair} == {torch.float32}


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_a_scaler_and_a_step_that_it_skips(accelerator_of: Callable[..., Any], method: type[KFAC]) -> None:
    """As the run without it, and without the batch whose gradients overflow: scales are powers of two, so no digit is lost."""
    accelerator = accelerator_of()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # accelerate makes it for a GPU alone
    model, optimizer, loader, scheduler = prepared(accelerator, STEPS, method=method, loss_scale=accelerator.scaler)
    losses = []
    for number, (x, y) in enumerate(loader):
        for bad in (True, False) if number == 20 else (False,):
            loss = loss_of(model(x), y)
            accelerator.backward(loss * torch.inf if bad else loss)
            optimizer.step()
            assert optimizer.step_was_skipped is bad
            scheduler.step()
            optimizer.zero_grad()
            losses += [] if bad else [loss.item()]
    assert accelerator.scaler.get_scale() == 512
    require_same(losses, model, plain(STEPS, method=method))


def test_lr_auto(accelerator_of: Callable[..., Any]) -> None:
    """The prepared optimizer hands the closure on; there is no backward."""
    auto: dict[str, Any] = {"lr": "auto", "fisher": "mc", "loss": nn.CrossEntropyLoss(), "damping": 0.1}
    accelerator = accelerator_of()
    model = net()
    model, optimizer, loader = accelerator.prepare(model, KFAC(model, **auto), batches(20))
    twin = net()
    other = KFAC(twin, **auto)
    torch.manual_seed(0)
    for x, y in loader:
        optimizer.step(lambda x=x, y=y: (model(x), y))
    losses = [loss_of(model(x), y).item() for x, y in batches(1)]
    torch.manual_seed(0)
    for x, y in batches(20):
        other.step(lambda x=x, y=y: (twin(x), y))
    require_same(losses, model, ([loss_of(twin(x), y).item() for x, y in batches(1)], twin))
    assert losses[0] < 0.3
