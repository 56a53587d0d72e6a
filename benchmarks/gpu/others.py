"""What this package uses of the other benchmarks and of `kfac-triton doctor`, imported in this one place."""

from __future__ import annotations

from cost_model import rates_of
from kernel_race import measured_rates, race
from models import BY_NAME, Layer, Model, equal_layers
from optimizer_race import DAMPING, KL_CLIP, LEARNING_RATE, Task, autoencoder, gpt2
from report import machine

from kfac_triton.cli.autoencoder import build_autoencoder, reconstruction_loss
from kfac_triton.cli.digits import load_images
from kfac_triton.cli.doctor import examine, problems
from kfac_triton.cli.problems import Problem, kernel_obstacle
from kfac_triton.cli.race import KFACSettings, shuffled_batches

__all__ = [
    "BY_NAME",
    "DAMPING",
    "KL_CLIP",
    "LEARNING_RATE",
    "KFACSettings",
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
