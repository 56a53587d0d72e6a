"""Normalization layers: the Fisher matrix of [scale | shift], or its diagonal, from exact per-example gradients."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.norm_fisher.reference import per_example_gradients
from ..kernels.ops import ROWS, Norm
from .base import Layer
from .rows import Rows


@dataclass(frozen=True)
class NormPass:
    """A backward pass through a norm layer, from which a kernel sums squares without making the rows.

    Attributes:
        x: input of the module.
        gradient: with respect to its output.
        norm: what was normalized.
        running: mean and variance, if these were running statistics.
        counts: rows, loss terms and examples.
    """

    x: Tensor
    gradient: Tensor
    norm: Norm
    running: tuple[Tensor, Tensor] | None
    counts: tuple[int, int, int]

    def __call__(self) -> Rows:
        """Makes the rows, of G alone."""
        mean, variance = self.running or (None, None)
        rows = per_example_gradients(self.x, self.gradient, self.norm, mean, variance)
        return Rows([], [rows], ROWS, ROWS, *self.counts)


class NormLayer(Layer):
    """Elementwise y = scale * xhat + shift.

    With g the gradient of y, the gradient of the loss of example n is

        u_n = [sum_t g_nt * xhat_nt | sum_t g_nt],    summed over positions t.

    The Fisher matrix of theta = [scale | shift] is F = E[u_n u_n^T]. It is small enough to be stored without a Kronecker
    factorization: W = theta is one column, a = 1, G = F ("full") or diag F ("diagonal"), and V = (F + damping)^-1 W.

    Xhat is recomputed from the input, because computing it from y would divide by scale, which may be zero. If loss terms are
    tokens, each position is a term: "expand" uses the gradient of each position, which is right as long as no later layer mixes
    positions; "reduce" still sums over positions.
    """

    module: Any  # of the class that `module_type` names
    diagonal_inputs = True
    diagonal_gradients = True
    constant_input = True

    def __init__(self, name: str, module: nn.Module, weight_sharing: str, loss_terms: str) -> None:
        super().__init__(name, module, weight_sharing, loss_terms)
        # The shift is a part of the only column of W. A bias would be a second column, with its own input.
        self.has_shift, self.has_bias = self.has_bias, False

    @classmethod
    def cover(cls, name: str, module: nn.Module, weight_sharing: str, loss_terms: str, **options: Any) -> list[Layer]:
        """One layer; none with norms="skip"."""
        norms = options.get("norms", "diagonal")
        if norms == "skip":
            return []
        layer = cls(name, module, weight_sharing, loss_terms)
        layer.diagonal_gradients = norms == "diagonal"
        return [layer]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """As in `Layer`, and because it has no scale."""
        if "weight" in module._parameters and module._parameters["weight"] is None:
            return "it has no scale (affine is off)"
        return super().why_not(module)

    @property
    def groups(self) -> int:
        """One block: the groups of a GroupNorm share no parameter, but they are not independent either."""
        return 1

    @property
    def input_size(self) -> int:
        """A single column, for the constant input 1."""
        return 1

    @property
    def output_size(self) -> int:
        """Number of entries of scale and shift."""
        return self.weight.numel() * (1 + self.has_shift)

    @property
    @abstractmethod
    def norm(self) -> Norm:
        """What the module normalizes, and whether positions are loss terms."""

    def running(self) -> tuple[Tensor, Tensor] | None:
        """Running mean and variance, if the module normalizes by them."""
        return None

    @property
    def by_position(self) -> bool:
        """Whether u is the gradient of a position rather than of an example."""
        return self.tokens and not self.reduce

    def positions(self, shape: torch.Size) -> int:
        """Number of examples times positions."""
        examples, positions = self.norm.counts(shape)
        return examples * positions

    @property
    def feature_dims(self) -> int | None:
        """Those that are normalized; None if channels follow the examples."""
        return None if self.norm.has_channels else self.norm.dims

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """The gradients of each example, or of each position if that is a loss term; they are made when they are needed.

        A's rows are ones, which nothing reads.
        """
        norm = self.norm
        examples, positions = norm.counts(x.shape)
        count = examples * positions if norm.by_position else examples
        counts = count, examples * positions if self.tokens else examples, examples
        one = NormPass(x, gradient, norm, self.running(), counts)
        if torch.compiler.is_compiling() or not self.diagonal_gradients:
            return one()
        return Rows([x], [gradient], ROWS, ROWS, *counts, make=one)

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of [scale | shift] as a column, with zeros for a shift without one (which was frozen since)."""
        scale = self.weight.grad
        if scale is None:
            return None, None
        if not self.has_shift:
            return scale.reshape(-1, 1), None
        shift = torch.zeros_like(scale) if self.module.bias.grad is None else self.module.bias.grad
        return torch.cat([scale.flatten(), shift.flatten()]).unsqueeze(1), None

    def gradient_parts(self, group: int) -> list[tuple[Tensor, int, int]]:
        """Scale and shift one below the other, without a copy."""
        if self.weight.grad is None:
            return []
        gradients = [(0, self.weight.grad), (self.weight.numel(), self.module.bias.grad if self.has_shift else None)]
        return [(gradient.reshape(-1, 1), row, 0) for row, gradient in gradients if gradient is not None]

    def parameters(self) -> list[nn.Parameter]:
        """Scale and shift."""
        return [self.weight, self.module.bias] if self.has_shift else [self.weight]

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Scale and shift with their parts of the column."""
        pieces = blocks[0][: self.output_size, 0].split(self.weight.numel())
        return [(p, piece.view(p.shape)) for p, piece in zip(self.parameters(), pieces, strict=True)]


class LayerNormLayer(NormLayer):
    """nn.LayerNorm: the last dimensions, those of the scale, belong to one position."""

    module_type: type[nn.Module] = nn.LayerNorm

    @property
    def norm(self) -> Norm:
        """(x - mean) / sqrt(var + eps) of each position."""
        module = self.module
        return Norm("layer", module.eps, self.has_shift, self.by_position, dims=len(module.normalized_shape))


class RMSNormLayer(LayerNormLayer):
    """nn.RMSNorm."""

    module_type: type[nn.Module] = nn.RMSNorm

    @property
    def norm(self) -> Norm:
        """X / sqrt(mean(x^2) + eps). If eps is None, torch takes that of the dtype it computes in, which here is that of x."""
        module = self.module
        return Norm("rms", module.eps, self.has_shift, self.by_position, dims=len(module.normalized_shape))


class BatchNormLayer(NormLayer):
    """nn.BatchNorm1d, 2d and 3d. The statistics of the batch are taken as constant.

    Then u_n is the exact gradient of the loss of example n if no BatchNorm comes later. A gradient that comes back through
    another BatchNorm has parts from the losses of other examples, here as in every layer before it.
    """

    module_type = nn.modules.batchnorm._BatchNorm

    @property
    def norm(self) -> Norm:
        """(x - mean) / sqrt(var + eps) of each channel, of the batch."""
        return Norm("batch", self.module.eps, self.has_shift, self.by_position)

    def running(self) -> tuple[Tensor, Tensor] | None:
        """In evaluation, unless the module keeps none."""
        module = self.module
        mean, variance = module.running_mean, module.running_var
        return None if module.training or mean is None or variance is None else (mean, variance)


class GroupNormLayer(NormLayer):
    """nn.GroupNorm."""

    module_type = nn.GroupNorm

    @property
    def norm(self) -> Norm:
        """(x - mean) / sqrt(var + eps) of each group of channels of an example."""
        return Norm("group", self.module.eps, self.has_shift, self.by_position, groups=self.module.num_groups)
