"""nn.ConvTranspose1d, 2d and 3d: convolutions of stride 1 of the input with zeros between its values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kfac_triton.kernels import ops

from .conv import ConvLayer, padding_amounts


class ConvTransposeLayer(ConvLayer):
    """A transposed convolution as an ordinary one, of z with z[s i + d (k - 1) - p] = x[i] and zeros elsewhere.

        y[o, t] = sum_{c, j} W[o, c, j] z[c, t + d j],    W[o, c, j] = weight[c, o, k - 1 - j]

    for stride s, padding p, dilation d and kernel size k. So rows of A are the patches of z (Grosse and Martens 2016, KFC), in
    the order of the flipped kernel. Each group of channels is a block of its own.
    """

    module_type = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

    @property
    def input_size(self) -> int:
        """Columns of W and side of A, of one group, including the bias."""
        return self.weight.shape[0] // self.groups * self.input_unit + self.has_bias

    @property
    def output_size(self) -> int:
        """Rows of W and side of G, of one group."""
        return self.weight.shape[1]

    def patches(self, x: Tensor, output: Sequence[int]) -> tuple[Tensor, ops.Window]:
        """The tensor z, and the window of its patches. Its size follows from that of the output, which a call may choose."""
        conv, window = self.module, ops.window(self.module.kernel_size, dilation=self.module.dilation)
        if window.reads_as_it_is and list(output) == list(x.shape[2:]) and not any(conv.padding):
            return x, window  # z is x: nothing is put between its values or behind them
        spans = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        z = x.new_zeros(*x.shape[:2], *(n + span for n, span in zip(output, spans, strict=True)))
        places, taken = [slice(None)] * 2, [slice(None)] * 2
        for n, length, span, s, (p, _) in zip(x.shape[2:], z.shape[2:], spans, conv.stride, padding_amounts(conv), strict=True):
            before = span - p  # negative where the padding cuts off values of x
            first = max(0, -(before // s))
            last = min(n, (length - before - 1) // s + 1)
            places.append(slice(before + first * s, before + last * s, s))
            taken.append(slice(first, last))
        z[tuple(places)] = x[tuple(taken)]
        return z, window

    def to_matrix(self, stored: Tensor, group: int) -> Tensor:
        """One group of channels of the weight, with its channels swapped and its kernel flipped."""
        return _flip(stored.chunk(self.groups)[group])

    def from_matrix(self, rows: Tensor) -> Tensor:
        """The reverse, for all groups."""
        return torch.cat([_flip(part.unflatten(1, (-1, *self.module.kernel_size))) for part in rows.chunk(self.groups)])


def _flip(weight: Tensor) -> Tensor:
    """Between (in, out, *kernel) and (out, in, *flipped kernel), both ways."""
    return weight.transpose(0, 1).flip(tuple(range(2, weight.dim())))
