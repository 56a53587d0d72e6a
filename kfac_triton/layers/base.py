"""What K-FAC needs to know about a layer: the rows of A, the rows of G, and its weight as matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..kernels import ops
from .rows import Rows


class Layer(ABC):
    """One module that K-FAC covers: y = W a with W = [weight | bias], with a pair of factors for each channel group.

    A is the second moment of a (with a last entry 1 for the bias), G that of the gradient with respect to y. An adapter for
    your own module type needs `module_type` and `rows`; the defaults fit any module with a weight (out, ...) and a bias (out,).

    Attributes:
        module_type: the module class, or classes, that the adapter is for.
        diagonal_inputs: whether only the diagonal of A is kept.
        diagonal_gradients: whether only the diagonal of G is kept.
        constant_input: whether a is 1, and G (the Fisher matrix itself) takes all of the damping.
        autocasts: whether the module's forward is one operation that autocast runs in low precision.
        weight_is_transposed: whether the module stores W^T: a weight (in, out).
        can_be_tied: whether modules of this type that share a weight are one that is called several times; not inherited.
        applies_weight_itself: whether the module's forward applies the weight by `F.linear`, so that no module's hook sees it.
        modules: those that share the weight, usually one.
        groups: number of channel groups; each is a block with its own factor pair.
        samples_tokens: whether stats_fraction="auto" takes a part of the tokens. (An embedding would miss rare words.)
        output_parts: the number of parts of equal size that G is divided into along its diagonal.
        batch_dim: the dimension of the module's input that counts examples.
    """

    module_type: type[nn.Module] | tuple[type[nn.Module], ...]
    diagonal_inputs: ClassVar[bool] = False
    diagonal_gradients: bool = False
    constant_input: ClassVar[bool] = False
    autocasts: ClassVar[bool] = False
    weight_is_transposed: ClassVar[bool] = False
    can_be_tied: ClassVar[bool] = False
    applies_weight_itself: ClassVar[bool] = False
    samples_tokens: ClassVar[bool] = False
    output_parts: int = 1
    batch_dim: int = 0

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "output_blocks" in vars(cls):  # which would be ignored
            raise TypeError(f"{cls.__name__}.output_blocks is called output_parts now; rename it")

    def __init__(self, name: str, module: nn.Module, weight_sharing: str, loss_terms: str) -> None:
        self.name = name
        self.module = module
        self.modules = [module]
        self.reduce = weight_sharing == "reduce"
        self.tokens = loss_terms == "tokens"
        # Decided once, because the size of a factor cannot change. If the bias is frozen later, its column is not used.
        bias = module._parameters.get("bias")
        self.has_bias: bool = bias is not None and bias.requires_grad

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        """Whether a module is of this type. A derived class with another forward may compute something else, and is not."""
        kinds = cls.module_type if isinstance(cls.module_type, tuple) else (cls.module_type,)
        return any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)

    @classmethod
    def cover(cls, name: str, module: nn.Module, weight_sharing: str, loss_terms: str, **options: Any) -> list[Layer]:
        """The layers that a module consists of: one, unless it has several weights.

        Args:
            name: of the module.
            module: the module.
            weight_sharing: "expand" or "reduce".
            loss_terms: "examples" or "tokens".
            options: settings for some adapters: `norms`.
        """
        return [cls(name, module, weight_sharing, loss_terms)]

    @classmethod
    def weights(cls, module: nn.Module) -> list[nn.Parameter | None]:
        """The weights of a module. No other module may use them, unless the adapter can tie them."""
        return [module._parameters.get("weight")]

    @classmethod
    def inner(cls, module: nn.Module) -> list[nn.Module]:
        """Submodules that the adapter handles, whether it covers their weights or not."""
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
        own = vars(cls).get("can_be_tied", False)  # what holds for the base class's modules need not hold for another type
        same = own and all(type(module) is cls.module_type and cls.why_not(module) is None for module in modules)
        return cls if same else None

    def share(self, modules: list[nn.Module]) -> None:
        """Records the modules that share the weight. A bias that they do not share is not covered."""
        self.modules = modules
        self.has_bias &= len({id(module._parameters.get("bias")) for module in modules}) == 1

    @property
    def weight(self) -> nn.Parameter:
        """Looked up each time: parameter objects may be replaced (FSDP2, load with assign)."""
        weight = self.module._parameters.get("weight")  # several times faster than as an attribute
        return self.module.weight if weight is None else weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias if K-FAC covers it."""
        if not self.has_bias:
            return None
        bias = self.module._parameters.get("bias")
        return self.module.bias if bias is None else bias  # type: ignore[return-value]

    @property
    def groups(self) -> int:
        """Independent blocks of the layer, each with its own factor pair."""
        return int(getattr(self.module, "groups", 1))

    @property
    def input_size(self) -> int:
        """Columns of W and side of A, of one group, including the bias."""
        return (len(self.weight) if self.weight_is_transposed else self.weight[0].numel()) + self.has_bias

    @property
    def output_size(self) -> int:
        """Rows of W and side of G, of one group."""
        return self.weight.shape[int(self.weight_is_transposed)] // self.groups

    @property
    def input_unit(self) -> int:
        """Adjacent columns of W that stay in one part: the kernel elements of one channel of a convolution."""
        return 1

    @property
    def unbatched_dim(self) -> int:
        """Number of dimensions of an input that is a single example without a batch dimension; -1 if there is no such input."""
        return -1

    def positions(self, shape: torch.Size) -> int:
        """Number of examples and positions in an output of the module, of this shape."""
        return shape[:-1].numel()

    @property
    def feature_dims(self) -> int | None:
        """The number of last dimensions of the input that one position has; None if dimension 0 always counts examples."""
        return 1

    def dim_of_examples(self, x: Tensor) -> int:
        """The dimension of an input that counts examples: `batch_dim`, or 0 if the input has too few dimensions for that."""
        features = self.feature_dims if self.batch_dim else None
        return self.batch_dim if features is not None and self.batch_dim < x.dim() - features else 0

    def rows_of_pass(self, x: Tensor, gradient: Tensor) -> Rows:
        """The rows of the module's input and the gradient with respect to its output, wherever their examples are."""
        if self.batch_dim and (dim := self.dim_of_examples(x)):
            x, gradient = x.movedim(dim, 0), gradient.movedim(dim, 0)
        return self.rows(x, gradient)

    @abstractmethod
    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Rows of A and G from the module's input and the gradient with respect to its output, with examples in dimension 0."""

    def make_rows(
        self,
        inputs: list[Tensor],
        gradients: list[Tensor],
        examples: int,
        positions: int,
        input_window: ops.Window = ops.ROWS,
        gradient_window: ops.Window = ops.ROWS,
        outer: int = 1,
    ) -> Rows:
        """Rows and their counts, for a weight that each example applies at several positions (Eschenhagen et al. 2023)."""
        count = examples if self.reduce else examples * positions
        terms = examples * positions if self.tokens else examples
        return Rows(inputs, gradients, input_window, gradient_window, count, terms, examples, outer=outer)

    def uses_weight_transposed(self, use: int) -> bool:
        """Whether the module with this number applies the transposed weight. Its statistics are summed separately."""
        return False

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of one group in the layout of W: of the weight (rows, ...) and of the bias (rows,)."""
        weight, bias = self.weight.grad, self.bias
        return (
            None if weight is None else self.to_matrix(weight, group),
            None if bias is None or bias.grad is None else bias.grad[self._rows_of(bias, group)],
        )

    def gradient_parts(self, group: int) -> list[tuple[Tensor, int, int]]:
        """What `gradient` returns, as matrices with the row and column of W where each begins: views, if possible."""
        weight, bias = self.gradient(group)
        if weight is None:
            return []
        parts = [(weight.flatten(1), 0, 0)]
        return parts if bias is None else [*parts, (bias[:, None], 0, parts[0][0].shape[1])]

    def parameters(self) -> list[nn.Parameter]:
        """Those that `read_update` returns."""
        weight, bias = self.weight, self.bias
        return [weight] if bias is None else [weight, bias]

    def to_matrix(self, stored: Tensor, group: int) -> Tensor:
        """The rows of W of one group, from a tensor in the layout of the weight."""
        return (stored.T if self.weight_is_transposed else stored)[self._rows_of(self.weight, group)]

    def from_matrix(self, rows: Tensor) -> Tensor:
        """The opposite: rows of W of all groups, without the bias column, in the layout of the weight."""
        return rows.T if self.weight_is_transposed else rows.reshape(len(rows), *self.weight.shape[1:])

    def part_of(self, parameter: nn.Parameter) -> slice | None:
        """The layer's rows of a parameter, if other layers have the remaining ones."""
        return None

    def _rows_of(self, parameter: nn.Parameter, group: int) -> slice:
        size = self.output_size
        return self.part_of(parameter) or slice(group * size, (group + 1) * size)

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weight and bias with their preconditioned gradients, from a matrix V for each group, which may be padded."""
        columns = self.input_size - self.has_bias
        parts = [block[: self.output_size, : self.input_size] for block in blocks]
        update = parts[0] if len(parts) == 1 else torch.cat(parts)
        result = [(self.weight, self.from_matrix(update[:, :columns]))]
        if self.bias is not None:
            result.append((self.bias, update[:, columns]))
        return result
