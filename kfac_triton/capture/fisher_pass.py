"""Extra backward passes for the statistics of the true Fisher matrix or the generalized Gauss-Newton matrix."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..fisher.likelihood import Likelihood
from .calls import BY_LIKELIHOOD, Call
from .gate import MOST_PASSES, Gate


class FisherPass:
    """Extra backward passes that add statistics and do not change the gradients of parameters.

    Args:
        likelihood: the distribution that the outputs parametrize.
        kind: "mc" or "ggn".
        samples: number of labels that "mc" draws for each loss term.
        gate: the state that the engine's hooks share.
    """

    def __init__(self, likelihood: Likelihood, kind: str, samples: int, gate: Gate) -> None:
        self._likelihood, self._kind, self._samples, self._gate = likelihood, kind, samples, gate

    @property
    def may_leave_out(self) -> bool:
        """Whether labels may leave out terms of the loss."""
        return type(self._likelihood).left_out is not Likelihood.left_out

    def run(self, outputs: Tensor, targets: Tensor | None, scale: float | Tensor) -> None:
        """Runs the backward passes; the graph of outputs is kept for the loss.

        Args:
            outputs: those of the model, with their graph.
            targets: those of the loss, if they decide which terms count.
            scale: the loss scale, so that 16-bit gradients do not underflow.

        Raises:
            RuntimeError: if outputs do not depend on the model's parameters.
        """
        if not outputs.requires_grad:
            raise RuntimeError(
                "outputs have no graph: run the forward pass with gradients enabled, and pass its result without detach()"
            )
        gate = self._gate
        terms = self._likelihood.terms(outputs, targets)
        left_out = self._likelihood.left_out(outputs, targets)
        try:
            call = Call(terms, BY_LIKELIHOOD)
            if left_out is not None and gate.may_leave_out:
                gate.leave_out(call, left_out, self._likelihood.terms_per_example(outputs) == 1)
            gate.records, gate.saw_loss = True, False
            gate.whole = call
            if self._kind == "ggn" and gate.has_mask(call):
                self._add_inputs(outputs, left_out, scale)
            gate.weight.fill_(1.0)
            gate.compiled_terms.copy_(terms) if isinstance(terms, Tensor) else gate.compiled_terms.fill_(terms)
            for number, vector in enumerate(self._vectors(outputs, targets), 1):
                gate.compiled_pass.fill_(number % MOST_PASSES)
                torch.autograd.grad(outputs, [gate.probe], vector * scale, retain_graph=True, allow_unused=True)
                if self._kind == "ggn":  # all columns together make one set of terms
                    gate.counts_terms = False
                    gate.compiled_terms.zero_()
        finally:
            gate.records, gate.counts_terms, gate.adds_gradients, gate.whole = False, True, True, None
            gate.compiled_pass.zero_()
            gate.compiled_rows_out.zero_()
            gate.weight.zero_()
            gate.compiled_terms.zero_()

    def _add_inputs(self, outputs: Tensor, left_out: Tensor | None, scale: float | Tensor) -> None:
        """A backward pass that adds to A alone, the rows that carry a loss: those that depend on a term of it.

        The gradient of one column may be zero for another reason: a class whose logit is minus infinity. So this pass sends
        other numbers backward, the same in every step, without a pattern that a layer could cancel (as one does that subtracts
        the mean of the outputs). Compiled passes add nothing here: they add A with every column, its rows with a gradient.
        """
        gate = self._gate
        vector = torch.arange(outputs.numel(), device=outputs.device, dtype=torch.float32).cos_().view(outputs.shape)
        if left_out is not None:
            vector = vector.masked_fill_(left_out, 0.0)
        gate.adds_gradients = False
        torch.autograd.grad(outputs, [gate.probe], vector.to(outputs.dtype) * scale, retain_graph=True, allow_unused=True)
        gate.counts_terms, gate.adds_gradients = False, True

    def _vectors(self, outputs: Tensor, targets: Tensor | None) -> Iterator[Tensor]:
        if self._kind == "mc":
            for _ in range(self._samples):
                yield self._likelihood.sample(outputs, targets)
            return
        # If an example has several loss terms, one backward pass contains a column for each. With random signs the products of
        # two terms (which attention mixes) vanish in expectation. With one term per example, signs make no difference.
        several = self._likelihood.terms_per_example(outputs) > 1
        shape = self._likelihood.term_shape(outputs)
        for column in self._likelihood.columns(outputs, targets):
            if several:
                column = column * torch.randint(0, 2, shape, device=column.device).mul_(2).sub_(1).to(column.dtype)
            yield column
