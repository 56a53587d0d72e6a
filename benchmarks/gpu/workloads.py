"""What is trained for time, and a training step of it with an optimizer."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kfac_triton import KFAC, KFACAdam

from . import vision_models
from .findings import Bench
from .others import ADAMW, DAMPING, KFAC_ADAM, KFAC_NAME, KL_CLIP, LEARNING_RATE, Task, autoencoder, gpt2

Step = Callable[[], Tensor]
RARELY = 10**6  # steps; more than any measurement does
# After three steps with statistics and inverses K-FAC computes neither again: what is left is preconditioning and the update.
FROZEN: dict[str, Any] = {"statistics_every": RARELY, "inverse_every": RARELY, "warmup": 3}


@dataclass(frozen=True)
class Variant:
    """An optimizer and how the training step is run.

    Attributes:
        name: for tables.
        optimizer: "AdamW", "K-FAC" or "KFACAdam".
        settings: of the optimizer.
        precision: of float32 products by the library: "highest", or "high" for TF32.
        compiled: whether the model goes through torch.compile.
    """

    name: str
    optimizer: str = KFAC_NAME
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str = "highest"
    compiled: bool = False


def task(bench: Bench, name: str) -> Task:
    """A model, its batch and its loss: "autoencoder", "gpt", "resnet50" or "vit_b"; a toy where the bench wants it small."""
    torch.manual_seed(0)
    device = torch.device(bench.device)
    if name in vision_models.NAMES:
        model, batch = vision_models.build(name, device, bench.small)
        description = f"{name}, {len(batch)} images {batch.shape[-1]} wide, bfloat16 autocast on a GPU"
        return Task(name, description, model, batch, _classification_loss)
    return {"autoencoder": autoencoder, "gpt": gpt2}[name](device, bench.small)


def _classification_loss(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Of made-up labels: example i of class i."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        logits = model(images)
    return F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device) % logits.shape[1])


def prepared(task: Task, variant: Variant) -> tuple[Any, torch.optim.Optimizer]:
    """A copy of the task's model, to be called, and its optimizer."""
    model = copy.deepcopy(task.model)
    settings: dict[str, Any] = {"lr": LEARNING_RATE}
    if variant.optimizer != ADAMW:
        settings |= {"loss_terms": task.loss_terms}
        if hasattr(model, "positions"):
            settings["skip"] = "positions"  # which are added, and nothing is multiplied by them
    optimizer: torch.optim.Optimizer
    if variant.optimizer == KFAC_NAME:
        settings |= {"tail": "adamw", "damping": DAMPING, "kl_clip": KL_CLIP, "statistics_every": 1, "inverse_every": 1}
        optimizer = KFAC(model, **settings | variant.settings)
    elif variant.optimizer == KFAC_ADAM:
        optimizer = KFACAdam(model, **settings | variant.settings)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), **settings | variant.settings)
    return torch.compile(model) if variant.compiled else model, optimizer


def training_step(task: Task, variant: Variant) -> tuple[Step, torch.optim.Optimizer]:
    """A step of a copy of the task's model, and its optimizer."""
    called, optimizer = prepared(task, variant)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(called, task.batch)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, optimizer


def clock(bench: Bench, step: Callable[[], object], seconds: float) -> tuple[float, float]:
    """(milliseconds a step, milliseconds of them until the host is done), the median of three series.

    Steps follow each other without a wait, from an idle device to an idle device. The host is done when the last step returns.
    """
    for _ in range(4):
        step()
    bench.wait()
    start = time.perf_counter()
    step()
    bench.wait()
    steps = max(3, min(50, int(seconds / max(1e-4, time.perf_counter() - start)))) // 3 + 1
    series = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(steps):
            step()
        host = time.perf_counter() - start
        bench.wait()
        series.append((1e3 * (time.perf_counter() - start) / steps, 1e3 * host / steps))
    return sorted(series)[1]


def certificates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """How many of K-FAC's iterative inverses were refused, and the worst residual; of KFACAdam's eigenvectors likewise."""
    if not isinstance(optimizer, KFAC):
        return {}
    stacks: list[Any] = [inverse for inverse in optimizer.engine.curvature.inverses if hasattr(inverse, "fallbacks")]
    if not stacks:
        return {}
    refused = sum(int(stack.fallbacks.sum()) for stack in stacks)
    return {"fallbacks": refused, "worst_residual": max(float(stack.residual.max()) for stack in stacks)}
