"""Kinds of sums: how the rows of a pass are added to the sum of a factor, for any number of layers in one call.

A kind is a function (items, alpha, beta, backend) that sets

    total <- beta total + alpha (the sum over the item's rows)

for every item of a list. Alpha and beta are vectors on the device with an entry for each item. Where beta is 0 the old total
must not be read, as it may contain a NaN of an earlier step. No two items of a call have the same total.

To sum the factors of some layers in another way, as `add_norms` does, write such a function and return it in `kind_of` for
these factors. What `Rows` contain is between the layer, whose `rows` makes them, and the kind, which reads them; only
`Rows.sample` and EKFAC's moments do so, too. The rows may be kept until the end of the backward pass, so `rows` should return
views of the input and the gradient, and leave what needs memory to the kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import ops
from ..kernels.device_tables import device_vector
from ..layers import Layer, Rows
from ..layers.norm import NormLayer, NormPass
from ..layers.partition import Part
from .diagonal_sums import masked_rows, squared_rows


class Item(NamedTuple):
    """What a pass through a layer adds to the sum of one factor."""

    layer: Layer
    part: Part
    rows: Rows
    total: Tensor


Kind = Callable[[Sequence[Item], Tensor, Tensor, str], None]


def kind_of(layer: Layer, part: Part) -> Kind:
    """How the sum of this part of a layer is computed."""
    if not part.diagonal:
        return add_products
    if layer.constant_input and part.is_input and part.size == 1:
        return add_counts
    return add_norms if isinstance(layer, NormLayer) and not part.is_input else add_squares


def add_products(items: Sequence[Item], alpha: Tensor, beta: Tensor, backend: str) -> None:
    """X^T X of all items, in one launch for each kind of input."""
    read = [_source(item) for item in items]
    totals, sources, windows = [item.total for item in items], [x for x, _ in read], [window for _, window in read]
    ops.covariance_ema(totals, sources, alpha, beta, [item.part.has_bias_column for item in items], windows, backend=backend)
    _correct_ones(items, alpha)


def add_squares(items: Sequence[Item], alpha: Tensor, beta: Tensor, backend: str) -> None:
    """The diagonals of X^T X, one after another."""
    for number, item in enumerate(items):
        added = _squares(item) * alpha[number]
        item.total.copy_(torch.where(beta[number] > 0, item.total + added, added))


def add_counts(items: Sequence[Item], alpha: Tensor, beta: Tensor, backend: str) -> None:
    """A of layers whose input is the constant 1: the number of rows, of all layers together."""
    if torch.compiler.is_compiling():
        add_squares(items, alpha, beta, backend)
        return
    totals = [item.total for item in items]
    added = alpha * device_vector([item.rows.input_count * item.rows.share for item in items], alpha.device, alpha.dtype)
    torch._foreach_copy_(totals, torch.where(beta > 0, torch.cat(totals) + added, added).split(1))


def add_norms(items: Sequence[Item], alpha: Tensor, beta: Tensor, backend: str) -> None:
    """The diagonals of norm layers, in a few launches for all of them; rows that are made already, one layer after another."""
    start = 0
    for is_made, run in itertools.groupby(items, key=lambda item: item.rows.make is None):
        members = list(run)
        stop = start + len(members)
        if is_made:
            add_squares(members, alpha[start:stop], beta[start:stop], backend)
        else:
            passes = [item.rows.make for item in members]
            norms = [one for one in passes if isinstance(one, NormPass)]
            ops.norm_fisher_diagonal(
                [item.total for item in members], [one.x for one in norms], [one.gradient for one in norms],
                alpha[start:stop], beta[start:stop], [one.norm for one in norms], [one.running for one in norms],
                backend=backend if alpha.dtype == torch.float32 else "auto",
            )  # fmt: skip
        start = stop


def _source(item: Item) -> tuple[Tensor, ops.Window]:
    """Rows of the item, and how to read them. Rows of A that do not count are zeros, except those that are indices."""
    source, window = item.part.sources(item.rows)
    mask = item.rows.mask if item.part.is_input else None
    return masked_rows(source, window, mask) if mask is not None and source.is_floating_point() else (source, window)


def _correct_ones(items: Sequence[Item], alpha: Tensor) -> None:
    """The kernel counts every row in the last entry of A, the square of the bias column; rows that do not count are taken off.

    All else in the last row and column is right already, because it is a sum of masked inputs.
    """
    corners, weights, left_out = [], [], []
    for number, item in enumerate(items):
        if item.part.has_bias_column and item.rows.left_out is not None:
            last = item.part.size - 1
            corners.append(item.total[last, last])
            weights.append(alpha[number])
            left_out.append(item.rows.left_out)
    if not corners:
        return
    amounts = (torch.stack(weights) * torch.stack(left_out)).unbind()
    if torch.compiler.is_compiling():
        for corner, amount in zip(corners, amounts, strict=True):
            corner.sub_(amount)
    else:
        torch._foreach_sub_(corners, amounts)


def _squares(item: Item) -> Tensor:
    part, rows, total = item.part, item.rows, item.total
    taken = rows.input_count * rows.share
    if part.is_input and item.layer.constant_input:
        return torch.ones_like(total) * taken
    source, window = _source(item)
    mask = rows.mask if part.is_input else None
    squares = squared_rows(source, window, part.size - part.has_bias_column, total.dtype, mask)
    if not part.has_bias_column:
        return squares
    ones = squares.new_ones(1) * taken
    return torch.cat([squares, ones if rows.left_out is None else ones - rows.left_out])
