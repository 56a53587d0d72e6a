"""nn.Conv1d, Conv2d and Conv3d: rows of A are patches, one for each position (Grosse and Martens 2016, KFC)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton.kernels import ops

from .base import Layer, Rows

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def padding_amounts(module: _Conv) -> list[tuple[int, int]]:
    """(before, after) per spatial dimension; an even kernel with padding "same" pads one more behind."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]


def mean_patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], positions: Sequence[int]
) -> Tensor:
    """Patches averaged over positions, (N, C * kernel elements): one mean per kernel element, without making the patches."""
    means = []
    for offset in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(o * d, o * d + (count - 1) * s + 1, s)
            for o, d, s, count in zip(offset, dilation, stride, positions, strict=True)
        )
        means.append(x[(slice(None), slice(None), *window)].flatten(2).mean(2))
    return torch.stack(means, dim=2).reshape(x.shape[0], x.shape[1] * math.prod(kernel))


def patch_rows(
    layer: Layer,
    x: Tensor,
    gradient: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Rows:
    """Rows of a layer whose outputs are W times patches of x, (N, C, *spatial), padded with zeros on both sides alike."""
    examples, positions = x.shape[0], gradient.shape[2:].numel()
    inputs, gradients = list(x.chunk(layer.groups, dim=1)), list(gradient.chunk(layer.groups, dim=1))
    input_window = ops.window(kernel, stride, padding, dilation)
    gradient_window = ops.window((1,) * len(kernel))
    if layer.reduce:
        around = [p for p in reversed(padding) for _ in range(2)]
        padded = [F.pad(part, around) for part in inputs] if any(around) else inputs
        inputs = [mean_patches(part, kernel, stride, dilation, gradient.shape[2:]) for part in padded]
        gradients = [part.flatten(2).sum(2) for part in gradients]
        input_window = gradient_window = ops.ROWS
    return Rows(
        inputs=inputs,
        gradients=gradients,
        input_window=input_window,
        gradient_window=gradient_window,
        input_count=examples if layer.reduce else examples * positions,
        terms=examples * positions if layer.tokens else examples,
        examples=examples,
    )


class ConvLayer(Layer):
    """A convolution as a Linear on patches, shared over positions; each group of channels is a block of its own."""

    autocasts = True

    @property
    def conv(self) -> _Conv:
        """The module, typed."""
        return cast(_Conv, self.module)

    @property
    def input_unit(self) -> int:
        """A channel's kernel elements."""
        return math.prod(self.conv.kernel_size)

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every position is a row. Reduce: an example's mean patch and summed gradient."""
        spatial = len(self.conv.kernel_size)
        if x.dim() == spatial + 1:  # no batch dimension
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        padding = padding_amounts(self.conv)
        symmetric = all(before == after for before, after in padding)
        if self.conv.padding_mode != "zeros" or not symmetric:
            # Only these need a padded copy; zeros on both sides are left to the patch reader.
            mode = "constant" if self.conv.padding_mode == "zeros" else self.conv.padding_mode
            x = F.pad(x, [amount for pair in reversed(padding) for amount in pair], mode=mode)
            padding = [(0, 0)] * spatial
        before = [amount for amount, _ in padding]
        return patch_rows(self, x, gradient, self.conv.kernel_size, self.conv.stride, before, self.conv.dilation)


class Conv1dLayer(ConvLayer):
    """nn.Conv1d."""

    module_type = nn.Conv1d


class Conv2dLayer(ConvLayer):
    """nn.Conv2d."""

    module_type = nn.Conv2d


class Conv3dLayer(ConvLayer):
    """nn.Conv3d."""

    module_type = nn.Conv3d
