"""Workloads and the optimizers that train them, for the step timings."""

from __future__ import annotations

import copy
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_triton import KFAC

from . import flops

STATISTICS_EVERY = 1
INVERSE_EVERY = 10
MOMENTUM = 0.9
DAMPING = 0.1
KL_CLIP = 1e-3
# Small enough for every contestant to train stably: the timings say nothing about tuning.
LEARNING_RATES = {"autoencoder": 1e-3, "conv": 1e-2}
BATCHES = 4

Step = Callable[[tuple[Tensor, Tensor]], Tensor]
PEER_NAMES = tuple(f"kfac-pytorch {method}" for method in flops.PEER_METHODS)
NAMES = ("SGD", "kfac_triton", *PEER_NAMES)


@dataclass(frozen=True)
class Workload:
    """A model, its loss and a few batches.

    Attributes:
        name: what `--workload` calls it.
        description: for the report.
        model: initial weights; contestants copy it.
        loss: of (output, target), a mean over the batch.
        batches: (input, target) pairs, used in turn.
    """

    name: str
    description: str
    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: list[tuple[Tensor, Tensor]]


def _images(count: int) -> Tensor:
    """Smooth blobs in [0, 1]: correlated pixels, so that factors are as ill-conditioned as those of real images."""
    coarse = torch.randn(count, 1, 5, 5)
    return torch.sigmoid(4 * F.interpolate(coarse, size=(28, 28), mode="bicubic", align_corners=False) - 2)


def _bits_per_image(output: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output, target, reduction="sum") / len(target)


def autoencoder(batch: int = 256) -> Workload:
    """The deep autoencoder of Hinton and Salakhutdinov (2006) with tanh units."""
    torch.manual_seed(0)
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.Tanh()]
    images = [_images(batch).flatten(1) for _ in range(BATCHES)]
    description = f"autoencoder {'-'.join(map(str, sizes))}, tanh, batch {batch}"
    model = nn.Sequential(*modules[:-1])
    return Workload("autoencoder", description, model, _bits_per_image, [(image, image) for image in images])


def conv(batch: int = 128) -> Workload:
    """Two 3x3 convolutions, each with 2x2 max pooling, and a wide linear head: 64 * 7 * 7 = 3136 inputs."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(3136, 10),
    )
    batches = [(_images(batch), torch.randint(10, (batch,))) for _ in range(BATCHES)]
    description = f"conv net 1-32-64 (3x3, 2x2 max pool) and head 3136-10 on 28x28, batch {batch}"
    return Workload("conv", description, model, F.cross_entropy, batches)


WORKLOADS: dict[str, Callable[[], Workload]] = {"autoencoder": autoencoder, "conv": conv}


def find_peer(folder: Path | None) -> str | None:
    """Makes `import kfac` work.

    Args:
        folder: that contains the package `kfac`, such as a checkout of kfac-pytorch; None looks for an installed one.

    Returns:
        What is wrong and how to mend it, or None if the import works.
    """
    if folder is not None and not (folder / "kfac" / "preconditioner.py").is_file():
        return f"{folder} holds no package kfac (no kfac/preconditioner.py)"
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for NVIDIA Apex
        if folder is not None:
            # The package asks for its installed version when it is imported, and a checkout has none.
            metadata = Path(temporary) / "kfac_pytorch-0.dist-info" / "METADATA"
            metadata.parent.mkdir()
            metadata.write_text("Metadata-Version: 2.1\nName: kfac-pytorch\nVersion: 0\n", encoding="utf-8")
            sys.path[:0] = [str(folder), temporary]
        try:
            import kfac.preconditioner  # noqa: F401
        except ImportError as error:
            return (
                f"kfac-pytorch is missing ({error}): clone https://github.com/gpauloski/kfac-pytorch and pass its folder "
                "as --peer"
            )
        finally:
            if folder is not None:
                sys.path.remove(temporary)
    return None


def _sgd_step(workload: Workload, model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES[workload.name], momentum=MOMENTUM)
    return _training_step(workload, model, optimizer)


def _our_step(workload: Workload, model: nn.Module) -> Step:
    optimizer = KFAC(
        model,
        lr=LEARNING_RATES[workload.name],
        momentum=MOMENTUM,
        damping=DAMPING,
        kl_clip=KL_CLIP,
        statistics_every=STATISTICS_EVERY,
        inverse_every=INVERSE_EVERY,
    )
    return _training_step(workload, model, optimizer)


def _peer_step(workload: Workload, model: nn.Module, method: str) -> Step:
    from kfac.preconditioner import KFACPreconditioner

    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATES[workload.name], momentum=MOMENTUM)
    preconditioner = KFACPreconditioner(
        model,
        factor_update_steps=STATISTICS_EVERY,
        inv_update_steps=INVERSE_EVERY,
        damping=DAMPING,
        kl_clip=KL_CLIP,
        lr=LEARNING_RATES[workload.name],
        compute_method=method,
        loglevel=logging.DEBUG,
    )
    return _training_step(workload, model, optimizer, preconditioner.step)


def _training_step(
    workload: Workload,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precondition: Callable[[], None] = lambda: None,
) -> Step:
    def step(batch: tuple[Tensor, Tensor]) -> Tensor:
        optimizer.zero_grad()
        loss = workload.loss(model(batch[0]), batch[1])
        loss.backward()
        precondition()
        optimizer.step()
        return loss.detach()

    return step


def make_step(name: str, workload: Workload) -> Step:
    """One training step of the contestant `name`, on its own copy of the workload's model.

    Args:
        name: one of `NAMES`.
        workload: what to train.
    """
    model = copy.deepcopy(workload.model)
    if name == "SGD":
        return _sgd_step(workload, model)
    if name == "kfac_triton":
        return _our_step(workload, model)
    return _peer_step(workload, model, name.split()[-1])


def floor(name: str, workload: Workload) -> flops.StepCost:
    """The counted operations of a contestant's step.

    Args:
        name: one of `NAMES`.
        workload: what it trains.
    """
    shapes = flops.layer_shapes(workload.model, workload.batches[0][0])
    if name == "SGD":
        return flops.sgd_cost(shapes)
    if name == "kfac_triton":
        return flops.kfac_cost(shapes, STATISTICS_EVERY, INVERSE_EVERY)
    return flops.peer_cost(shapes, name.split()[-1], STATISTICS_EVERY, INVERSE_EVERY)
