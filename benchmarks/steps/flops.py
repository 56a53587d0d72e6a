"""Counted floor of one K-FAC training step, in floating point operations (a multiply-add counts as two).

Only matrix products and factorizations are counted. Elementwise work, patch extraction and copies are left out: memory
limits them, not arithmetic. So a step can be slower than its count suggests, and never faster by the same algorithm. Another
algorithm may need less: G^-1 g^T (x A^-1), for instance, where a batch has fewer rows than both factors.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

# Tridiagonal reduction, its eigenvectors and the back-transformation: an estimate, for it depends on the input.
EIGH_CUBES = 9.0
LU_INVERSE_CUBES = 2.0
CHOLESKY_INVERSE_CUBES = 1.0 / 3.0 + 2.0 / 3.0

PEER_METHODS = ("eigen", "inverse")


@dataclass(frozen=True)
class LayerShape:
    """What one layer multiplies: `rows` vectors of length `inputs` by an (outputs, inputs) weight.

    Attributes:
        rows: examples times positions.
        inputs: columns of the weight, without the bias.
        outputs: rows of the weight.
        bias: whether there is a bias, which adds a column of ones to A.
        input_gradient: whether backward also needs the gradient with respect to the layer's input.
    """

    rows: int
    inputs: int
    outputs: int
    bias: bool
    input_gradient: bool

    @property
    def a_size(self) -> int:
        """Size of A."""
        return self.inputs + self.bias

    @property
    def g_size(self) -> int:
        """Size of G."""
        return self.outputs


@dataclass(frozen=True)
class StepCost:
    """Operations of one training step, each part averaged over the steps of its interval."""

    forward: float = 0.0
    backward: float = 0.0
    statistics: float = 0.0
    inverses: float = 0.0
    preconditioning: float = 0.0

    @property
    def total(self) -> float:
        """All parts together."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: StepCost) -> StepCost:
        return StepCost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def layer_shapes(model: nn.Module, batch: Tensor) -> list[LayerShape]:
    """The shapes of every Linear and Conv2d of `model`, in the order of a forward pass on `batch`.

    Args:
        model: the model; a module that is called twice is listed twice.
        batch: an input of the model.

    Raises:
        NotImplementedError: if a convolution is grouped.
    """
    shapes: list[LayerShape] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear | nn.Conv2d)
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            raise NotImplementedError(f"grouped convolutions are not counted, but groups={module.groups}")
        outputs = module.weight.shape[0]
        shapes.append(
            LayerShape(
                rows=output.numel() // outputs,
                inputs=module.weight[0].numel(),
                outputs=outputs,
                bias=module.bias is not None,
                input_gradient=args[0].requires_grad,
            )
        )

    handles = [module.register_forward_hook(record) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    # With gradients on, `requires_grad` of a layer's input says whether backward has to go through the layer.
    try:
        with torch.enable_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return shapes


def _training(shape: LayerShape) -> StepCost:
    product = 2.0 * shape.rows * shape.inputs * shape.outputs
    return StepCost(forward=product, backward=product * (1 + shape.input_gradient))


def _preconditioning(shape: LayerShape) -> float:
    m, n = shape.g_size, shape.a_size
    return 2.0 * m * m * n + 2.0 * m * n * n


def sgd_cost(shapes: list[LayerShape]) -> StepCost:
    """Forward and backward alone."""
    return sum((_training(shape) for shape in shapes), StepCost())


def kfac_cost(shapes: list[LayerShape], statistics_every: int = 1, inverse_every: int = 1) -> StepCost:
    """The floor of a K-FAC step: triangles of A and G, Cholesky inverses, and the two products of G^-1 W A^-1.

    Args:
        shapes: the layers, from `layer_shapes`.
        statistics_every: steps between updates of A and G.
        inverse_every: steps between inversions.
    """
    cost = sgd_cost(shapes)
    for shape in shapes:
        for size in (shape.a_size, shape.g_size):
            cost += StepCost(
                statistics=shape.rows * size * (size + 1.0) / statistics_every,
                inverses=CHOLESKY_INVERSE_CUBES * size**3 / inverse_every,
            )
        cost += StepCost(preconditioning=_preconditioning(shape))
    return cost


def peer_cost(shapes: list[LayerShape], method: str = "eigen", statistics_every: int = 1, inverse_every: int = 1) -> StepCost:
    """The same count for kfac-pytorch: statistics as full products, and eigenvectors or LU inverses.

    Args:
        shapes: the layers, from `layer_shapes`.
        method: "eigen" (eigendecompositions, four products per layer) or "inverse" (LU, two products). An
            eigendecomposition is estimated at `EIGH_CUBES` n^3.
        statistics_every: steps between updates of A and G.
        inverse_every: steps between decompositions.

    Raises:
        ValueError: if `method` is neither.
    """
    if method not in PEER_METHODS:
        raise ValueError(f"method must be one of {PEER_METHODS}, but is {method!r}")
    cubes, products = (EIGH_CUBES, 2.0) if method == "eigen" else (LU_INVERSE_CUBES, 1.0)
    cost = sgd_cost(shapes)
    for shape in shapes:
        for size in (shape.a_size, shape.g_size):
            cost += StepCost(
                statistics=2.0 * shape.rows * size**2 / statistics_every,
                inverses=cubes * size**3 / inverse_every,
            )
        cost += StepCost(preconditioning=products * _preconditioning(shape))
    return cost
