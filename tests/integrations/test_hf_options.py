"""Hugging Face transformers.Trainer: what its arguments change, as in the plain PyTorch loop, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.hf_runs import (
    OPTIONS,
    STEPS,
    TOKENS,
    classifier,
    gpt2,
    groups,
    labelled,
    llama,
    pairs,
    plain,
    require_same,
    sentences,
    singly,
    vectors,
    warm_and_linear,
)
from support import runs
from torch import Tensor, nn

from kfac_triton import KFAC

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:no statistics came:UserWarning")]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_label_smoothing(trainer_of: Callable[..., Any], make: Callable[..., Any]) -> None:
    """The trainer makes the loss of the logits, over the tokens of the whole step; rounded otherwise than PyTorch's own."""
    data = sentences(2 * STEPS, padded=True)
    trainer = trainer_of(make(), data, options=TOKENS, gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    trainer.train()
    model = make()
    optimizer = KFAC(model, groups(model), **TOKENS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_and_linear)
    losses = []
    for parts in pairs(data):
        for part in parts:
            logits, labels = model(part["input_ids"]).logits[:, :-1].flatten(0, 1), part["labels"][:, 1:].flatten()
            total = nn.functional.cross_entropy(logits, labels, label_smoothing=0.1, reduction="sum")
            (total / labelled(model, parts)).backward()
            losses.append(float(total.detach() / labelled(model, parts)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    worst = max(abs(a - b) for a, b in zip(trainer.losses, losses, strict=True))
    print(f"loss {losses[0]:.3f} to {losses[-1]:.3f}: losses differ by {worst:.1e}")
    assert worst < 1e-5
    assert sum(losses[-4:]) < 0.6 * sum(losses[:4])


def test_bfloat16(trainer_of: Callable[..., Any]) -> None:
    """The forward pass runs under autocast; factors have 32 bits."""
    data = sentences(STEPS)
    trainer = trainer_of(llama(), data, options=TOKENS, bf16=True)
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(llama(), singly(data), TOKENS, mean=False, bfloat16=True))
    assert trainer.losses != plain(llama(), singly(data), TOKENS, mean=False)[0]
    assert {x.dtype for pair in trainer.optimizer.optimizer.factors().values() for x in pair} == {torch.float32}


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    ],
    ids=["checkpointing", "reentrant checkpointing", "compiled"],
)
def test_how_the_model_runs(trainer_of: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Every pass is counted once; the trainer compiles after it has made the optimizer."""
    torch.compiler.reset()
    data = sentences(STEPS)
    trainer = trainer_of(llama(), data, options=TOKENS, **arguments)
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(llama(), singly(data), TOKENS, mean=False))


def test_train_twice(trainer_of: Callable[..., Any]) -> None:
    """The trainer keeps the optimizer and begins the data and the schedule again."""
    data, model = vectors(STEPS // 2), classifier()
    trainer = trainer_of(model, data, options=OPTIONS, max_steps=STEPS // 2, lr_scheduler_type="constant")
    trainer.train()
    hooks = runs.hooks(model)
    trainer.train()
    assert runs.hooks(model) == hooks > 0

    twin = classifier()
    optimizer = KFAC(twin, groups(twin), **OPTIONS)
    losses = []
    for part in [batch[0] for batch in singly(data)] * 2:
        loss = twin(**part)["loss"]
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    require_same(trainer.losses, trainer.model, (losses, twin, optimizer))


def test_resume_with_an_optimizer_of_ones_own(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    data, half = vectors(STEPS), STEPS // 2
    first, second = classifier(), classifier(seed=9)
    one = trainer_of(first, data, KFAC(first, groups(first), **OPTIONS), save_strategy="steps", save_steps=half)
    one.train()
    two = trainer_of(second, data, KFAC(second, groups(second), **OPTIONS))
    two.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{half}"))
    require_same(one.losses[:half] + two.losses, second, plain(classifier(), singly(data), OPTIONS))


class WithoutBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, 4, bias=False)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(x), labels)}


def test_a_group_without_parameters(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    """Nothing that is spared weight decay: the second group is empty, and saved and loaded as such."""
    torch.manual_seed(1)
    data, half, model = vectors(STEPS), STEPS // 2, WithoutBias()
    twin = WithoutBias()
    twin.load_state_dict(model.state_dict())
    one = trainer_of(model, data, options=OPTIONS, save_strategy="steps", save_steps=half)
    one.train()
    assert [len(group["params"]) for group in one.optimizer.param_groups] == [1, 0]
    other = WithoutBias()
    two = trainer_of(other, data, options=OPTIONS)
    two.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{half}"))
    require_same(one.losses[:half] + two.losses, other, plain(twin, singly(data), OPTIONS))
