"""Hugging Face transformers.Trainer: a GPT-2, a Llama and an MLP, as in the plain PyTorch loop, bit for bit."""

from __future__ import annotations

import doctest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.integrations import hf, kfac_factory

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error:no statistics came:UserWarning")]

STEPS, BATCH, LENGTH, WORDS = 50, 8, 12, 13
OPTIONS: dict[str, Any] = {"lr": 0.3, "damping": 0.03, "kl_clip": 1e-2, "weight_decay": 1e-2}
TOKENS: dict[str, Any] = {**OPTIONS, "loss_terms": "tokens", "skip": "*wpe"}
NO_DECAY = (".bias", "ln_1.weight", "ln_2.weight", "ln_f.weight", "norm.weight")

Loop = tuple[list[float], nn.Module, KFAC]


class Classifier(nn.Module):
    """Takes no **kwargs: the trainer itself divides the loss by the number of batches that it accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Tanh(), nn.Linear(24, 4))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def classifier(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return Classifier()


def gpt2(seed: int = 1) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0))


def llama(seed: int = 1) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0))
    model.lm_head.weight.data.mul_(10)  # far enough from uniform for G to be of the labels too
    return model


def vectors(count: int) -> list[dict[str, Tensor]]:
    """The label is the largest of four projections."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2 * STEPS * BATCH, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    return [{"x": x[i], "labels": y[i]} for i in range(count * BATCH)]


def sentences(count: int, padded: bool = False) -> list[dict[str, Tensor]]:
    """Every word follows from the one before, but for the first; with padding each is cut off somewhere."""
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(WORDS, (2 * STEPS * BATCH, 1), generator=generator)
    for _ in range(LENGTH - 1):
        words = torch.cat([words, (2 * words[:, -1:] + 3) % WORDS], 1)
    labels = words.clone()
    if padded:
        ends = torch.randint(3, LENGTH + 1, (len(words), 1), generator=generator)
        labels[torch.arange(LENGTH) >= ends] = -100
    return [{"input_ids": words[i], "labels": labels[i]} for i in range(count * BATCH)]


def batches(data: list[dict[str, Tensor]], size: int = BATCH) -> list[dict[str, Tensor]]:
    return [
        {key: torch.stack([example[key] for example in data[i : i + size]]) for key in data[0]}
        for i in range(0, len(data), size)
    ]


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

    def make(model: nn.Module, data: list[Any], optimizer: KFAC | None = None, options: Any = None, **arguments: Any) -> Any:
        plain: dict[str, Any] = {"max_steps": STEPS, "max_grad_norm": 0.0, "lr_scheduler_type": "linear", "warmup_steps": 5}
        quiet: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no"}
        order: dict[str, Any] = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": BATCH}
        args = TrainingArguments(str(tmp_path), **{**plain, **quiet, **order, **arguments})
        made: dict[str, Any] = {"optimizers": (optimizer, None)}
        if optimizer is None:
            made = {"optimizer_cls_and_kwargs": (kfac_factory, options)}
        trainer = Noting(model, args, train_dataset=data, eval_dataset=data[:BATCH], **made)
        trainer.losses = []
        return trainer

    return make


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weights with decay, biases and norms without."""
    named = [(n, p) for n, p in model.named_parameters()]
    spared = {n for n, _ in named if n.endswith(NO_DECAY) or n == "net.1.weight"}
    return [
        {"params": [p for n, p in named if n not in spared]},
        {"params": [p for n, p in named if n in spared], "weight_decay": 0.0},
    ]


def labelled(model: nn.Module, parts: list[dict[str, Tensor]]) -> Tensor:
    """What the trainer divides the loss of tokens by. Of a GPT-2 it also counts the first word, which nothing predicts."""
    first = 0 if type(model).__name__ == "GPT2LMHeadModel" else 1
    return torch.tensor(sum(int((part["labels"][:, first:] != -100).sum()) for part in parts))


def warm_and_linear(step: int) -> float:
    return step / 5 if step < 5 else (STEPS - step) / (STEPS - 5)


def plain(
    model: nn.Module, steps: list[list[dict[str, Tensor]]], options: dict[str, Any], clip: float = 0.0, mean: bool = True
) -> Loop:
    """(losses of the batches, model, optimizer) of the loop without a trainer.

    Args:
        model: returns the loss.
        steps: the batches of each step.
        options: of KFAC.
        clip: of the gradient's norm, if not 0.
        mean: a step's loss is the mean of its batches' losses; else the mean over all of its tokens, as the model knows it.
    """
    optimizer = KFAC(model, groups(model), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_and_linear)
    losses = []
    for parts in steps:
        for part in parts:
            if mean:
                loss = model(**part)["loss"]
                losses.append(loss.item())
                (loss / len(parts)).backward()
            else:
                loss = model(**part, num_items_in_batch=labelled(model, parts))["loss"]
                losses.append(loss.item())
                loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses, model, optimizer


def require_same(losses: list[float], model: nn.Module, truth: Loop) -> None:
    expected, twin, _ = truth
    worst = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    print(f"{len(losses)} batches, loss {losses[0]:.3f} to {losses[-1]:.3f}: losses differ by {worst}, parameters by {apart}")
    assert worst == 0
    assert apart == 0


def singly(data: list[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    return [[batch] for batch in batches(data)]


def pairs(data: list[dict[str, Tensor]]) -> list[list[dict[str, Tensor]]]:
    parts = batches(data)
    return [parts[i : i + 2] for i in range(0, len(parts), 2)]


@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize("more", [{}, {"inverse_every": 10, "statistics_every": 2}, {"tail": "adamw", "lr": 0.01}], ids=str)
def test_as_the_plain_loop(trainer_of: Callable[..., Any], make: Callable[..., Any], more: dict[str, Any]) -> None:
    """Tied embeddings, Hugging Face Conv1D, a warm-up and decay of the learning rate, evaluation in between."""
    data, options = sentences(STEPS), {**TOKENS, **more}
    trainer = trainer_of(make(), data, options=options, eval_strategy="steps", eval_steps=20)
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(make(), singly(data), options, mean=False))
    assert trainer.losses[-1] < 0.6 * trainer.losses[0]


def test_the_groups_are_the_trainer_s(trainer_of: Callable[..., Any], tmp_path: Path) -> None:
    """Whatever makes the optimizer: the same parameters decay."""
    from transformers import Trainer, TrainingArguments

    model = gpt2()
    model.transformer.h[0].requires_grad_(False)
    ours = trainer_of(model, sentences(1), options={**TOKENS, "weight_decay": 0.25}).create_optimizer()
    args = TrainingArguments(str(tmp_path), use_cpu=True, weight_decay=0.25, optim="adamw_torch")
    theirs = Trainer(model, args).create_optimizer()
    names = {id(p): name for name, p in model.named_parameters()}
    read = [[([names[id(p)] for p in g["params"]], g["weight_decay"]) for g in x.param_groups] for x in (ours, theirs)]
    assert read[0] == read[1]
    assert [decay for _, decay in read[0]] == [0.25, 0.0]
    assert "transformer.wte.weight" in read[0][0][0]
    assert all(name.endswith(NO_DECAY) for name in read[0][1][0])


def test_a_model_of_ones_own_with_accumulation_and_clipping(trainer_of: Callable[..., Any]) -> None:
    """The trainer divides the loss; a clip of 0.1 changes the run."""
    data = vectors(2 * STEPS)
    trainer = trainer_of(classifier(), data, options=OPTIONS, gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(classifier(), pairs(data), OPTIONS, clip=0.1))
    assert trainer.losses != plain(classifier(), pairs(data), OPTIONS)[0]
    assert trainer.optimizer.optimizer.engine.steps == STEPS
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])


def test_an_optimizer_of_ones_own(trainer_of: Callable[..., Any]) -> None:
    """optimizers=(optimizer, None): the trainer makes the schedule alone."""
    data, model = vectors(STEPS), classifier()
    trainer = trainer_of(model, data, optimizer=KFAC(model, groups(model), **OPTIONS))
    trainer.train()
    require_same(trainer.losses, trainer.model, plain(classifier(), singly(data), OPTIONS))


@pytest.mark.parametrize("more", [{}, {"inverse_every": 10}, {"curvature": "ekfac"}], ids=str)
def test_checkpoint_and_resume(trainer_of: Callable[..., Any], tmp_path: Path, more: dict[str, Any]) -> None:
    """Half a run, saved; the other half from other weights, that the checkpoint overwrites."""
    data, options = sentences(STEPS), {**TOKENS, **more}
    first = trainer_of(gpt2(), data, options=options, save_strategy="steps", save_steps=STEPS // 2)
    first.train()
    second = trainer_of(gpt2(seed=9), data, options=options)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    truth = plain(gpt2(), singly(data), options, mean=False)
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


def test_a_scaler_and_a_step_that_it_skips(trainer_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer calls zero_grad of the model, which K-FAC does not see: the next step's statistics are dropped, no more."""
    options: dict[str, Any] = dict(OPTIONS)
    trainer = trainer_of(classifier(), vectors(STEPS), options=options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # accelerate makes it for a GPU alone
    trainer.accelerator.scaler = options["loss_scale"] = scaler
    compute_loss = trainer.compute_loss
    scales = iter([*[1.0] * 20, torch.inf, *[1.0] * STEPS])
    monkeypatch.setattr(trainer, "compute_loss", lambda *args, **kwargs: compute_loss(*args, **kwargs) * next(scales))
    trainer.train()
    assert scaler.get_scale() == 512
    optimizer = trainer.optimizer.optimizer
    assert optimizer.engine.steps == STEPS - 1
    assert [layer["dropped_statistics"] for layer in optimizer.diagnostics()["layers"].values()] == [1, 1, 1]
    assert sum(trainer.losses[-5:]) < 0.5 * sum(trainer.losses[:5])


@pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")
def test_the_example_of_the_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert doctest.testmod(hf) == (0, 9)
