"""The layers of benchmarks/kernels/shapes.py against the published sizes of the models, and against PyTorch's convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.kernels.shapes import BY_NAME, FULL, QUICK, Images, Layer, Model, convolution, padded


def parameters(model: Model) -> int:
    layers = sum(layer.count * layer.outputs * (layer.inputs + layer.bias) for layer in model.layers)
    return layers + sum(norm.count * norm.width * (1 + norm.shift) for norm in model.norms)


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("resnet50", 54, 25_557_032),
        ("vit_b", 50, 86_567_656 - 198 * 768),  # without class token and positions
        ("gpt2", 48, 124_439_808 - (50257 + 1024) * 768),  # without embeddings
        ("autoencoder", 8, 2_837_314),
        ("wide_block", 7, 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096),
    ],
)
def test_models_have_the_published_number_of_parameters(name: str, layers: int, expected: int) -> None:
    model = BY_NAME[name]
    assert sum(layer.count for layer in model.layers) == layers
    assert parameters(model) == expected


@pytest.mark.parametrize("images", [layer.images for model in FULL + QUICK for layer in model.layers if layer.images])
def test_convolutions_have_the_shapes_of_pytorch(images: Images) -> None:
    conv = nn.Conv2d(images.channels, 2, images.kernel, images.stride, images.padding, device="meta")
    output = conv(torch.empty(images.batch, images.channels, images.side, images.side, device="meta"))
    assert output.shape[2:] == (images.out_side, images.out_side)
    layer = convolution(images, 2)
    assert (layer.rows, layer.inputs) == (output.numel() // 2, conv.weight[0].numel())


def test_stacks_and_gradients_count_every_factor_once() -> None:
    model = Model("m", "", (Layer(8, 15, 20, bias=True, count=3), Layer(8, 16, 32, bias=False)))
    assert model.stacks == {32: 4, 16: 4}  # 15 + 1 three times and 16; 20 is stored as 32, three times, and 32
    assert model.gradients == {(32, 16): 4}
    assert [padded(side) for side in (1, 16, 17)] == [16, 16, 32]


def test_the_targets_stacks_are_there() -> None:
    assert BY_NAME["stack_512"].stacks == {512: 64}
    assert BY_NAME["stack_1024"].stacks == {1024: 16}


def test_the_tokens_are_those_of_the_descriptions() -> None:
    assert {layer.rows for layer in BY_NAME["gpt2"].layers} == {16384}
    assert {layer.rows for layer in BY_NAME["wide_block"].layers} == {32768}
