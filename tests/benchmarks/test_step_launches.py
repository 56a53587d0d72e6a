"""Launches and operators of the modelled step against those of steps whose kernels are launched into nothing."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor, nn

from benchmarks.kernels.shapes import Images, Layer, Model, Norm, convolution
from benchmarks.steps import host_time, step_model, step_parts
from benchmarks.steps.host_time import task
from benchmarks.steps.workload import Workload

SHIPPED = replace(dict(step_model.columns())["no idle writes"], stats_fraction=1.0)


def described(module: nn.Module, loss: Callable[[], Tensor], terms: str) -> Model:
    """The layers and norms of a network, in the order in which they are called, and their rows."""
    layers, norms = [], []

    def look(m: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = inputs[0]
        if isinstance(m, nn.Linear):
            layers.append(Layer(x.numel() // x.shape[-1], m.in_features, m.out_features, m.bias is not None))
        elif isinstance(m, nn.Conv2d):
            images = Images(len(x), m.in_channels, x.shape[-1], m.kernel_size[0], m.stride[0], int(m.padding[0]))
            layers.append(convolution(images, m.out_channels, m.bias is not None))
        elif isinstance(m, nn.LayerNorm | nn.BatchNorm2d):
            width = m.weight.numel()
            has_channels = isinstance(m, nn.BatchNorm2d)
            by_position = terms == "tokens"
            norms.append(Norm(x.numel() // width, width, terms_are_positions=by_position, has_channels=has_channels))

    for m in module.modules():
        m.register_forward_hook(look)
    loss()
    return Model("", "", tuple(layers), 4, tuple(norms))


# Where the model counts less or more than happens: what covariances and norms launch, beyond which nothing may differ.
DIFFERENCES = {
    "gpt": (0, 0),
    # The input of the first layer is the user's own, which does not wait for the step: it is summed in the backward pass.
    "autoencoder": (1, 0),
    # The gradient of the embedding of patches arrives transposed, and is read with the rows of the other layers.
    "vit": (-1, 0),
    # Alignments of images differ; and channels are read in three ways, some of images with one position, which are loss terms.
    "resnet": (1, 3),
}


QUICK = ("gpt", "resnet")  # between them, layers and norms of all kinds; each takes a process, which compiles its kernels


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in DIFFERENCES])
def test_launches_are_those_of_a_step(name: str) -> None:
    found = host_time.run_in_process(name, host_time.ROOT, argparse.Namespace(repeats=1, settings={}))
    work = Workload(described(*task(name)), SHIPPED)
    launches, _ = step_parts.launches(work)
    kernels = {**found["passes_kernels"]}
    for kernel, count in found["step_kernels"].items():
        kernels[kernel] = kernels.get(kernel, 0) + count
    covariances = kernels.get("covariance_kernel", 0) + kernels.get("covariance_reduce_kernel", 0)
    norms = sum(count for kernel, count in kernels.items() if kernel.startswith(("row_", "channel_", "fisher")))
    more_covariances, more_norms = DIFFERENCES[name]
    assert covariances == step_parts.covariances(work) + more_covariances
    assert sum(kernels.values()) == launches + more_covariances + more_norms
    assert norms == step_parts.norm_launches(work) + more_norms


@pytest.mark.parametrize(("name", "counted"), [("gpt", 126), ("autoencoder", 123), ("vit", 138), ("resnet", 201)])
def test_operators_are_those_of_a_step_up_to_a_tenth(name: str, counted: int) -> None:
    """They are not counted anew: kernels that write nothing leave flags at random, for which a step runs some more."""
    work = Workload(described(*task(name)), SHIPPED)
    assert step_parts.operators(work) == pytest.approx(counted, rel=0.1)
