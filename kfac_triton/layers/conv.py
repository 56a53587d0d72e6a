"""nn.Conv1d, Conv2d and Conv3d: rows of A are patches, one a position (Grosse and Martens 2016, KFC)."""

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

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


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
    """Patches averaged over positions, (N, C * kernel elements): one mean per kernel element, no patch is ever made."""
    means = []
    for offset in itertools.product(*(range(k) for k in kernel)):
        window = tuple(
            slice(o * d, o * d + (count - 1) * s + 1, s)
            for o, d, s, count in zip(offset, dilation, stride, positions, strict=True)
        )
        means.append(x[(slice(None), slice(None), *window)].flatten(2).mean(2))
    return torch.stack(means, dim=2).reshape(x.shape[0], x.shape[1] * math.prod(kernel))


class ConvLayer(Layer):
    """A convolution as a Linear on patches, shared over positions; each group of channels is a block of its own."""

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
        examples, positions = x.shape[0], gradient.shape[2:].numel()
        terms = examples * positions if self.tokens else examples
        input_groups = x.chunk(self.groups, dim=1)
        gradient_groups = gradient.chunk(self.groups, dim=1)
        if self.reduce:
            return Rows(
                inputs=[self._mean_patches(part, padding, gradient.shape[2:]) for part in input_groups],
                gradients=[part.flatten(2).sum(2) for part in gradient_groups],
                input_window=ops.ROWS,
                gradient_window=ops.ROWS,
                input_count=examples,
                terms=terms,
                examples=examples,
            )
        return Rows(
            inputs=list(input_groups),
            gradients=list(gradient_groups),
            input_window=ops.window(
                self.conv.kernel_size, self.conv.stride, [before for before, _ in padding], self.conv.dilation
            ),
            gradient_window=ops.window((1,) * spatial),
            input_count=examples * positions,
            terms=terms,
            examples=examples,
        )

    def _mean_patches(self, x: Tensor, padding: list[tuple[int, int]], positions: torch.Size) -> Tensor:
        if any(before for before, _ in padding):
            x = F.pad(x, [amount for pair in reversed(padding) for amount in pair])
        return mean_patches(x, self.conv.kernel_size, self.conv.stride, self.conv.dilation, positions)


class Conv1dLayer(ConvLayer):
    """nn.Conv1d."""

    module_type = nn.Conv1d


class Conv2dLayer(ConvLayer):
    """nn.Conv2d."""

    module_type = nn.Conv2d


class Conv3dLayer(ConvLayer):
    """nn.Conv3d."""

    module_type = nn.Conv3d
