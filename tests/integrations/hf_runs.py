"""Models, data and the plain PyTorch loop for transformers.Trainer to be compared with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam

STEPS, BATCH, LENGTH, WORDS = 50, 8, 12, 13
OPTIONS: dict[str, Any] = {"lr": 0.3, "damping": 0.03, "kl_clip": 1e-2, "weight_decay": 1e-2}
SEQUENCES: dict[str, Any] = {"loss_terms": "tokens", "skip": "*wpe"}
TOKENS: dict[str, Any] = {**OPTIONS, **SEQUENCES}
# With old eigenvectors in every other step, so that a run that is resumed after an odd one needs those of the checkpoint.
ADAM: dict[str, Any] = {"lr": 0.016, "weight_decay": 1e-2, "refresh_every": 2, "refresh_warmup": 1}
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


def options_of(method: type[KFAC], **more: Any) -> dict[str, Any]:
    return {**(ADAM if method is KFACAdam else OPTIONS), **more}


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
    model: nn.Module,
    steps: list[list[dict[str, Tensor]]],
    options: dict[str, Any],
    clip: float = 0.0,
    mean: bool = True,
    bfloat16: bool = False,
    method: type[KFAC] = KFAC,
) -> Loop:
    """(losses of the batches, model, optimizer) of the loop without a trainer.

    Args:
        model: returns the loss.
        steps: the batches of each step.
        options: of the optimizer.
        clip: of the gradient's norm, if not 0.
        mean: a step's loss is the mean of its batches' losses; else the mean over all of its tokens, as the model knows it.
        bfloat16: runs the forward pass under autocast.
        method: the class of the optimizer.
    """
    optimizer = method(model, groups(model), **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_and_linear)
    losses = []
    for parts in steps:
        for part in parts:
            counted = {} if mean else {"num_items_in_batch": labelled(model, parts)}
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(**part, **counted)["loss"]
            losses.append(loss.item())
            (loss / len(parts) if mean else loss).backward()
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
