"""nn.MultiheadAttention: the projections of query, key, value and output are four linear layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from .base import Layer
from .linear import LinearLayer
from .rows import Rows


@dataclass(frozen=True)
class _Place:
    """Where a projection's weight and bias are stored.

    Attributes:
        inside: name of the submodule that has them; "" for the attention module itself.
        weight: name of the weight.
        bias: name of the bias.
        third: the third of a packed parameter that belongs to the projection.
    """

    inside: str
    weight: str
    bias: str
    third: int = 0

    def owner(self, module: nn.Module) -> nn.Module:
        return getattr(module, self.inside) if self.inside else module


def _places(module: nn.Module) -> dict[str, _Place]:
    packed = module._qkv_same_embed_dim
    inputs = {x: _Place("", "in_proj_weight" if packed else f"{x}_proj_weight", "in_proj_bias", i) for i, x in enumerate("qkv")}
    return {**inputs, "out_proj": _Place("out_proj", "weight", "bias")}


class AttentionLayer(LinearLayer):
    """One projection, which is a block of its own: "name.q", "name.k", "name.v" or "name.out_proj".

    Query, key and value each have an A and a G, whether their weights are packed in in_proj_weight or not. The curvature
    between them is ignored, as between any two layers (Martens and Grosse 2015, section 3). Inside the forward pass positions
    come before examples, (L, N, E), for either value of batch_first. bias_k, bias_v and the zeros of add_zero_attn are
    appended after the projections, so they are not among their rows.
    """

    module: nn.MultiheadAttention
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
        return [
            cls(f"{name}.{part}" if name else part, module, weight_sharing, loss_terms, place)
            for part, place in _places(module).items()
            if (weight := place.owner(module)._parameters.get(place.weight)) is not None and weight.requires_grad
        ]

    @classmethod
    def weights(cls, module: nn.Module) -> list[nn.Parameter | None]:
        """Those of all projections."""
        return [place.owner(module)._parameters.get(place.weight) for place in _places(module).values()]

    @classmethod
    def inner(cls, module: nn.Module) -> list[nn.Module]:
        """The module out_proj has a weight, but its forward never runs."""
        return [module.get_submodule("out_proj")]

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why none of its projections can be covered; None if one of them can be."""
        weights = [weight for weight in cls.weights(module) if weight is not None]
        if not weights:
            return "its weights are not parameters of its own (parametrized or replaced)"
        return None if any(weight.requires_grad for weight in weights) else "its weights are frozen"

    @property
    def weight(self) -> nn.Parameter:
        """The projection's weight, or the packed parameter that contains it."""
        return getattr(self._place.owner(self.module), self._place.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The projection's bias, or the packed parameter that contains it."""
        return getattr(self._place.owner(self.module), self._place.bias) if self.has_bias else None

    @property
    def feature_dims(self) -> int | None:
        """None: the forward pass brings queries, keys and values into one layout."""
        return None

    @property
    def output_size(self) -> int:
        """The embedding dimension."""
        return self.module.embed_dim

    @property
    def unbatched_dim(self) -> int:
        """Inside of the forward pass there is always a batch dimension; see `capture.attention`."""
        return -1

    def part_of(self, parameter: nn.Parameter) -> slice | None:
        """The projection's third of a packed parameter."""
        if len(parameter) == self.output_size:
            return None
        return slice(self._place.third * self.output_size, (self._place.third + 1) * self.output_size)

    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """From an input (L, N, in) and a gradient (L, N, E) or (L N, E)."""
        gradient = gradient.reshape(*x.shape[:2], gradient.shape[-1])
        return super().rows(x.transpose(0, 1), gradient.transpose(0, 1))
