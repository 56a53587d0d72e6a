"""Hugging Face transformers.Trainer: a GPT-2, a Llama and an MLP, as in the plain PyTorch loop, bit for bit."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.hf_runs import (
    BATCH,
    LENGTH,
    NO_DECAY,
    OPTIONS,
    SEQUENCES,
    STEPS,
    TOKENS,
    WORDS,
    batches,
    classifier,
    gpt2,
    groups,
    llama,
    options_of,
    pairs,
    plain,
    require_same,
    sentences,
    singly,
    vectors,
)
from integrations.small_net import label
from torch import nn

from kfac_triton import KFAC, KFACAdam
from kfac_triton.integrations import hf

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:no statistics came:UserWarning")]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    ("method", "more"),
    [
        (KFAC, {}),
        (KFAC, {"inverse_every": 10, "statistics_every": 2}),
        (KFAC, {"tail": "adamw", "lr": 0.01}),
        (KFACAdam, {}),
    ],
    ids=label,
)
def test_as_the_plain_loop(
    trainer_of: Callable[..., Any], make: Callable[..., Any], method: type[KFAC], more: dict[str, Any]
) -> None:
    """Tied embeddings, Hugging Face Conv1D, a warm-up and decay of the learning rate, evaluation in between."""
    data, options = sentences(STEPS), options_of(method, **SEQUENCES, **more)
    trainer = trainer_of(make(), data, options=options, method=method, eval_strategy="steps", eval_steps=20)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is method
    require_same(trainer.losses, trainer.model, plain(make(), singly(data), options, mean=False, method=method))
    assert trainer.losses[-1] < 0.6 * trainer.losses[0]


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_the_groups_are_the_trainer_s(trainer_of: Callable[..., Any], tmp_path: Path, method: type[KFAC]) -> None:
    """Whatever makes the optimizer: the same parameters decay."""
    from transformers import Trainer, TrainingArguments

    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    options = options_of(method, **SEQUENCES, weight_decay=0.25)
    ours = trainer_of(model, sentences(1), options=options, method=method).create_optimizer()
    args = TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.25, optim="adamw_torch")
    theirs = Trainer(model, args).create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    read = [[([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in x.param_groups] for x in (ours, theirs)]
    assert read[0] == read[1]
    assert [decay for _, decay in read[0]] == [0.25, 0.0]
    assert "transformer.wte.weight" in read[0][0][0]
    assert all(name.endswith(NO_DECAY) for name in read[0][1][0])


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_a_model_of_ones_own_with_accumulation_and_clipping(trainer_of: Callable[..., Any], method: type[KFAC]) -> None:
    """The trainer divides the loss; a clip of 0.1 changes the run."""
    data, options = vectors(2 * STEPS), options_of(method)
    trainer = trainer_of(classifier(), data, options=options, method=method, gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(classifier(), pairs(data), options, clip=0.1, method=method))
    assert trainer.losses != plain(classifier(), pairs(data), options, method=method)[0]
    assert trainer.optimizer.optimizer.engine.progress.steps == STEPS
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])


def test_an_optimizer_of_ones_own(trainer_of: Callable[..., Any]) -> None:
    """optimizers=(optimizer, None): the trainer makes the schedule alone."""
    data, model = vectors(STEPS), classifier()
    trainer = trainer_of(model, data, optimizer=KFAC(model, groups(model), **OPTIONS))
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(classifier(), singly(data), OPTIONS))


@pytest.mark.parametrize(
    ("method", "more"), [(KFAC, {}), (KFAC, {"inverse_every": 10}), (KFAC, {"curvature": "ekfac"}), (KFACAdam, {})], ids=label
)
def test_checkpoint_and_resume(
    trainer_of: Callable[..., Any], tmp_path: Path, method: type[KFAC], more: dict[str, Any]
) -> None:
    """Half a run, saved; the other half from other weights, that the checkpoint overwrites."""
    data, options = sentences(STEPS), options_of(method, **SEQUENCES, **more)
    first = trainer_of(gpt2(), data, options=options, method=method, save_strategy="steps", save_steps=STEPS // 2)
    first.train()
    second = trainer_of(gpt2(seed=9), data, options=options, method=method)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    truth = plain(gpt2(), singly(data), options, mean=False, method=method)
    require_same(first.losses, first.model, truth)
    require_same(first.losses[: STEPS // 2] + second.losses, second.model, truth)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_accumulated_tokens_as_the_plain_loop(trainer_of: Callable[..., Any], make: Callable[..., Any]) -> None:
    """Sentences of different lengths: the model divides by the tokens of the whole step."""
    data = sentences(2 * STEPS, padded=True)
    trainer = trainer_of(make(), data, options=TOKENS, gradient_accumulation_steps=2)
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(make(), pairs(data), TOKENS, mean=False))
    assert sum(trainer.losses[-4:]) < 0.6 * sum(trainer.losses[:4])


def test_accumulated_tokens_as_one_batch(trainer_of: Callable[..., Any]) -> None:
    """Factors of two batches in a step are those of one of twice the size: nothing depends on how the loss was divided."""
    data = sentences(2, padded=True)
    trainer = trainer_of(llama(), data, options=TOKENS, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    _, _, whole = plain(llama(), [batches(data, 2 * BATCH)], TOKENS)
    factors = trainer.optimizer.optimizer.factors()
    assert factors.keys() == whole.factors().keys()
    assert len(factors) >= 2 * 7 + 2
    worst = 0.0
    for name, pair in whole.factors().items():
        for value, truth in zip(factors[name], pair, strict=True):
            worst = max(worst, float((value - truth).abs().max() / truth.abs().max()))
    print(f"factors differ by {worst:.1e} of their largest number")
    assert worst < 1e-5


def test_head_by_hand(trainer_of: Callable[..., Any]) -> None:
    """G in float64: E[g gᵀ] over tokens with a label, times all positions over those, as K-FAC counts positions by shape."""
    data, model = sentences(2, padded=True), llama()
    total, terms = torch.zeros(WORDS, WORDS, dtype=torch.float64), 0
    for batch in batches(data):
        logits = model(batch["input_ids"]).logits[:, :-1].double()
        labels = batch["labels"][:, 1:]
        rows = logits.softmax(-1)[labels != -100] - nn.functional.one_hot(labels[labels != -100], WORDS)
        total += (rows.mT @ rows).detach()
        terms += len(rows)
    trainer = trainer_of(model, data, options=TOKENS, gradient_accumulation_steps=2, max_steps=1)
    trainer.train()
    _, G = trainer.optimizer.optimizer.factors()["lm_head"]
    positions = len(data) * LENGTH
    print(f"{terms} of {positions} positions have a label")
    assert terms < 0.75 * positions
    torch.testing.assert_close(G.double(), total / terms * positions / terms, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [KFAC, KFACAdam])
def test_a_scaler_and_a_step_that_it_skips(
    trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: type[KFAC]
) -> None:
    """The trainer calls zero_grad of the model, which K-FAC does not see: the next step's statistics are dropped, no more."""
    options = options_of(method)
    trainer = trainer_of(classifier(), vectors(STEPS), options=options, method=method)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # accelerate makes it for a GPU alone
    trainer.accelerator.scaler = options["loss_scale"] = scaler
    compute_loss = trainer.compute_loss
    scales = iter([*[1.0] * 20, torch.inf, *[1.0] * STEPS])
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: compute_loss(*args, **kwargs) * next(scales))
    trainer.train()
    assert scaler.get_scale() == 512
    optimizer = trainer.optimizer.optimizer
    assert optimizer.engine.progress.steps == STEPS - 1
    layers = 2 if method is KFACAdam else 3  # which moves the norm by plain Adam
    assert [layer["dropped_statistics"] for layer in optimizer.diagnostics()["layers"].values()] == [1] * layers
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_example_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(hf) == (0, 14)
