"""The parts of a step that move data, mostly by PyTorch's operators: what they read and write, and launch.

As in `cost_model`, an operand is read once and a result written once, by each of the operators that PyTorch runs.
"""

from __future__ import annotations

from collections.abc import Callable

from .cost import FLOAT, Cost
from .shapes import Layer, Model, padded

# A launch of PyTorch's multi-tensor kernels takes at most so many pairs of tensors, and so many chunks of them.
MULTI_TENSORS, MULTI_CHUNKS, CHUNK = 64, 320, 65536


def is_deferred(layer: Layer, itemsize: int) -> bool:
    """Whether the rows of a layer wait for the step, as they take no more memory than sums of its factors would.

    Then one launch adds those of all layers to the factors; other rows are summed in the backward pass, a launch a layer.
    """
    images = layer.images
    inputs = images.batch * images.channels * images.side**2 if images else layer.rows * layer.inputs
    sums = sum(FLOAT * padded(side) ** 2 for side in (layer.a_side, layer.g_side))
    return itemsize * (inputs + layer.rows * layer.outputs) <= sums


def norms(model: Model, fused: bool = False) -> Cost:
    """Squared gradients of scale and shift of each loss term, summed: by PyTorch, or from one reading in one launch for all.

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
    return Cost(moved, {}, 1 if model.norms else 0) if fused else Cost(moved, {}, launches, scratch)


def copies(model: Model, in_kernels: bool = False) -> Cost:
    """Old values that a step keeps until it has succeeded: those of roots, whose new ones are selected, and those of factors.

    By PyTorch, roots are cloned, selected and copied back (28 bytes a number). Factors whose sums were made in the backward
    pass are cloned, blended and copied to the sums' memory (28 bytes); others are selected into it (12 bytes), all in one
    stack. In kernels, each writes the old value beside the new one.
    """
    moved, launches = 0.0, 0
    deferred = [layer for layer in model.layers if is_deferred(layer, model.itemsize)]
    at_once = [layer for layer in model.layers if layer not in deferred]
    waiting, summed = (
        {padded(side) for layer in layers for side in (layer.a_side, layer.g_side)} for layers in (deferred, at_once)
    )
    for side, count in model.stacks.items():
        numbers = count * side**2
        if in_kernels:
            moved += numbers * 2 * FLOAT
            continue
        moved += numbers * FLOAT * (7 + 7 * (side in summed) + 3 * (side in waiting))
        launches += 3 + 3 * (side in summed) + (side in waiting)
    return Cost(moved, {}, launches)


def gradients(model: Model) -> Cost:
    """The gradients of one shape gathered in a stack, and the updates scaled and set to zero where they are not to be used."""
    numbers = sum(count * m * n for (m, n), count in model.gradients.items())
    return Cost(FLOAT * numbers * (2 + 2 + 2), {}, 3 * len(model.gradients))


def parameters(model: Model) -> tuple[int, int]:
    """How many parameters these layers and norms have, and how many numbers."""
    tensors = sum(layer.count * (1 + layer.bias) for layer in model.layers)
    tensors += sum(norm.count * (1 + norm.shift) for norm in model.norms)
    numbers = sum(layer.count * layer.outputs * (layer.inputs + layer.bias) for layer in model.layers)
    return tensors, numbers + sum(norm.count * norm.width * (1 + norm.shift) for norm in model.norms)


def parameter_updates(model: Model, dense: bool = True) -> Cost:
    """SGD with momentum, and copies of parameters and momentum, which come back if a gradient turns out not to be finite.

    Decay of the momentum, gradient added, scaled, added to the parameter: 40 bytes a number, and 16 of copies. Multi-tensor
    kernels take dense tensors alone; without them each operation is a launch a tensor. Restoring is one launch that ends at
    once.
    """
    tensors, numbers = parameters(model)
    together = max(-(-tensors // MULTI_TENSORS), -(-numbers // (MULTI_CHUNKS * CHUNK)))
    return Cost(FLOAT * numbers * (10 + 4), {}, 4 * (together if dense else tensors) + 2 * together + 1)


REST: dict[str, Callable[[Model], Cost]] = {
    "statistics of norms": norms,
    "copies of factors and roots": copies,
    "gradients in stacks": gradients,
    "parameter updates": parameter_updates,
}
