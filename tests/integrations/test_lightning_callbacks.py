"""Lightning's callbacks, several optimizers, and its wrapper of an optimizer: the plain PyTorch loop, bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.lightning_runs import plain, require_same, trainer
from integrations.small_net import BATCH, OPTIONS, STEPS, batches, make, net
from support import runs
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:no statistics came:UserWarning")]

AT = 20  # the batch before which something happens
Loop = tuple[list[float], nn.Module]


def constant(step: int) -> float:
    return 1.0


def without_schedule(module: Any) -> Any:
    module.configure_optimizers = module.optimizer
    return module


def changing(model: nn.Module, optimizer: KFAC, event: Callable[[], Any], data: Any, at: int = AT) -> Loop:
    """Losses and model of a plain loop in which something happens before a batch."""
    losses = []
    for number, (x, y) in enumerate(data):
        if number == at:
            event()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return losses, model


def adversaries() -> tuple[nn.Module, nn.Module]:
    """A generator and a discriminator."""
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 12)),
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 1)),
    )


def generator_loss(one: nn.Module, other: nn.Module, z: Tensor) -> Tensor:
    return nn.functional.softplus(-other(one(z))).mean()


def discriminator_loss(one: nn.Module, other: nn.Module, z: Tensor, x: Tensor) -> Tensor:
    return nn.functional.softplus(-other(x)).mean() + nn.functional.softplus(other(one(z).detach())).mean()


@pytest.mark.parametrize("toggled", [True, False])
def test_two_optimizers(tmp_path: Path, toggled: bool) -> None:
    """Toggling freezes the other's parameters for a while; the other's statistics of that pass count for neither."""
    import lightning

    class Adversarial(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = adversaries()
            self.automatic_optimization = False
            self.losses: list[float] = []

        def configure_optimizers(self) -> list[KFAC]:
            return [KFAC(self.one, **OPTIONS), KFAC(self.other, **OPTIONS)]

        def training_step(self, batch: list[Tensor], number: int) -> None:
            z = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(number))
            losses = (
                lambda: generator_loss(self.one, self.other, z),
                lambda: discriminator_loss(self.one, self.other, z, batch[0]),
            )
            for optimizer, loss_of in zip(self.optimizers(), losses, strict=True):
                with optimizer.toggle_model() if toggled else contextlib.nullcontext():
                    loss = loss_of()
                    optimizer.zero_grad()
                    self.manual_backward(loss)
                    optimizer.step()
                    self.losses.append(loss.item())

    module = Adversarial()
    trainer(tmp_path, enable_checkpointing=False).fit(module, batches(STEPS))

    one, other = adversaries()
    optimizers = KFAC(one, **OPTIONS), KFAC(other, **OPTIONS)
    losses = []
    for number, (x, _) in enumerate(batches(STEPS)):
        z = torch.randn(BATCH, 4, generator=torch.Generator().manual_seed(number))
        for turn, optimizer in enumerate(optimizers):
            loss = discriminator_loss(one, other, z, x) if turn else generator_loss(one, other, z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    require_same(module.losses, nn.ModuleList([module.one, module.other]), (losses, nn.ModuleList([one, other])))


def test_an_average_of_the_weights(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """It is kept in a copy of the module, which leaves no statistics, and takes the module's place for validation."""
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = without_schedule(module_of())
    options = {"enable_checkpointing": False, "callbacks": [EMAWeightAveraging(decay=0.9)], "val_check_interval": AT}
    trainer(tmp_path, **options).fit(module, batches(STEPS), batches(3))
    average: list[Tensor] = []
    model = net()
    optimizer = KFAC(model, **OPTIONS)
    losses = []
    for x, y in batches(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        now = [p.detach().clone() for p in model.parameters()]
        average = [0.9 * a + 0.1 * p for a, p in zip(average, now, strict=True)] if average else now
    assert module.losses == losses
    for p, truth in zip(module.net.parameters(), average, strict=True):
        torch.testing.assert_close(p.detach(), truth, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_finder(module_of: Callable[..., Any], tmp_path: Path) -> None:
    """It trains with an optimizer of its own, and gives the weights back: what follows is as if it had not run."""
    from lightning.pytorch.tuner import Tuner

    module = without_schedule(module_of())
    module.lr = OPTIONS["lr"]
    runner = trainer(tmp_path)
    found = Tuner(runner).lr_find(module, batches(STEPS), num_training=20, min_lr=1e-4, max_lr=1.0, update_attr=False)
    assert len(found.results["lr"]) >= 15
    module.losses.clear()
    runner.fit(module, batches(STEPS))
    require_same(module.losses, module.net, plain(STEPS, schedule=constant))
    alone = net()
    one = KFAC(alone)
    assert runs.hooks(module.net) == runs.hooks(alone) > 0
    one.close()


def finetuning(start: int) -> Any:
    """Trains the first layers from an epoch on, in a group of their own."""
    from lightning.pytorch.callbacks import BaseFinetuning

    class Finetuning(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[:3])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == start:
                self.unfreeze_and_add_param_group(pl_module.net[:3], optimizer, lr=0.1)

    return Finetuning()


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
@pytest.mark.parametrize("start", [1, 3])
def test_finetuning(module_of: Callable[..., Any], tmp_path: Path, start: int, method: type[KFAC]) -> None:
    """Layers that wake at an epoch; half a run is saved, before or after that, and gone on with from other weights.

    When it goes on, Lightning assigns the groups that there were, and leaves the layers frozen: who trains them has to say so.
    """
    first = without_schedule(module_of(method=method))
    one = trainer(tmp_path, max_epochs=2, callbacks=[finetuning(start)])
    one.fit(first, batches(10))

    second = without_schedule(module_of(seed=9, method=method))
    if start < 2:
        second.on_fit_start = lambda: second.net.requires_grad_(True)
    two = trainer(tmp_path, max_epochs=4, callbacks=[finetuning(start)])
    two.fit(second, batches(10), ckpt_path=one.checkpoint_callback.best_model_path, weights_only=True)

    model = net()
    model[:3].requires_grad_(False)
    optimizer = make(method, model)

    def wake() -> None:
        model[:3].requires_grad_(True)
        optimizer.add_param_group({"params": model[:3].parameters(), "lr": 0.1})

    truth = changing(model, optimizer, wake, list(batches(10)) * 4, at=10 * start)
    require_same(first.losses + second.losses, second.net, truth)


@pytest.mark.parametrize("event", ["wakes", "added"])
@pytest.mark.parametrize("package", ["lightning", "fabric"])
@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_layers_that_come_through_the_wrapper(
    module_of: Callable[..., Any], tmp_path: Path, method: type[KFAC], package: str, event: str
) -> None:
    """Methods of the optimizer run on the wrapper, which inherits from it: what they replace has to be the optimizer's."""
    import lightning

    def start(model: nn.Sequential) -> KFAC:
        model[0].requires_grad_(event != "wakes")
        return make(method, model, list((model if event == "wakes" else model[3:]).parameters()))

    def happen(model: nn.Sequential, optimizer: Any) -> None:
        if event == "wakes":
            model[0].requires_grad_(True)
        else:
            optimizer.add_param_group({"params": list(model[:3].parameters())})

    model = net()
    optimizer = start(model)
    truth = changing(model, optimizer, lambda: happen(model, optimizer), batches(STEPS))
    assert ({"0"} if method is KFACAdam else {"0", "1"}) <= optimizer.factors().keys()  # the norm moves by plain Adam

    if package == "lightning":
        module = module_of("manual")
        train = module.training_step

        def step(batch: list[Tensor], batch_idx: int) -> None:
            if batch_idx == AT:
                happen(module.net, module.optimizers())
            train(batch, batch_idx)

        module.training_step = step
        module.configure_optimizers = lambda: start(module.net)
        module.lr_schedulers = lambda: torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(module.parameters()), constant)
        trainer(tmp_path, enable_checkpointing=False).fit(module, batches(STEPS))
        require_same(module.losses, module.net, truth)
    else:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        inner = net()
        outer, wrapper = fabric.setup(inner, start(inner))
        losses = []
        for number, (x, y) in enumerate(batches(STEPS)):
            if number == AT:
                happen(inner, wrapper)
            wrapper.zero_grad()
            loss = nn.functional.cross_entropy(outer(x), y)
            fabric.backward(loss)
            losses.append(loss.item())
            wrapper.step()
        require_same(losses, inner, truth)
