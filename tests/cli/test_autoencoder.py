"""The demo's model and loss."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from kfac_triton.cli.demo.autoencoder import WIDTHS, build_autoencoder, full_loss, reconstruction_loss


def test_layers_are_those_of_the_paper():
    layers = list(build_autoencoder(seed=0))
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(pairwise(WIDTHS))
    after = [type(layers[layers.index(layer) + 1]) if layer is not layers[-1] else None for layer in linear]
    code = nn.Linear  # the code is linear: the next module is the decoder's first layer
    assert after == [nn.Tanh, nn.Tanh, nn.Tanh, code, nn.Tanh, nn.Tanh, nn.Tanh, None]


def test_initial_weights_depend_on_the_seed_alone():
    first = build_autoencoder(seed=0).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = build_autoencoder(seed=0).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], build_autoencoder(seed=1).state_dict()["0.weight"])


def test_initial_weights_have_the_stated_scale():
    linear = [layer for layer in build_autoencoder(seed=0) if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(linear):
        gain = 1 if index in (3, 7) else 5 / 3
        expected = gain * math.sqrt(2 / (layer.in_features + layer.out_features))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.03)
        assert not layer.bias.any()


def test_loss_equals_brute_force():
    torch.manual_seed(0)
    logits, images = torch.randn(3, 5, dtype=torch.float64), torch.rand(3, 5, dtype=torch.float64)
    total = 0.0
    for image in range(3):
        for pixel in range(5):
            probability = 1 / (1 + math.exp(-logits[image, pixel].item()))
            x = images[image, pixel].item()
            total -= x * math.log(probability) + (1 - x) * math.log(1 - probability)
    assert reconstruction_loss(logits, images).item() == pytest.approx(total / 3, rel=1e-12)


def test_full_loss_weighs_images_not_batches():
    torch.manual_seed(0)
    model, images = nn.Linear(6, 6), torch.rand(7, 6)
    expected = reconstruction_loss(model(images), images).item()
    assert full_loss(model, images, batch=3) == pytest.approx(expected, rel=1e-6)
