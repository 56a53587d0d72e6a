"""nn.Conv1d, Conv2d and Conv3d: rows of A are patches, one for each position (Grosse and Martens 2016, KFC)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_triton.kernels import ops

from .base import Layer
from .rows import Rows

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def padding_amounts(module: _Conv) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension; an even kernel with padding "same" has one more after than before."""
    if module.padding == "valid":
        return [(0, 0)] * len(module.kernel_size)
    if module.padding == "same":
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(p), int(p)) for p in module.padding]


def mean_patches(x: Tensor, window: ops.Window, positions: Sequence[int]) -> Tensor:
    """Patches averaged over positions, (N, C * kernel elements): one mean per kernel element, without making the patches."""
    if any(window.padding):
        x = F.pad(x, [p for p in reversed(window.padding) for _ in range(2)])
    means = []
    for offset in itertools.product(*(range(k) for k in window.kernel)):
        taken = tuple(
            slice(o * d, o * d + (count - 1) * s + 1, s)
            for o, d, s, count in zip(offset, window.dilation, window.stride, positions, strict=True)
        )
        means.append(x[(slice(None), slice(None), *taken)].flatten(2).mean(2))
    return torch.stack(means, dim=2).flatten(1)


class ConvLayer(Layer):
    """A convolution as a Linear on patches, shared over positions; each group of channels is a block of its own."""

    module: _Conv
    module_type: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    autocasts = True

    @property
    def feature_dims(self) -> int | None:
        """None: channels follow the examples."""
        return None

    @property
    def input_unit(self) -> int:
        """The kernel elements of one channel."""
        return math.prod(self.module.kernel_size)

    @property
    def unbatched_dim(self) -> int:
        """Channels, and the spatial dimensions."""
        return len(self.module.kernel_size) + 1

    def positions(self, shape: torch.Size) -> int:
        """Number of examples times spatial positions."""
        spatial = len(self.module.kernel_size)
        return shape[-spatial:].numel() * shape[: -spatial - 1].numel()

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every position is a row. Reduce: an example's mean patch and summed gradient."""
        spatial = len(self.module.kernel_size)
        if x.dim() == spatial + 1:  # no batch dimension
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        x, window = self.patches(x, gradient.shape[2:])
        examples, positions = x.shape[0], gradient.shape[2:].numel()
        groups = self.groups
        inputs, gradients = ([t] if groups == 1 else list(t.chunk(groups, dim=1)) for t in (x, gradient))
        if not self.reduce:
            return self.make_rows(inputs, gradients, examples, positions, window, ops.window((1,) * spatial))
        inputs = [mean_patches(part, window, gradient.shape[2:]) for part in inputs]
        return self.make_rows(inputs, [part.flatten(2).sum(2) for part in gradients], examples, positions)

    def patches(self, x: Tensor, output: Sequence[int]) -> tuple[Tensor, ops.Window]:
        """A tensor (N, C, *spatial), and the window of its patches to which W is applied.

        Args:
            x: the input, with a batch dimension.
            output: the spatial sizes of the output.
        """
        conv, padding = self.module, padding_amounts(self.module)
        before = [amount for amount, _ in padding]
        if any(first != last for first, last in padding) or (conv.padding_mode != "zeros" and any(before)):
            # Only these need a padded copy. The code that reads the patches adds zeros itself, equally many on both sides.
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            x = F.pad(x, [amount for pair in reversed(padding) for amount in pair], mode=mode)
            before = []
        return x, ops.window(conv.kernel_size, conv.stride, before, conv.dilation)
