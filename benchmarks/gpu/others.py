"""What this package uses of the other benchmarks and of `kfac-triton doctor`, imported in this one place."""

from __future__ import annotations

from kfac_triton.cli.demo.autoencoder import build_autoencoder, reconstruction_loss
from kfac_triton.cli.demo.digits import load_images
from kfac_triton.cli.demo.training import CONTESTANTS, shuffled_batches
from kfac_triton.cli.tuning.checks import Problem, kernel_obstacle
from kfac_triton.cli.tuning.doctor import examine, problems

from ..kernels.cost_model import rates_of
from ..kernels.shapes import BY_NAME, Layer, Model, equal_layers
from ..kernels.timing import measured_rates, race
from ..report import machine
from ..steps.timing import DAMPING, KL_CLIP, LEARNING_RATE, Task, autoencoder, gpt2

__all__ = [
    "BY_NAME",
    "CONTESTANTS",
    "DAMPING",
    "KL_CLIP",
    "LEARNING_RATE",
    "Layer",
    "Model",
    "Problem",
    "Task",
    "autoencoder",
    "build_autoencoder",
    "equal_layers",
    "examine",
    "gpt2",
    "kernel_obstacle",
    "load_images",
    "machine",
    "measured_rates",
    "problems",
    "race",
    "rates_of",
    "reconstruction_loss",
    "shuffled_batches",
]
