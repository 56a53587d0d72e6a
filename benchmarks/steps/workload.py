"""What the step of a model consists of: its layers with their factors, and what is switched on. See `step_model`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product

from benchmarks.kernels.cost import FLOAT
from benchmarks.kernels.shapes import Layer, Model, padded

from .step_constants import AFTER, BEFORE, Refreshes

DENSE_UP_TO = 8192  # the default of max_factor_size: of larger factors the diagonal alone is kept


@dataclass(frozen=True)
class Options:
    """What is switched on.

    Attributes:
        free_scale: the scale of a Newton step from sums; the power iteration beyond it, spread over the grid above side 1,024.
        tf32: preconditioning by the library's TF32 products.
        dense: updates without gaps, which multi-tensor kernels take.
        stats_fraction: of the rows.
        fused_norms: the statistics of all norms in two or three launches, from one reading.
        kept_in_kernels: old roots and factors are kept by the kernels that overwrite them, and not by copies.
        grouped: one launch of each kernel of the refresh for all sides, with the power iteration in the first step alone; one
            of the covariance for many layers of a pass, whose rows wait for each other; one to blend the factors of all sides.
        fused_updates: gradients are gathered, multiplied and scattered, and parameters moved, by one launch each.
        without_gather: G of convolutions, and A of those with 1 x 1 kernels, are read as they lie.
        in_panels: products with large roots skip most of their zeros, see `kernels.precondition.library`.
        no_idle_writes: the last Newton step of a matrix does not write what only another step would read.
        largest: side of a dense factor; larger ones are divided into blocks. None: see `DENSE_UP_TO`.
    """

    free_scale: bool = False
    tf32: bool = False
    dense: bool = False
    stats_fraction: float = 1.0
    fused_norms: bool = False
    kept_in_kernels: bool = False
    grouped: bool = False
    fused_updates: bool = False
    without_gather: bool = False
    in_panels: bool = False
    no_idle_writes: bool = False
    largest: int | None = None


def parts(side: int, bias: bool, unit: int, options: Options) -> list[int]:
    """Sides of the dense factors that one side of a weight is divided into, as `layers.partition` does; none if diagonal."""
    largest = options.largest
    if largest is None or side <= largest:
        return [side] if side <= DENSE_UP_TO else []
    units = (side - bias) // unit
    count = -(-units * unit // ((largest - bias) // unit * unit))
    ends = [units * i // count * unit for i in range(count)] + [side]
    return [end - start for start, end in pairwise(ends)]


def sampled(layer: Layer, fraction: float) -> Layer:
    """A layer with a fraction of its rows, or of its images."""
    layer = replace(layer, rows=math.ceil(layer.rows * fraction))
    images = layer.images
    return replace(layer, images=replace(images, batch=math.ceil(images.batch * fraction))) if images else layer


@dataclass(frozen=True)
class Divided:
    """A layer with the sides of its dense factors."""

    layer: Layer
    a: list[int]
    g: list[int]

    def is_deferred(self, itemsize: int, fraction: float) -> bool:
        """As `data_movement.is_deferred`, of blocks; no side may be diagonal."""
        layer = sampled(self.layer, fraction)
        sums = FLOAT * sum(padded(side) ** 2 for side in self.a + self.g)
        inputs = (
            layer.images.batch * layer.images.channels * layer.images.side**2 if layer.images else layer.rows * layer.inputs
        )
        return bool(self.a and self.g) and itemsize * (inputs + layer.rows * layer.outputs) <= sums

    def tiles(self) -> Iterator[tuple[int, int]]:
        """Shapes (m, n) of the parts of the gradient, with the sides of their factors; zero for a diagonal."""
        return product(self.g or [0], self.a or [0])


@dataclass(frozen=True)
class Workload:
    """A model's step with some options.

    Attributes:
        model: what is trained.
        options: what is switched on.
        in_graph: whether a CUDA graph of the step is replayed, which has more steps of a refresh.
    """

    model: Model
    options: Options
    in_graph: bool = False

    @cached_property
    def layers(self) -> list[Divided]:
        """All layers with their factors."""
        result = []
        for layer in self.model.layers:
            unit = layer.images.kernel**2 if layer.images else 1
            a, g = parts(layer.a_side, layer.bias, unit, self.options), parts(layer.g_side, False, 1, self.options)
            result.append(Divided(layer, a, g))
        return result

    @cached_property
    def stacks(self) -> dict[int, int]:
        """Padded side -> number of factors."""
        sides: Counter[int] = Counter()
        for x in self.layers:
            for side in x.a + x.g:
                sides[padded(side)] += x.layer.count
        return dict(sides)

    @cached_property
    def waiting(self) -> list[Divided]:
        """Layers whose rows wait for the step."""
        return [x for x in self.layers if x.is_deferred(self.model.itemsize, self.options.stats_fraction)]

    @property
    def summed(self) -> list[Divided]:
        """Layers whose rows are summed in the backward pass."""
        return [x for x in self.layers if x not in self.waiting]

    @property
    def shapes(self) -> set[tuple[int, int]]:
        """Padded shapes of gradients."""
        return {(padded(m), padded(n)) for x in self.layers for m, n in x.tiles()}

    @property
    def norms(self) -> Model:
        """The model with as many positions in its norms as statistics are taken of."""
        fraction = self.options.stats_fraction
        return replace(
            self.model, norms=tuple(replace(n, positions=math.ceil(n.positions * fraction)) for n in self.model.norms)
        )

    @property
    def norm_count(self) -> int:
        """How many norms there are."""
        return sum(norm.count for norm in self.model.norms)

    @property
    def refreshes(self) -> Refreshes:
        """What a refresh takes."""
        return AFTER if self.options.free_scale else BEFORE
