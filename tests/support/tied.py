"""A small language model with tied weights, and its two uses by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.layers.tied import TiedLayer

TOKENS, DIM, TOLERANCE = 11, 5, 1e-10


# What of the hidden states is decoded: in all but the first case the two uses have different numbers of rows.
PICKS: dict[str, Callable[[Tensor], Tensor]] = {
    "all tokens": lambda hidden: hidden,
    "last token": lambda hidden: hidden[:, -1],
    "mean": lambda hidden: hidden.mean(1),
    "masked": lambda hidden: hidden.flatten(0, 1)[::3],
}


class Model(nn.Module):
    """Tokens -> embedding -> tanh of a Linear -> decoder."""

    def __init__(self, bias: bool = True, decoder_first: bool = False, pick: str = "all tokens") -> None:
        super().__init__()
        modules = {"embedding": nn.Embedding(TOKENS, DIM), "decoder": nn.Linear(DIM, TOKENS, bias)}
        for name in sorted(modules, reverse=not decoder_first):
            self.add_module(name, modules[name])
        self.middle = nn.Linear(DIM, DIM)
        self.embedding.weight = self.decoder.weight
        self.pick = pick
        self.double()

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.embedding(tokens)))
        return self.decoder(PICKS[self.pick](hidden))


class Recorder:
    """Inputs and outputs of both uses, from hooks of its own."""

    def __init__(self, model: Model) -> None:
        self.calls: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._held: list[Tensor] = []
        model.embedding.register_forward_hook(lambda m, args, out: self._held.extend((args[0], out)))
        model.decoder.register_forward_hook(self._finish)

    def _finish(self, module: nn.Module, args: Any, output: Tensor) -> None:
        tokens, embedded = self._held
        self._held.clear()
        for x in (embedded, output):
            x.retain_grad()
        self.calls.append((tokens, embedded, args[0].detach(), output))

    def kronecker(self, bias: bool = True, reduce: bool = False, terms_are_tokens: bool = False) -> dict[str, Tensor]:
        """Sums of both uses over all calls, scaled to expectations: r and C of each."""
        scale = sum(output[..., 0].numel() if terms_are_tokens else len(output) for *_, output in self.calls)
        total: dict[str, Any] = dict.fromkeys(("r_d", "C_d", "r_e", "C_e"), 0)
        rows_d = rows_e = 0
        for tokens, embedded, hidden, output in self.calls:
            assert embedded.grad is not None
            assert output.grad is not None
            h, g, e, one_hot = hidden, output.grad, embedded.grad, F.one_hot(tokens, TOKENS).double()
            if reduce:
                h, g, e, one_hot = h.mean(1), g.sum(1), e.sum(1), one_hot.mean(1)
            h, g, e, one_hot = (x.reshape(-1, x.shape[-1]) for x in (h, g, e, one_hot))
            if bias:
                h, e = (torch.cat([x, x.new_full((len(x), 1), one)], 1) for x, one in ((h, 1.0), (e, 0.0)))
            rows_d, rows_e = rows_d + len(h), rows_e + len(e)
            total["C_d"] += h.T @ h
            total["r_d"] += g.square().sum(0)
            total["C_e"] += e.T @ e
            total["r_e"] += one_hot.square().sum(0)
        return {
            "C_d": total["C_d"] / rows_d,
            "r_d": total["r_d"] * scale,
            "C_e": total["C_e"] * scale,
            "r_e": total["r_e"] / rows_e,
        }


def best(k: dict[str, Tensor]) -> float:
    """u, by expectations."""
    return math.sqrt(float(k["r_e"].sum() * k["C_d"].trace() / (k["r_d"].sum() * k["C_e"].trace())))


def product(a: Tensor, g: Tensor) -> Tensor:
    return torch.kron(torch.diag(g), a)


def tokens_of(examples: int = 6, length: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randint(TOKENS - 2, (examples, length)), torch.randint(TOKENS, (examples, length))


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over examples."""
    if logits.dim() == 2:
        labels = targets[:, 0] if len(logits) == len(targets) else targets.flatten()[::3]
        return F.cross_entropy(logits, labels)
    return F.cross_entropy(logits.movedim(-1, 1), targets, reduction="sum") / len(logits)


def factors_of(model: Model, *batches: tuple[Tensor, Tensor], scale: float = 1.0, **settings: Any) -> tuple[Tensor, Tensor]:
    """A and the diagonal of G after one step on some passes."""
    with KFACPreconditioner(model, damping=1e-2, loss_scale=scale, **settings) as ours:
        model.zero_grad()
        for tokens, targets in batches:
            (loss_of(model(tokens), targets) * scale * len(tokens) / sum(len(t) for t, _ in batches)).backward()
        ours.precondition_()
        a, g = ours.factors()[next(x for x in ours.engine.layers if isinstance(x, TiedLayer)).name]
        assert g.dim() == 1
        return a, g
