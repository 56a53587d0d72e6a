"""Loss terms of real Hugging Face models, from their labels, without any setting: against brute force in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integrations.hf_runs import LENGTH, WORDS, gpt2, llama
from support.helpers import relative_error
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner

pytestmark = pytest.mark.slow

TOLERANCE = 1e-10


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(1)
    sizes = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=0))


def bert(kind: str) -> Any:
    import transformers

    torch.manual_seed(1)
    sizes = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "num_labels": 3}
    return getattr(transformers, f"BertFor{kind}")(transformers.BertConfig(**sizes, **options, max_position_embeddings=LENGTH))


def token_labels(tokens: Tensor) -> Tensor:
    return torch.where(torch.rand(tokens.shape) < 0.6, -100, tokens % 3)


# Model, the labels for its tokens, and how many of them its loss is a mean over.
MODELS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor], Callable[[Tensor], int]]] = {
    "GPT-2": (gpt2, token_labels, lambda y: int((y[:, 1:] != -100).sum())),
    "Llama": (llama, token_labels, lambda y: int((y[:, 1:] != -100).sum())),
    "T5": (t5, token_labels, lambda y: int((y != -100).sum())),
    "masked BERT": (lambda: bert("MaskedLM"), token_labels, lambda y: int((y != -100).sum())),
    "BERT for tokens": (lambda: bert("TokenClassification"), token_labels, lambda y: int((y != -100).sum())),
    "BERT for sentences": (lambda: bert("SequenceClassification"), lambda x: x[:, 0] % 3, len),
}


@pytest.mark.parametrize("name", MODELS)
def test_factors_are_those_of_the_labels_that_count(name: str) -> None:
    make, labels_of, count = MODELS[name]
    model = make().double().train()
    torch.manual_seed(2)
    tokens = torch.randint(1, WORDS, (6, LENGTH))
    labels = labels_of(tokens)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    handles = [
        m.register_forward_hook(lambda m, args, out, n=n: seen.update({n: (args[0].detach(), out)})) for n, m in linears.items()
    ]
    loss = model(input_ids=tokens, labels=labels).loss
    for handle in handles:
        handle.remove()
    gradients = dict(zip(seen, torch.autograd.grad(loss, [out for _, out in seen.values()]), strict=True))
    with KFACPreconditioner(model) as ours:
        model(input_ids=tokens, labels=labels).loss.backward()
        ours.precondition_()
        factors = ours.factors()
    terms, checked = count(labels), 0
    for n, (x, _) in seen.items():
        if n not in factors or ("lm_head" in n and model.config.tie_word_embeddings) or n == "cls.predictions.decoder":
            continue  # a tied head is joined with the embedding
        g, rows = gradients[n].flatten(0, -2), x.flatten(0, -2)
        if linears[n].bias is not None:
            rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        kept = (g != 0).any(1) if labels.dim() > 1 else torch.ones(len(g), dtype=torch.bool)
        assert relative_error(factors[n][0], rows[kept].T @ rows[kept] / int(kept.sum())) <= TOLERANCE, n
        assert relative_error(factors[n][1], terms * g.T @ g) <= TOLERANCE, n
        checked += 1
    assert checked >= 3
