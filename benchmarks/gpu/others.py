"""What this package uses of the other benchmarks and of `kfac-triton doctor`, imported in this one place."""

from __future__ import annotations

from kfac_triton.cli.demo.autoencoder import build_autoencoder, reconstruction_loss
from kfac_triton.cli.demo.digits import load_images
from kfac_triton.cli.demo.training import CONTESTANTS, shuffled_batches
from kfac_triton.cli.tuning.checks import Bases, Problem, kernel_obstacle, relative_error, worst
from kfac_triton.cli.tuning.doctor import examine, problems
from kfac_triton.curvature.factor_stack import padded
from kfac_triton.kernels.certificate import damped

from ..convergence.optimizers import ADAMW, KFAC_ADAM, KFAC_NAME
from ..kernels.contestants import MOST_EIGH_CUBES, Contestant, kernel_contestants
from ..kernels.cost_model import rates_of
from ..kernels.shapes import BY_NAME, Layer, Model, equal_layers
from ..kernels.timing import compete, measured_rates, race
from ..report import machine
from ..steps.timing import DAMPING, KL_CLIP, LEARNING_RATE, Task, autoencoder, gpt2

__all__ = [
    "ADAMW",
    "BY_NAME",
    "CONTESTANTS",
    "DAMPING",
    "KFAC_ADAM",
    "KFAC_NAME",
    "KL_CLIP",
    "LEARNING_RATE",
    "MOST_EIGH_CUBES",
    "Bases",
    "Contestant",
    "Layer",
    "Model",
    "Problem",
    "Task",
    "autoencoder",
    "build_autoencoder",
    "compete",
    "damped",
    "equal_layers",
    "examine",
    "gpt2",
    "kernel_contestants",
    "kernel_obstacle",
    "load_images",
    "machine",
    "measured_rates",
    "padded",
    "problems",
    "race",
    "rates_of",
    "reconstruction_loss",
    "relative_error",
    "shuffled_batches",
    "worst",
]
