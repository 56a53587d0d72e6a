"""What K-FAC needs to know of a layer: the rows of A, the rows of G, and its weight as matrices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Rows:
    """What one backward pass through a layer adds to its factors.

    Attributes:
        inputs: per group the rows of A, as `kernels.ops.covariance_ema` takes them.
        gradients: per group the rows of G.
        input_window: how to read rows from each entry of inputs.
        gradient_window: the same for gradients.
        input_count: rows of A in this pass: examples times positions (expand) or examples (reduce).
        terms: loss terms in this pass, the number that a mean loss divides by.
    """

    inputs: list[Tensor]
    gradients: list[Tensor]
    input_window: tuple[int, ...]
    gradient_window: tuple[int, ...]
    input_count: int
    terms: int

    @property
    def windows(self) -> list[int]:
        """Windows of inputs, then of gradients, as `kernels.ops.covariance_ema` takes them."""
        return list(self.input_window * len(self.inputs) + self.gradient_window * len(self.gradients))


class Layer(ABC):
    """One module that K-FAC covers: y = W a with W = [weight | bias], a factor pair per group.

    A is the covariance of a (with a last 1 for the bias), G that of the gradient with respect to y.
    """

    module_type: type[nn.Module]

    def __init__(self, name: str, module: nn.Module, weight_sharing: str, loss_terms: str) -> None:
        self.name = name
        self.module = module
        self.reduce = weight_sharing == "reduce"
        self.tokens = loss_terms == "tokens"
        # Decided once: a factor's size cannot follow a bias that is frozen later; its column then just has no use.
        bias = module._parameters.get("bias")
        self.has_bias: bool = bias is not None and bias.requires_grad

    @property
    def weight(self) -> nn.Parameter:
        """Looked up anew each time: parameter objects may be swapped (FSDP2, load with assign)."""
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
        return self.weight[0].numel() + self.has_bias

    @property
    def output_size(self) -> int:
        """Rows of W and side of G, of one group."""
        return self.weight.shape[0] // self.groups

    @abstractmethod
    def rows(self, x: Tensor, gradient: Tensor) -> Rows:
        """Rows of A and G from the module's input and the gradient with respect to its output."""

    def gradient(self, group: int) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of weight and bias of one group, where they are."""
        rows = slice(group * self.output_size, (group + 1) * self.output_size)
        weight, bias = self.weight.grad, None if self.bias is None else self.bias.grad
        return None if weight is None else weight[rows], None if bias is None else bias[rows]

    def read_update(self, blocks: list[Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
        """Weight and bias with their parts of the preconditioned gradient, from one block (or wider) a group."""
        columns = self.input_size - self.has_bias
        parts = [block[: self.output_size, : self.input_size] for block in blocks]
        update = parts[0] if len(parts) == 1 else torch.cat(parts)
        result = [(self.weight, update[:, :columns].reshape(self.weight.shape))]
        if self.bias is not None:
            result.append((self.bias, update[:, columns]))
        return result
