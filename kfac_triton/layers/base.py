"""What K-FAC needs to know of a layer: the rows of A, the rows of G, and its weight as matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels.ops import Window


@dataclass(frozen=True)
class Rows:
    """What one backward pass through a layer adds to its factors.

    Attributes:
        inputs: per group the rows of A, as `kernels.ops.covariance_ema` takes them; a vector of whole numbers stands for
            one-hot rows (the indices of an embedding), a matrix of them for rows that are means of one-hot ones; empty where
            the input is constant.
        gradients: per group the rows of G.
        input_window: how to read rows from each entry of inputs.
        gradient_window: the same for gradients.
        input_count: rows of A in this pass: examples times positions (expand) or examples (reduce).
        terms: loss terms in this pass, the number that a mean loss divides by.
        examples: number of examples; each has equally many rows, next to each other.
        share: part of the rows that is in here, where only some are taken.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    input_window: Window
    gradient_window: Window
    input_count: int
    terms: int
    examples: int = 0
    share: float = 1.0

    @property
    def windows(self) -> list[Window]:
        """Windows of inputs, then of gradients, as `kernels.ops.covariance_ema` takes them."""
        return [self.input_window] * len(self.inputs) + [self.gradient_window] * len(self.gradients)

    def sample(self, every: int, offset: int) -> Rows:
        """One row (of a matrix) or example (of a convolution) in `every`, as views, beginning with row `offset`."""
        first = min(offset, max(0, len(self.gradients[0]) - 1)) if self.gradients else 0
        inputs = [source[first::every] for source in self.inputs]
        gradients = [source[first::every] for source in self.gradients]
        share = len(gradients[0]) / max(1, len(self.gradients[0]))
        taken = round(self.input_count * share)
        return replace(self, inputs=inputs, gradients=gradients, input_count=taken, share=share, examples=len(gradients[0]))


class Layer(ABC):
    """One module that K-FAC covers: y = W a with W = [weight | bias], a factor pair per group.

    A is the covariance of a (with a last 1 for the bias), G that of the gradient with respect to y. A module type of your
    own needs `module_type` and `rows`; the rest is right for every module with a weight (out, ...) and a bias (out,).

    Attributes:
        module_type: the module class that the adapter is for.
        diagonal_inputs: whether A is kept as its diagonal.
        diagonal_gradients: whether G is.
        constant_input: whether a is 1, and G (the Fisher matrix itself) takes all of the damping.
        autocasts: whether the module's forward is one operation that autocast runs in low precision.
        weight_is_transposed: whether the module stores W^T: a weight (in, out).
        applies_weight_itself: whether the module's forward applies the weight by `F.linear`, so that no module's hook sees it.
        modules: those that share the weight, usually one.
        output_blocks: equal blocks along its diagonal that G is cut into.
    """

    module_type: type[nn.Module]
    diagonal_inputs: ClassVar[bool] = False
    diagonal_gradients: bool = False
    constant_input: ClassVar[bool] = False
    autocasts: ClassVar[bool] = False
    weight_is_transposed: ClassVar[bool] = False
    applies_weight_itself: ClassVar[bool] = False
    output_blocks: int = 1

    def __init__(self, name: str, module: nn.Module, weight_sharing: str, loss_terms: str) -> None:
        self.name = name
        self.module = module
        self.modules = [module]
        self.reduce = weight_sharing == "reduce"
        self.tokens = loss_terms == "tokens"
        # Decided once: a factor's size cannot follow a bias that is frozen later; its column then just has no use.
        bias = module._parameters.get("bias")
        self.has_bias: bool = bias is not None and bias.requires_grad

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether a module is of this type; one derived from it that computes something else in forward is not."""
        return isinstance(module, cls.module_type) and type(module).forward is cls.module_type.forward

    @classmethod
    def cover(cls, name: str, module: nn.Module, weight_sharing: str, loss_terms: str, **options: Any) -> list[Layer]:
        """The layers that a module is made of: one, unless it holds several weights.

        Args:
            name: of the module.
            module: the module.
            weight_sharing: "expand" or "reduce".
            loss_terms: "examples" or "tokens".
            options: settings that concern some adapters: `norms`.
        """
        return [cls(name, module, weight_sharing, loss_terms)]

    @classmethod
    def weights(cls, module: nn.Module) -> list[nn.Parameter | None]:
        """The parameters of a module that no other may use, unless the adapter ties them."""
        return [module._parameters.get("weight")]

    @classmethod
    def inner(cls, module: nn.Module) -> list[nn.Module]:
        """Modules inside that the adapter answers for, whether it covers their weights or not."""
        return []

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """Why a module of this type cannot be covered; None if it can."""
        weight = module._parameters.get("weight")
        if weight is None:
            return "its weight is not a parameter of its own (parametrized or replaced)"
        return None if weight.requires_grad else "its weight is frozen"

    @classmethod
    def tie(cls, modules: list[nn.Module]) -> type[Layer] | None:
        """The adapter for modules that share one weight; None if there is none."""
        return None

    def share(self, modules: list[nn.Module]) -> None:
        """Records that these modules share the weight. A bias that they do not share is not covered."""
        self.modules = modules
        self.has_bias &= len({id(module._parameters.get("bias")) for module in modules}) == 1

    @property
    def weight(self) -> nn.Parameter:
        """Looked up each time: parameter objects may be replaced (FSDP2, load with assign)."""
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias if K-FAC covers it."""
        return self.module.bias if self.has_bias else None  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        """Independent blocks of the layer, each with its own factor pair."""
        return int(getattr(self.module, "groups", 1))

    @property
    def input_size(self) -> int:
        """Columns of W and side of A, the bias included."""
        return (len(self.weight) if self.weight_is_transposed else self.weight[0].numel()) + self.has_bias

    @property
    def output_size(self) -> int:
        """Rows of W and side of G, of one group."""
        return self.weight.shape[int(self.weight_is_transposed)] // self.groups

    @property
    def input_unit(self) -> int:
        """Columns of W that cannot be parted: the kernel elements of a convolution's channel."""
        return 1

    @abstractmethod
    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Rows of A and G from the module's input and the gradient with respect to its output."""

    def uses_weight_transposed(self, use: int) -> bool:
        """Whether the use-th module applies the weight in another way, and is summed apart."""
        return False

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of one group as they stand in W: that of the weight (rows, ...) and of the bias (rows,)."""
        rows = slice(group * self.output_size, (group + 1) * self.output_size)
        weight, bias = self.weight.grad, None if self.bias is None else self.bias.grad
        if weight is not None and self.weight_is_transposed:
            weight = weight.T
        return None if weight is None else weight[rows], None if bias is None else bias[rows]

    def part_of(self, parameter: nn.Parameter) -> slice | None:
        """The rows of a parameter that `read_update` has, where other layers have the rest."""
        return None

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weight and bias with their parts of the preconditioned gradient, from one block (or wider) a group."""
        columns = self.input_size - self.has_bias
        parts = [block[: self.output_size, : self.input_size] for block in blocks]
        update = parts[0] if len(parts) == 1 else torch.cat(parts)
        weight = update[:, :columns]
        result = [(self.weight, weight.T if self.weight_is_transposed else weight.reshape(self.weight.shape))]
        if self.bias is not None:
            result.append((self.bias, update[:, columns]))
        return result
