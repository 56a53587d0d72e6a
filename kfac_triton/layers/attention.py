"""nn.MultiheadAttention: its projections of query, key and value, and that of its output, are four Linears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Layer, Rows
from .linear import LinearLayer


@dataclass(frozen=True)
class _Place:
    """Where a projection's weight and bias are.

    Attributes:
        inside: name of the module inside that has them; "" for the attention itself.
        weight: name of the weight.
        bias: name of the bias.
        third: which third of a packed parameter is the projection's.
    """

    inside: str
    weight: str
    bias: str
    third: int = 0

    def owner(self, module: nn.Module) -> nn.Module:
        return getattr(module, self.inside) if self.inside else module


def _places(module: nn.MultiheadAttention) -> dict[str, _Place]:
    packed = module._qkv_same_embed_dim
    inputs = {x: _Place("", "in_proj_weight" if packed else f"{x}_proj_weight", "in_proj_bias", i) for i, x in enumerate("qkv")}
    return {**inputs, "out_proj": _Place("out_proj", "weight", "bias")}


class AttentionLayer(LinearLayer):
    """One projection, a block of its own: "name.q", "name.k", "name.v" and "name.out_proj".

    Packed in in_proj_weight or not, query, key and value get each an A and a G; what curvature there is between them is
    dropped, as between any two layers (Martens and Grosse 2015, section 3). Inside the forward pass positions come before
    examples, (L, N, E), whatever batch_first says. bias_k, bias_v and the zeros of add_zero_attn join behind the projections
    and are no rows of theirs.
    """

    module_type = nn.MultiheadAttention
    applies_weight_itself: ClassVar[bool] = True

    def __init__(self, name: str, module: nn.Module, weight_sharing: str, loss_terms: str, place: _Place) -> None:
        super().__init__(name, module, weight_sharing, loss_terms)
        self._place = place
        bias = place.owner(module)._parameters.get(place.bias)
        self.has_bias = bias is not None and bias.requires_grad

    @classmethod
    def cover(cls, name: str, module: nn.Module, weight_sharing: str, loss_terms: str, **options: Any) -> list[Layer]:
        """The projections whose weights are trained."""
        assert isinstance(module, nn.MultiheadAttention)
        return [
            cls(f"{name}.{part}" if name else part, module, weight_sharing, loss_terms, place)
            for part, place in _places(module).items()
            if (weight := place.owner(module)._parameters.get(place.weight)) is not None and weight.requires_grad
        ]

    @classmethod
    def weights(cls, module: nn.Module) -> list[nn.Parameter | None]:
        """Of all projections."""
        assert isinstance(module, nn.MultiheadAttention)
        return [place.owner(module)._parameters.get(place.weight) for place in _places(module).values()]

    @classmethod
    def inner(cls, module: nn.Module) -> list[nn.Module]:
        """The out_proj module holds a weight, but its forward never runs."""
        assert isinstance(module, nn.MultiheadAttention)
        return [module.out_proj]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """None if one of its weights is trained."""
        weights = [weight for weight in cls.weights(module) if weight is not None]
        if not weights:
            return "its weights are not parameters of its own (parametrized or replaced)"
        return None if any(weight.requires_grad for weight in weights) else "its weights are frozen"

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[Layer] | None:
        """A weight that another module uses is not covered."""
        return None

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the projection's weight is, or is a third of."""
        return getattr(self._place.owner(self.module), self._place.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The same of the bias."""
        return getattr(self._place.owner(self.module), self._place.bias) if self.has_bias else None

    @property
    def output_size(self) -> int:
        """The embedding dimension."""
        assert isinstance(self.module, nn.MultiheadAttention)
        return self.module.embed_dim

    def part_of(self, parameter: nn.Parameter) -> slice | None:
        """A third of what is packed."""
        if len(parameter) == self.output_size:
            return None
        return slice(self._place.third * self.output_size, (self._place.third + 1) * self.output_size)

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """From an input (L, N, in) and a gradient (L, N, E) or (L N, E)."""
        gradient = gradient.reshape(*x.shape[:2], gradient.shape[-1])
        return super().rows(x.transpose(0, 1), gradient.transpose(0, 1))

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """The projection's rows of the gradients."""
        return self._part(self.weight), None if self.bias is None else self._part(self.bias)

    def _part(self, parameter: nn.Parameter) -> Tensor | None:
        return None if parameter.grad is None else parameter.grad[self.part_of(parameter) or slice(None)]

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weight and bias with their parts, each only the rows that `part_of` names."""
        columns = self.weight.shape[1]
        update = blocks[0][: self.output_size]
        weight = (self.weight, update[:, :columns])
        return [weight] if self.bias is None else [weight, (self.bias, update[:, columns])]
