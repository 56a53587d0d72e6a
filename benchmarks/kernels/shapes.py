"""Layer sets of real models: what K-FAC has to multiply for one training step, whatever framework the model is written in."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

ALIGNMENT = 16  # the optimizer stores factors padded to a multiple of this


def padded(side: int) -> int:
    """Side that a factor is stored with."""
    return -(-side // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Images:
    """Input of a convolution with a square kernel: (batch, channels, side, side)."""

    batch: int
    channels: int
    side: int
    kernel: int
    stride: int = 1
    padding: int = 0

    @property
    def out_side(self) -> int:
        """Side of the output."""
        return (self.side + 2 * self.padding - self.kernel) // self.stride + 1


@dataclass(frozen=True)
class Layer:
    """`count` equal layers, each with `rows` rows of `inputs` numbers and a weight (outputs, inputs).

    Attributes:
        rows: examples times positions.
        inputs: columns of the weight, without the bias.
        outputs: rows of the weight.
        bias: whether a column of ones belongs to A.
        count: how many such layers the model has.
        images: for a convolution, what its rows are patches of.
    """

    rows: int
    inputs: int
    outputs: int
    bias: bool = True
    count: int = 1
    images: Images | None = None

    @property
    def a_side(self) -> int:
        """Side of A."""
        return self.inputs + self.bias

    @property
    def g_side(self) -> int:
        """Side of G."""
        return self.outputs


@dataclass(frozen=True)
class Norm:
    """`count` equal norms, each of `positions` times `width` numbers, with a scale and a shift (or without one) of `width`.

    Attributes:
        positions: examples times tokens or pixels.
        width: entries of the scale.
        shift: whether there is a shift.
        count: how many such norms the model has.
        terms_are_positions: whether each position is a loss term, as in a language model; else each example is one.
        has_channels: whether the statistics are those of channels of images, as in BatchNorm; else those of a position.
    """

    positions: int
    width: int
    shift: bool = True
    count: int = 1
    terms_are_positions: bool = False
    has_channels: bool = False


@dataclass(frozen=True)
class Model:
    """A name, a sentence, layers, and the bytes of a number in their inputs and gradients: 4 for float32, 2 for bfloat16.

    The norms are the layers' neighbours, which have curvature of their own: no matrix, but a diagonal.
    """

    name: str
    description: str
    layers: tuple[Layer, ...]
    itemsize: int = 2
    norms: tuple[Norm, ...] = ()

    @property
    def stacks(self) -> dict[int, int]:
        """Padded side -> number of factors, largest side first."""
        sides: Counter[int] = Counter()
        for layer in self.layers:
            sides[padded(layer.a_side)] += layer.count
            sides[padded(layer.g_side)] += layer.count
        return dict(sorted(sides.items(), reverse=True))

    @property
    def gradients(self) -> dict[tuple[int, int], int]:
        """Padded shape of [weight | bias] -> number of layers."""
        shapes: Counter[tuple[int, int]] = Counter()
        for layer in self.layers:
            shapes[padded(layer.g_side), padded(layer.a_side)] += layer.count
        return dict(sorted(shapes.items(), reverse=True))


def convolution(images: Images, outputs: int, bias: bool = False, count: int = 1) -> Layer:
    """The layer of a convolution."""
    rows = images.batch * images.out_side**2
    return Layer(rows, images.channels * images.kernel**2, outputs, bias, count, images)


def autoencoder(batch: int = 256) -> Model:
    """Hinton and Salakhutdinov (2006)."""
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    layers = tuple(Layer(batch, inputs, outputs) for inputs, outputs in pairwise(sizes))
    return Model("autoencoder", f"784-1000-500-250-30-...-784, batch {batch}, float32", layers, itemsize=4)


def resnet50(batch: int = 32) -> Model:
    """He et al. (2016), with the stride in the 3x3 convolutions as torchvision has it, at 224 x 224."""
    layers = [convolution(Images(batch, 3, 224, 7, 2, 3), 64)]
    channels, side = 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        wide, small = 4 * width, side // stride
        layers += [
            convolution(Images(batch, channels, side, 1), width),
            convolution(Images(batch, width, side, 3, stride, 1), width),
            convolution(Images(batch, width, small, 1), wide, count=blocks),
            convolution(Images(batch, channels, side, 1, stride), wide),  # the shortcut
            convolution(Images(batch, wide, small, 1), width, count=blocks - 1),
            convolution(Images(batch, width, small, 3, 1, 1), width, count=blocks - 1),
        ]
        channels, side = wide, small
    # Behind every convolution.
    norms = tuple(Norm(layer.rows, layer.outputs, count=layer.count, has_channels=True) for layer in layers)
    layers.append(Layer(batch, 2048, 1000))
    return Model("resnet50", f"224 x 224, batch {batch}, bfloat16", tuple(layers), norms=norms)


def _transformer(rows: int, width: int, blocks: int) -> tuple[Layer, ...]:
    return (
        Layer(rows, width, 3 * width, count=blocks),
        Layer(rows, width, width, count=blocks),
        Layer(rows, width, 4 * width, count=blocks),
        Layer(rows, 4 * width, width, count=blocks),
    )


def vit_b(batch: int = 32) -> Model:
    """Dosovitskiy et al. (2021), patches of 16 x 16."""
    patches = convolution(Images(batch, 3, 224, 16, 16), 768, bias=True)
    layers = (patches, *_transformer(batch * 197, 768, 12), Layer(batch, 768, 1000))
    return Model("vit_b", f"ViT-B/16, 224 x 224, batch {batch}, bfloat16", layers, norms=(Norm(batch * 197, 768, count=25),))


def gpt2(tokens: int = 16384) -> Model:
    """GPT-2 small (Radford et al. 2019) without its embedding, which is the head too."""
    norms = (Norm(tokens, 768, count=25, terms_are_positions=True),)
    return Model("gpt2", f"GPT-2 small, {tokens} tokens, bfloat16", _transformer(tokens, 768, 12), norms=norms)


def wide_block(tokens: int = 32768) -> Model:
    """One block 4096 wide, as in Touvron et al. (2023): q, k, v and o, two gates 11008 wide and the way back."""
    layers = (
        Layer(tokens, 4096, 4096, bias=False, count=4),
        Layer(tokens, 4096, 11008, bias=False, count=2),
        Layer(tokens, 11008, 4096, bias=False),
    )
    norms = (Norm(tokens, 4096, shift=False, count=2, terms_are_positions=True),)
    return Model("wide_block", f"one block 4096 wide, {tokens} tokens, bfloat16", layers, norms=norms)


def equal_layers(side: int, factors: int, rows: int = 1024) -> Model:
    """Square layers without a bias: a stack of so many factors of one side."""
    layers = (Layer(rows, side, side, bias=False, count=factors // 2),)
    return Model(f"stack_{side}", f"{factors} factors of side {side}, {rows} rows, bfloat16", layers)


def quick_perceptron() -> Model:
    """Equal layers and unequal ones, small enough for any machine."""
    layers = (Layer(64, 24, 32, count=2), Layer(64, 32, 10))
    return Model("quick_perceptron", "24-32 twice and 32-10, batch 64, float32", layers, itemsize=4)


def quick_convolutions() -> Model:
    """A padded 3x3 and a strided 1x1 convolution, in 16 bits."""
    layers = (
        convolution(Images(4, 3, 12, 3, 1, 1), 16, bias=True),
        convolution(Images(4, 16, 12, 1, 2), 32),
    )
    return Model("quick_convolutions", "3-16 (3x3) and 16-32 (1x1, stride 2) on 12 x 12, batch 4, bfloat16", layers)


FULL = (autoencoder(), equal_layers(512, 64), equal_layers(1024, 16), resnet50(), vit_b(), gpt2(), wide_block())
QUICK = (quick_perceptron(), quick_convolutions())
BY_NAME = {model.name: model for model in FULL + QUICK}
