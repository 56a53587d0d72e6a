"""nn.ConvTranspose1d, 2d and 3d: convolutions of stride 1 of the input with zeros between its values."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .base import Rows
from .conv import ConvLayer, patch_rows


class ConvTransposeLayer(ConvLayer):
    """A transposed convolution as an ordinary one, of z with z[s i + d (k - 1) - p] = x[i] and zeros elsewhere.

        y[o, t] = sum_{c, j} W[o, c, j] z[c, t + d j],    W[o, c, j] = weight[c, o, k - 1 - j]

    for stride s, padding p, dilation d and kernel size k. So rows of A are the patches of z (Grosse and Martens 2016, KFC), in
    the order of the flipped kernel. Each group of channels is a block of its own.
    """

    @property
    def input_size(self) -> int:
        """Columns of W and side of A, of one group, the bias included."""
        return self.weight.shape[0] // self.groups * self.input_unit + self.has_bias

    @property
    def output_size(self) -> int:
        """Rows of W and side of G, of one group."""
        return self.weight.shape[1]

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Expand: every position of the output is a row. Reduce: an example's mean patch and summed gradient."""
        kernel, dilation = self.conv.kernel_size, self.conv.dilation
        if x.dim() == len(kernel) + 1:  # no batch dimension
            x, gradient = x.unsqueeze(0), gradient.unsqueeze(0)
        spatial = len(kernel)
        return patch_rows(self, self._spread(x, gradient.shape[2:]), gradient, kernel, (1,) * spatial, (0,) * spatial, dilation)

    def _spread(self, x: Tensor, output: torch.Size) -> Tensor:
        """Z. Its size follows from that of the output, which a call may choose (output_size)."""
        conv = self.conv
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        z = x.new_zeros(*x.shape[:2], *(n + span for n, span in zip(output, spans, strict=True)))
        places, taken = [slice(None)] * 2, [slice(None)] * 2
        padding = cast(tuple[int, ...], conv.padding)
        for n, length, span, s, p in zip(x.shape[2:], z.shape[2:], spans, conv.stride, padding, strict=True):
            before = span - p  # negative where the padding cuts off values of x
            first = max(0, -(before // s))
            last = min(n, (length - before - 1) // s + 1)
            places.append(slice(before + first * s, before + last * s, s))
            taken.append(slice(first, last))
        z[tuple(places)] = x[tuple(taken)]
        return z

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of one group: that of the weight, its channels swapped and its kernel flipped, and of the bias."""
        weight, bias = self.weight.grad, None if self.bias is None else self.bias.grad
        if weight is not None:
            weight = self._flip(weight.chunk(self.groups)[group])
        return weight, None if bias is None else bias.chunk(self.groups)[group]

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weight and bias with their parts."""
        columns = self.input_size - self.has_bias
        parts = [block[: self.output_size, : self.input_size] for block in blocks]
        kernel = self.conv.kernel_size
        update = torch.cat([self._flip(part[:, :columns].reshape(self.output_size, -1, *kernel)) for part in parts])
        result = [(self.weight, update)]
        if self.bias is not None:
            result.append((self.bias, torch.cat([part[:, columns] for part in parts])))
        return result

    @staticmethod
    def _flip(weight: Tensor) -> Tensor:
        """Between (in, out, *kernel) and (out, in, *flipped kernel), both ways."""
        return weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))


class ConvTranspose1dLayer(ConvTransposeLayer):
    """nn.ConvTranspose1d."""

    module_type = nn.ConvTranspose1d


class ConvTranspose2dLayer(ConvTransposeLayer):
    """nn.ConvTranspose2d."""

    module_type = nn.ConvTranspose2d


class ConvTranspose3dLayer(ConvTransposeLayer):
    """nn.ConvTranspose3d."""

    module_type = nn.ConvTranspose3d
