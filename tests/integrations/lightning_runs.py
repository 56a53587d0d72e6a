"""A net, data and the plain PyTorch loop for Lightning to be compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from kfac_triton import KFAC

STEPS, BATCH = 50, 16
OPTIONS: dict[str, Any] = {"lr": 0.3, "damping": 0.03, "kl_clip": 1e-2, "weight_decay": 1e-3}


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))


def batches(count: int) -> DataLoader:
    """In order; the label is the largest of four projections."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * STEPS * BATCH, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    return DataLoader(list(zip(x, y, strict=True))[: count * BATCH], batch_size=BATCH)


def decay(step: int) -> float:
    return 1 / (1 + 0.1 * step)


def plain(
    count: int,
    epochs: int = 1,
    accumulate: int = 1,
    clip: float | None = None,
    schedule: Callable[[int], float] = decay,
    bfloat16: bool = False,
    **options: Any,
) -> tuple[list[float], nn.Module]:
    """Losses of the batches, and the model, of the loop without a trainer."""
    model = net()
    optimizer = KFAC(model, **OPTIONS, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    for number, (x, y) in enumerate(list(batches(count)) * epochs, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        (loss / accumulate).backward()
        losses.append(loss.item())
        if number % accumulate == 0:
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return losses, model


def trainer(folder: Path, **options: Any) -> Any:
    import lightning

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{"accelerator": "cpu", "default_root_dir": folder, "max_epochs": 1, **quiet, **options})


def require_same(losses: list[float], model: nn.Module, truth: tuple[list[float], nn.Module]) -> None:
    expected, twin = truth
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    print(f"{len(losses)} batches, loss {losses[0]:.3f} to {losses[-1]:.3f}: losses differ by {worst}, parameters by {apart}")
    assert worst == 0
    assert apart == 0
