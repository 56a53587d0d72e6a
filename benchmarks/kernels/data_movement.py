"""The parts of a step that move data: what they read and write, and launch.

As in `cost_model`, an operand is read once and a result written once. Each part is one kernel or a few, for all tensors of a
model. With `by_pytorch` it is what was there before them: operators of PyTorch, each of which reads and writes anew.
"""

from __future__ import annotations

from collections.abc import Callable

from .cost import FLOAT, Cost
from .shapes import Layer, Model, padded

# A launch of PyTorch's multi-tensor kernels takes at most so many pairs of tensors, and so many chunks of them.
MULTI_TENSORS, MULTI_CHUNKS, CHUNK = 64, 320, 65536

# What AdamW reads and writes for each number of a parameter. In one kernel: parameter, gradient and two moments; three of them
# are written. PyTorch's default on a GPU is nine multi-tensor operators, of which one counts steps: decay of the parameter (2),
# first moment (3), decay of the second (2) and squares added to it (3), root (2), division (2), epsilon (2), update (4).
ADAMW_NUMBERS, FOREACH_ADAMW_NUMBERS = 7, 20


def is_deferred(layer: Layer, itemsize: int) -> bool:
    """Whether the rows of a layer wait for the step, as they take no more memory than sums of its factors would.

    Then one launch adds those of all layers to the factors; other rows are summed in the backward pass, a launch a layer.
    """
    images = layer.images
    inputs = images.batch * images.channels * images.side**2 if images else layer.rows * layer.inputs
    sums = sum(FLOAT * padded(side) ** 2 for side in (layer.a_side, layer.g_side))
    return itemsize * (inputs + layer.rows * layer.outputs) <= sums


def norms(model: Model, by_pytorch: bool = False) -> Cost:
    """Squared gradients of scale and shift of each loss term, summed, from one reading of input and gradient.

    Rows are summed in one launch, and what they leave is squared and blended in another; statistics of channels take a launch
    between. (More where types or alignments differ.)

    By PyTorch, input and gradient become float32; the input is normalized and multiplied by the gradient. If positions are loss
    terms, both are joined, squared and summed; else they are summed over the positions of an example first, and the rest is
    small.
    """
    moved, scratch, launches = 0.0, 0.0, 0
    for norm in model.norms:
        numbers = norm.count * norm.positions * norm.width
        moved += 2 * model.itemsize * numbers
        parts = 1 + norm.shift
        widening = 2 * FLOAT if model.itemsize < FLOAT else 0
        # What one operation reads and writes: normalized, product, then joined, squared and summed, or summed.
        after = 5 * parts if norm.terms_are_positions else parts
        scratch += numbers * (widening + FLOAT * (2 + 3 + after))
        # Conversions, normalization, product, sums over positions, join, square and sum.
        launches += norm.count * ((2 if widening else 0) + 2 + (0 if norm.terms_are_positions else parts) + 3)
    if by_pytorch:
        return Cost(moved, {}, launches, scratch)
    kinds = {norm.has_channels for norm in model.norms}
    return Cost(moved, {}, sum(3 if has_channels else 2 for has_channels in kinds))


def blending(model: Model, by_pytorch: bool = False) -> Cost:
    """Sums of the backward pass blended into the factors, and the old values that a step keeps until it has succeeded.

    The kernel writes each old value beside the new one, for factors with sums (16 bytes a number) and for those that are added
    to afterwards (8); diagonals of norms have a launch of their own. Of roots the refresh keeps copies, see
    `cost_model.warm_inverses`.

    By PyTorch, roots are cloned, selected and copied back (28 bytes a number). Factors whose sums were made in the backward
    pass are cloned, blended and copied to the sums' memory (28 bytes); others are selected into it (12 bytes), all in one
    stack.
    """
    moved, launches = 0.0, 0
    deferred = [layer for layer in model.layers if is_deferred(layer, model.itemsize)]
    at_once = [layer for layer in model.layers if layer not in deferred]
    if not by_pytorch:
        for layers, numbers in ((deferred, 2), (at_once, 4)):
            sides = sum(layer.count * (padded(layer.a_side) ** 2 + padded(layer.g_side) ** 2) for layer in layers)
            moved += FLOAT * numbers * sides
        moved += FLOAT * 4 * sum(norm.count * norm.width * (1 + norm.shift) for norm in model.norms)
        return Cost(moved, {}, bool(model.layers) + bool(model.norms))
    waiting, summed = (
        {padded(side) for layer in layers for side in (layer.a_side, layer.g_side)} for layers in (deferred, at_once)
    )
    for side, count in model.stacks.items():
        numbers = count * side**2
        moved += numbers * FLOAT * (7 + 7 * (side in summed) + 3 * (side in waiting))
        launches += 3 + 3 * (side in summed) + (side in waiting)
    return Cost(moved, {}, launches)


def gradients(model: Model, by_pytorch: bool = False) -> Cost:
    """Gradients gathered in stacks, their products with the updates, and the scaled updates scattered.

    Each is one launch for all shapes, and so is the scale between them. By PyTorch, stacks are gathered, scaled, and set to
    zero where they are not to be used; the products are counted with preconditioning.
    """
    numbers = sum(count * m * n for (m, n), count in model.gradients.items())
    launches = 3 * len(model.gradients) if by_pytorch else 4 * bool(model.gradients)
    return Cost(FLOAT * numbers * (2 + 2 + 2), {}, launches)


def parameters(model: Model) -> tuple[int, int]:
    """How many parameters these layers and norms have, and how many numbers."""
    tensors = sum(layer.count * (1 + layer.bias) for layer in model.layers)
    tensors += sum(norm.count * (1 + norm.shift) for norm in model.norms)
    numbers = sum(layer.count * layer.outputs * (layer.inputs + layer.bias) for layer in model.layers)
    return tensors, numbers + sum(norm.count * norm.width * (1 + norm.shift) for norm in model.norms)


def parameter_updates(model: Model, by_pytorch: bool = False, dense: bool = True) -> Cost:
    """SGD with momentum: gradient, momentum and parameter are read, the last two written, by one launch; another before it.

    Where a gradient is not finite nothing is written, so that no copies are kept.

    By PyTorch: decay of the momentum, gradient added, scaled, added to the parameter, 40 bytes a number; and 16 of copies of
    parameters and momentum, which come back if a gradient turns out not to be finite. Multi-tensor kernels take dense tensors
    alone; without them each operation is a launch a tensor. Restoring is one launch that ends at once.
    """
    tensors, numbers = parameters(model)
    if not by_pytorch:
        return Cost(FLOAT * numbers * 5, {}, 2)
    together = max(-(-tensors // MULTI_TENSORS), -(-numbers // (MULTI_CHUNKS * CHUNK)))
    return Cost(FLOAT * numbers * (10 + 4), {}, 4 * (together if dense else tensors) + 2 * together + 1)


REST: dict[str, Callable[[Model], Cost]] = {
    "statistics of norms": norms,
    "blending and old factors": blending,
    "gradients in stacks": gradients,
    "parameter updates": parameter_updates,
}
