"""The networks of the race, of nothing but common layers; its autoencoder is that of the demo.

Outputs are logits with the classes in dimension 1, as `F.cross_entropy` takes them. The last layer is called `head`.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, one projection for queries, keys and values.

    Args:
        width: features of a token.
        heads: number of heads; divides the width.
        causal: whether a token sees only those before it and itself.
    """

    def __init__(self, width: int, heads: int, causal: bool):
        super().__init__()
        if width % heads:
            raise ValueError(f"heads must divide width, but {heads} does not divide {width}; choose another number of heads")
        self.heads = heads
        self.causal = causal
        self.project_in = nn.Linear(width, 3 * width)
        self.project_out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, width]` to the same shape."""
        queries, keys, values = self.project_in(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=self.causal)
        return self.project_out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm block: attention, then a two-layer MLP with GELU, each added to its input."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool):
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, T, width]` to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class TextTransformer(nn.Module):
    """Causal transformer over symbols, with learned positions and a head of its own."""

    def __init__(self, symbols: int, context: int, width: int, heads: int, blocks: int):
        super().__init__()
        self.symbols = nn.Embedding(symbols, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, 4 * width, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols)
        for embedding in (self.symbols, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)
        _shrink_residual_branches(self.blocks)

    def forward(self, symbols: Tensor) -> Tensor:
        """Symbols `[N, T]` to logits `[N, symbols, T]`."""
        x = self.symbols(symbols) + self.positions(torch.arange(symbols.shape[1], device=symbols.device))
        return self.head(self.norm(self.blocks(x))).transpose(1, 2)


class ViT(nn.Module):
    """Vision transformer: patches by a strided convolution, learned positions, the mean token into the head."""

    def __init__(self, side: int, patch: int, width: int, heads: int, blocks: int, hidden: int, classes: int = 10):
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, hidden, causal=False) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        _shrink_residual_branches(self.blocks)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, side, side]` to logits `[N, classes]`."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(x)).mean(dim=1))


def _shrink_residual_branches(blocks: nn.Sequential) -> None:
    """Last layers of the 2 L branches start at 1 / sqrt(2 L) of their size, as in GPT-2: the stream's variance stays put."""
    for block in blocks:
        for layer in (block.attention.project_out, block.mlp[-1]):
            with torch.no_grad():
                layer.weight.mul_((2 * len(blocks)) ** -0.5)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm; a strided 1 x 1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """`[N, inputs, H, W]` to `[N, outputs, H / stride, W / stride]`."""
        inner = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inner + self.shortcut(x))


class ResNet(nn.Module):
    """A strided stem, stages of residual blocks, each after the first at half the resolution, the mean pixel into the head.

    Args:
        widths: channels of each stage.
        depth: blocks a stage.
        classes: number of classes.
    """

    def __init__(self, widths: tuple[int, ...], depth: int, classes: int = 10):
        super().__init__()
        self.stem = nn.Conv2d(1, widths[0], 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        blocks, inputs = [], widths[0]
        for stage, outputs in enumerate(widths):
            for number in range(depth):
                blocks.append(ResidualBlock(inputs, outputs, stride=2 if stage > 0 and number == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, H, W]` to logits `[N, classes]`."""
        x = self.blocks(F.relu(self.norm(self.stem(images))))
        return self.head(x.mean(dim=(2, 3)))


class MLP(nn.Module):
    """Linear layers with ReLU between them.

    Args:
        widths: features of the images, of each hidden layer, and the number of classes.
    """

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in pairwise(widths[:-1]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-2], widths[-1])

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, H, W]` to logits `[N, classes]`."""
        return self.head(self.body(images))


class ConvNet(nn.Module):
    """3 x 3 convolutions without normalization, each followed by ReLU and max pooling, and a linear head.

    Args:
        channels: of each convolution.
        side: of the images.
        classes: number of classes.
    """

    def __init__(self, channels: tuple[int, ...], side: int, classes: int = 10):
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((1, *channels)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            side //= 2
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.head = nn.Linear(channels[-1] * side**2, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Images `[N, 1, side, side]` to logits `[N, classes]`."""
        return self.head(self.body(images))
