"""Text that every Python brings along: the help topics of `pydoc_data`, as symbols, cut into windows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
SYMBOLS = len(ALPHABET) + 1  # the last one stands for every other character
HELD_OUT_FRACTION = 0.1


@lru_cache
def corpus() -> Tensor:
    """The whole text as symbols. A paragraph that several topics share is in it once: what is held out was never seen."""
    from pydoc_data import topics

    paragraphs = [p for _, topic in sorted(topics.topics.items()) for p in topic.strip().split("\n\n")]
    return encode("\n\n".join(dict.fromkeys(paragraphs)))


def encode(text: str) -> Tensor:
    """Characters to symbols."""
    number = {character: i for i, character in enumerate(ALPHABET)}
    return torch.tensor([number.get(character, len(ALPHABET)) for character in text])


def split(symbols: Tensor) -> tuple[Tensor, Tensor]:
    """The first nine tenths, to train on, and the rest, held out."""
    end = round(len(symbols) * (1 - HELD_OUT_FRACTION))
    return symbols[:end], symbols[end:]


def windows(symbols: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets `[N, context]`: at each position the target is the symbol that comes next."""
    both = symbols[starts[:, None] + torch.arange(context + 1)]
    return both[:, :-1], both[:, 1:]


def random_windows(symbols: Tensor, context: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of windows at random places."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield windows(symbols, torch.randint(len(symbols) - context, (batch,), generator=generator), context)


def even_windows(symbols: Tensor, context: int, count: int) -> tuple[Tensor, Tensor]:
    """A fixed set: windows at even distances from the first place to the last."""
    return windows(symbols, torch.linspace(0, len(symbols) - context - 1, count).long(), context)


def fingerprint() -> str:
    """Of the text: it differs between Python's releases."""
    return hashlib.sha256(corpus().numpy().tobytes()).hexdigest()[:12]
