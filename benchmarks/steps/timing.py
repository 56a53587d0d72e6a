"""Training steps with AdamW, with K-FAC and with kfac-pytorch: same weights, same batches, cycle by cycle in turn."""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton import KFAC

CYCLE = 10  # steps, the most that any contestant lets pass between inverses
WARM_UP_CYCLES = 1
MOST_CYCLES, LEAST_CYCLES = 9, 2
BASELINE = "AdamW"
LEARNING_RATE, DAMPING, KL_CLIP = 1e-4, 0.1, 1e-3  # stable for every contestant; the timings say nothing about tuning

Row = dict[str, Any]
Step = Callable[[], Tensor]


@dataclass(frozen=True)
class Task:
    """A model, a batch, and the loss, a mean over its terms."""

    name: str
    description: str
    model: nn.Module
    batch: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]
    loss_terms: str = "examples"


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) to the same."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class GPT(nn.Module):
    """GPT-2 with its embedding as head, which K-FAC leaves to the tail."""

    def __init__(self, vocabulary: int, tokens: int, width: int, heads: int, blocks: int) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        for embedding in (self.embedding, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token numbers (batch, tokens) to logits of the next token."""
        x = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.embedding.weight)


def _next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.device.type == "cuda"):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def gpt2(device: torch.device, quick: bool = False) -> Task:
    """GPT-2 small on 16 sequences of 1024 tokens; quick: a toy."""
    vocabulary, tokens, width, heads, blocks, batch = (64, 16, 32, 2, 2, 4) if quick else (50257, 1024, 768, 12, 12, 16)
    model = GPT(vocabulary, tokens, width, heads, blocks).to(device)
    numbers = torch.randint(vocabulary, (batch, tokens + 1), device=device)
    description = f"GPT {blocks} x {width}, {batch * tokens} tokens, bfloat16 autocast on a GPU"
    return Task("gpt", description, model, numbers, _next_token_loss, "tokens")


def _reconstruction_loss(model: nn.Module, images: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(images), images, reduction="sum") / len(images)


def autoencoder(device: torch.device, quick: bool = False) -> Task:
    """The deep autoencoder; quick: a toy."""
    sizes = (24, 16, 8, 16, 24) if quick else (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.Tanh()]
    images = torch.rand(64 if quick else 1000, sizes[0], device=device)
    description = f"autoencoder {'-'.join(map(str, sizes))}, batch {len(images)}, float32"
    return Task("autoencoder", description, nn.Sequential(*modules[:-1]).to(device), images, _reconstruction_loss)


def _training(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, precondition: Callable[[], object]) -> Step:
    def step() -> Tensor:
        optimizer.zero_grad()
        loss = task.loss(model, task.batch)
        loss.backward()
        precondition()
        optimizer.step()
        return loss.detach()

    return step


def _adamw(task: Task) -> Step:
    model = copy.deepcopy(task.model)
    return _training(task, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), lambda: None)


def _kfac(every: int) -> Callable[[Task], Step]:
    def make(task: Task) -> Step:
        model = copy.deepcopy(task.model)
        optimizer = KFAC(
            model,
            lr=LEARNING_RATE,
            tail="adamw",
            damping=DAMPING,
            kl_clip=KL_CLIP,
            statistics_every=every,
            inverse_every=every,
            loss_terms=task.loss_terms,
            skip="positions",  # whose module never runs
        )
        return _training(task, model, optimizer, lambda: None)

    return make


def _peer(method: str) -> Callable[[Task], Step]:
    def make(task: Task) -> Step:
        from kfac.preconditioner import KFACPreconditioner

        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        model = copy.deepcopy(task.model)
        preconditioner = KFACPreconditioner(
            model,
            factor_update_steps=CYCLE,
            inv_update_steps=CYCLE,
            damping=DAMPING,
            kl_clip=KL_CLIP,
            lr=LEARNING_RATE,
            compute_method=method,
            loglevel=logging.DEBUG,
        )
        return _training(task, model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE), preconditioner.step)

    return make


CONTESTANTS: dict[str, Callable[[Task], Step]] = {
    BASELINE: _adamw,
    "K-FAC, all every step": _kfac(1),
    f"K-FAC, all every {CYCLE}": _kfac(CYCLE),
    f"kfac-pytorch eigen, all every {CYCLE}": _peer("eigen"),
    f"kfac-pytorch inverse, all every {CYCLE}": _peer("inverse"),
}


def race(task: Task, seconds: float) -> list[Row]:
    """One row a contestant: seconds of a step, the median over cycles, or why there are none.

    Args:
        task: what all of them train.
        seconds: that timing should take, all contestants together; two cycles are done in any case.
    """
    rows: list[Row] = []
    steps: dict[int, Step] = {}
    losses: dict[int, list[Tensor]] = {}
    times: dict[int, list[float]] = {}
    for i, (name, make) in enumerate(CONTESTANTS.items()):
        rows.append({"task": task.name, "contestant": name})
        try:
            steps[i] = make(task)
            losses[i] = _run_cycles(steps[i], task.batch.device, WARM_UP_CYCLES)[1]
            times[i] = []
        except Exception as error:  # not installed, out of memory, or a layer it does not know: the others race on
            steps.pop(i, None)
            rows[i]["not_timed"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    started = time.perf_counter()
    for cycle in range(MOST_CYCLES):
        if cycle >= LEAST_CYCLES and time.perf_counter() - started > seconds:
            break
        names = list(steps)
        for i in names[cycle % max(1, len(names)) :] + names[: cycle % max(1, len(names))]:
            elapsed, found = _run_cycles(steps[i], task.batch.device, 1)
            times[i].append(elapsed / CYCLE)
            losses[i] += found
    for i in steps:
        values = torch.stack(losses[i]).tolist()
        if all(map(math.isfinite, values)):
            rows[i] |= {"step_seconds": statistics.median(times[i]), "range": [min(times[i]), max(times[i])]}
            rows[i] |= {"cycles": len(times[i]), "first_loss": values[0], "last_loss": values[-1]}
        else:
            rows[i]["not_timed"] = "its loss is not finite"
    baseline = rows[0].get("step_seconds")
    for row in rows:
        if baseline is not None and "step_seconds" in row:
            row["over_baseline"] = row["step_seconds"] / baseline
    return rows


def _run_cycles(step: Step, device: torch.device, cycles: int) -> tuple[float, list[Tensor]]:
    """Seconds of whole cycles, from an idle device to an idle device, and the losses."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    losses = [step() for _ in range(CYCLE * cycles)]
    wait()
    return time.perf_counter() - start, losses
