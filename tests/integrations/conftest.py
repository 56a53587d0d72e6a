"""Trainers that note the loss of each batch. The packages are imported where a test asks for them, so that all can collect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations import hf_runs, lightning_runs, small_net
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam
from kfac_triton.integrations import kfac_adam_factory, kfac_factory

FACTORIES = {KFAC: kfac_factory, KFACAdam: kfac_adam_factory}


@pytest.fixture
def trainer_of(tmp_path: Path) -> Callable[..., Any]:
    """Makes a Trainer that notes the loss of each batch."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()

    class Noting(Trainer):
        losses: list[float]

        def compute_loss(self, model: Any, inputs: Any, **options: Any) -> Tensor:
            loss = super().compute_loss(model, inputs, **options)
            if model.training:
                self.losses.append(loss.item())
            return loss

    def make(
        model: nn.Module,
        data: list[Any],
        optimizer: KFAC | None = None,
        options: Any = None,
        method: type[KFAC] = KFAC,
        **arguments: Any,
    ) -> Any:
        plain: dict[str, Any] = {"max_steps": hf_runs.STEPS, "max_grad_norm": 0.0}
        schedule: dict[str, Any] = {"lr_scheduler_type": "linear", "warmup_steps": 5}
        quiet: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        order: dict[str, Any] = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": hf_runs.BATCH}
        args = TrainingArguments(str(tmp_path), **{**plain, **schedule, **quiet, **order, **arguments})
        made: dict[str, Any] = {"optimizers": (optimizer, None)}
        if optimizer is None:
            made = {"optimizer_cls_and_kwargs": (FACTORIES[method], options)}
        trainer = Noting(model, args, train_dataset=data, eval_dataset=data[: hf_runs.BATCH], **made)
        trainer.losses = []
        return trainer

    return make


@pytest.fixture
def module_of() -> Callable[..., Any]:
    """Makes a LightningModule around the net."""
    import lightning

    class Automatic(lightning.LightningModule):
        def __init__(self, method: type[KFAC], options: dict[str, Any]) -> None:
            super().__init__()
            self.net = small_net.net()
            self.method, self.options = method, options
            self.losses: list[float] = []

        def loss_of(self, batch: list[Tensor]) -> Tensor:
            loss = nn.functional.cross_entropy(self.net(batch[0]).float(), batch[1])
            self.losses.append(loss.item())
            return loss

        def training_step(self, batch: list[Tensor], number: int) -> Tensor | None:
            return self.loss_of(batch)

        def validation_step(self, batch: list[Tensor], number: int) -> None:
            self.log("validation", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

        def optimizer(self) -> KFAC:
            return small_net.make(self.method, self, **self.options)

        def configure_optimizers(self) -> Any:
            optimizer = self.optimizer()
            scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lightning_runs.decay)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    class Manual(Automatic):
        def __init__(self, method: type[KFAC], options: dict[str, Any]) -> None:
            super().__init__(method, options)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], number: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss_of(batch))
            optimizer.step()
            self.lr_schedulers().step()

    class Auto(Manual):
        def training_step(self, batch: list[Tensor], number: int) -> None:
            x, y = batch
            self.optimizers().step(lambda: (self.net(x), y))

    class Drawing(Automatic):
        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            logits = self.net(batch[0])
            self.optimizers().optimizer.accumulate_fisher(logits, batch[1])
            loss = nn.functional.cross_entropy(logits, batch[1])
            self.losses.append(loss.item())
            return loss

    kinds: dict[str, type[Automatic]] = {"automatic": Automatic, "manual": Manual, "auto": Auto, "drawing": Drawing}

    def make(kind: str = "automatic", seed: int | None = None, method: type[KFAC] = KFAC, **options: Any) -> Any:
        module = kinds[kind](method, options)
        if seed is not None:
            torch.manual_seed(seed)
            for p in module.parameters():
                p.data.normal_()
        return module

    return make
