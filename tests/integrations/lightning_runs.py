"""The plain PyTorch loop for Lightning to be compared with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from integrations.small_net import batches, loss_of, make, net
from torch import nn

from kfac_triton import KFAC


def decay(step: int) -> float:
    return 1 / (1 + 0.1 * step)


def plain(
    count: int,
    epochs: int = 1,
    accumulate: int = 1,
    clip: float | None = None,
    schedule: Callable[[int], float] = decay,
    bfloat16: bool = False,
    method: type[KFAC] = KFAC,
    **options: Any,
) -> tuple[list[float], nn.Module]:
    """Losses of the batches, and the model, of the loop without a trainer."""
    model = net()
    optimizer = make(method, model, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    losses = []
    for number, (x, y) in enumerate(list(batches(count)) * epochs, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = loss_of(model(x), y)
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
