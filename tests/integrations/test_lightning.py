"""Lightning: automatic and manual optimization are the plain PyTorch loop, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.lightning_runs import decay, plain, require_same, trainer
from integrations.small_net import OPTIONS, STEPS, batches, label, net
from torch import nn
from torch.utils.data import DataLoader

from kfac_triton import KFAC, KFACAdam

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:no statistics came:UserWarning")]


@pytest.mark.parametrize("kind", ["automatic", "manual"])
@pytest.mark.parametrize(
    ("method", "options"),
    [(KFAC, {}), (KFAC, {"inverse_every": 10, "statistics_every": 2}), (KFAC, {"curvature": "ekfac"}), (KFACAdam, {})],
    ids=label,
)
def test_as_the_plain_loop(
    module_of: Callable[..., Any], tmp_path: Path, kind: str, method: type[KFAC], options: dict[str, Any]
) -> None:
    """Automatic optimization runs forward, zero_grad and backward in a closure of step; validation leaves no statistics."""
    module = module_of(kind, method=method, **options)
    trainer(tmp_path, enable_checkpointing=False, val_check_interval=20).fit(module, batches(STEPS), batches(3))
    require_same(module.losses, module.net, plain(STEPS, method=method, **options))
    assert sum(module.losses[-5:]) < 0.5 * sum(module.losses[:5])


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_accumulation_and_clipping(module_of: Callable[..., Any], tmp_path: Path, method: type[KFAC]) -> None:
    """Lightning divides the loss, and clips in the closure; a clip of 0.1 changes the run."""
    module = module_of(method=method)
    options = {"enable_checkpointing": False, "accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    trainer(tmp_path, **options).fit(module, batches(2 * STEPS))
    require_same(module.losses, module.net, plain(2 * STEPS, accumulate=2, clip=0.1, method=method))
    assert module.losses != plain(2 * STEPS, accumulate=2, method=method)[0]
    assert module.optimizers().optimizer.engine.progress.steps == STEPS


@pytest.mark.parametrize("kind", ["automatic", "manual"])
@pytest.mark.parametrize(("method", "options"), [(KFAC, {}), (KFAC, {"inverse_every": 10}), (KFACAdam, {})], ids=label)
def test_checkpoint_and_resume(
    module_of: Callable[..., Any], tmp_path: Path, kind: str, method: type[KFAC], options: dict[str, Any]
) -> None:
    """An epoch, saved; the second from other weights, that the checkpoint overwrites."""
    first = module_of(kind, method=method, **options)
    one = trainer(tmp_path)
    one.fit(first, batches(STEPS // 2))

    second = module_of(kind, seed=9, method=method, **options)
    two = trainer(tmp_path, max_epochs=2)
    two.fit(second, batches(STEPS // 2), ckpt_path=one.checkpoint_callback.best_model_path, weights_only=True)
    require_same(first.losses + second.losses, second.net, plain(STEPS // 2, epochs=2, method=method, **options))


def test_bfloat16(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """The forward pass runs under autocast; factors have 32 bits."""
    module = module_of()
    trainer(tmp_path, enable_checkpointing=False, precision="bf16-mixed").fit(module, batches(STEPS))
    require_same(module.losses, module.net, plain(STEPS, bfloat16=True))
    assert module.losses != plain(STEPS)[0]
    assert sum(module.losses[-5:]) < 0.5 * sum(module.losses[:5])
    assert {x.dtype for pair in module.optimizers().optimizer.factors().values() for x in pair} == {torch.float32}


def test_a_scaler_and_a_step_that_it_skips(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """As the run without it, and without the batch whose gradients overflow: scales are powers of two, so no digit is lost."""
    from lightning.pytorch.plugins import MixedPrecision

    class InSinglePrecision(MixedPrecision):
        def forward_context(self) -> Any:
            return contextlib.nullcontext()

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    module = module_of(loss_scale=scaler)
    train = module.training_step
    module.training_step = lambda batch, batch_idx: train(batch, batch_idx) * (torch.inf if batch_idx == 20 else 1.0)
    # Without the scheduler, which Lightning moves on at a skipped step, too.
    module.configure_optimizers = module.optimizer
    data = list(batches(STEPS))
    data.insert(20, data[20])
    options = {"enable_checkpointing": False, "plugins": [InSinglePrecision("16-mixed", "cpu", scaler)]}
    trainer(tmp_path, **options).fit(module, DataLoader(data, batch_size=None))
    assert scaler.get_scale() == 512
    del module.losses[20]
    require_same(module.losses, module.net, plain(STEPS, schedule=lambda step: 1.0))


def test_lr_auto(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """With manual optimization step takes the closure that returns outputs and targets."""
    auto: dict[str, Any] = {"lr": "auto", "fisher": "mc", "loss": nn.CrossEntropyLoss(), "damping": 0.1, "weight_decay": 0.0}
    module = module_of("auto", **auto)
    torch.manual_seed(0)
    trainer(tmp_path, enable_checkpointing=False).fit(module, batches(20))
    model = net()
    optimizer = KFAC(model, **auto)
    torch.manual_seed(0)
    for x, y in batches(20):
        optimizer.step(lambda x=x, y=y: (model(x), y))
    x, y = next(iter(batches(1)))
    losses = [nn.functional.cross_entropy(net(x), y).item() for net in (module.net, model)]
    require_same(losses[:1], module.net, (losses[1:], model))
    assert losses[0] < 0.5


def test_drawn_labels(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """Their statistics outlive the zero_grad that Lightning calls between forward and backward."""
    true: dict[str, Any] = {"fisher": "mc", "loss": nn.CrossEntropyLoss()}
    module = module_of("drawing", **true)
    torch.manual_seed(0)
    trainer(tmp_path, enable_checkpointing=False).fit(module, batches(STEPS))
    model = net()
    optimizer = KFAC(model, **OPTIONS, **true)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, decay)
    losses = []
    torch.manual_seed(0)
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        logits = model(x)
        optimizer.accumulate_fisher(logits, y)
        loss = nn.functional.cross_entropy(logits, y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    require_same(module.losses, module.net, (losses, model))


def test_a_remainder_is_scaled_as_a_whole_step(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """Three batches, two a step: the last step's gradient is half of the mean's, and its G a quarter; the page says so."""
    module = module_of(ema_decay=0.0)
    trainer(tmp_path, enable_checkpointing=False, accumulate_grad_batches=2).fit(module, batches(3))
    optimizer = module.optimizers().optimizer
    assert optimizer.engine.progress.steps == 2

    model = net()
    twin = KFAC(model, **OPTIONS, ema_decay=0.0)
    model.load_state_dict(plain(2, accumulate=2)[1].state_dict())
    x, y = list(batches(3))[2]
    nn.functional.cross_entropy(model(x), y).backward()
    twin.step()
    for name, (_, G) in twin.factors().items():
        torch.testing.assert_close(4 * optimizer.factors()[f"net.{name}"][1], G, rtol=1e-4, atol=1e-7)
