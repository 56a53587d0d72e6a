"""What KFAC and KFACPreconditioner have in common: reading factors, changing settings, closing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self  # torch depends on it

from .diagnostics import diagnostics
from .engine import Engine
from .steps.auto import AutoStep


@dataclass
class Run:
    """The parts of an optimizer that are replaced during training, in one object that it shares with its wrappers.

    The wrappers of Lightning and Fabric inherit from the optimizer's class, so its methods run on the wrapper. They read
    attributes of the optimizer, but an attribute that they assign would belong to the wrapper alone. So after construction
    methods assign only attributes of this object.

    Attributes:
        engine: takes statistics and preconditions gradients.
        known: the parameters that the optimizer's state belongs to.
        dropped: number of gradients that were not finite, of parameters that K-FAC does not cover; on the device.
        auto: with lr="auto", chooses the steps.
    """

    engine: Engine
    known: Sequence[Tensor] = ()
    dropped: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    auto: AutoStep | None = None


class KFACBase:
    """Methods that need nothing but the engine."""

    _run: Run

    @property
    def engine(self) -> Engine:
        """Takes statistics and preconditions gradients. It is replaced by a new one when the covered layers change."""
        return self._run.engine

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> copies of the bias-corrected factors (A, G).

        A is E[a a^T], where a ends with a 1 for the bias; G is E[g g^T], where g is the gradient of one loss term (see
        `fisher`). A layer with channel groups has stacks of shape (groups, n, n). A factor that is stored as a diagonal is
        returned as the vector (n,), and one that is stored in parts is zero outside of them.
        """
        return self.engine.factors()

    def accumulate_fisher(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Takes the statistics for fisher="mc" or "ggn" by extra backward passes: call it between forward and backward.

        It does not change the gradients of parameters, and keeps the graph of the outputs. With fisher="empirical", or in a
        step that takes no statistics, it only checks its arguments. It cannot run under reentrant checkpointing: pass
        use_reentrant=False there.

        Args:
            outputs: the first argument of the loss: logits, or means.
            targets: the second one; needed if targets decide which terms count (ignore_index, class weights).

        Raises:
            RuntimeError: if no loss was passed to the constructor, or outputs have no graph.
            TypeError: if outputs is not a tensor.
            ValueError: if outputs or targets do not fit the loss.
        """
        self.engine.accumulate_fisher(outputs, targets)

    def diagnostics(self) -> dict[str, Any]:
        """Numbers of the last step as a plain dict; see `kfac_triton.diagnostics.diagnostics` for the keys."""
        return diagnostics(self.engine)

    def change(self, **settings: Any) -> None:
        """Changes curvature settings between steps, for example `change(damping=0.1, inverse_every=5)`.

        Raises:
            TypeError: if a name is unknown, fixed at construction, or a value has the wrong type.
            ValueError: if a value is outside its range. Nothing is changed then.
        """
        self.engine.change(**settings)

    def paused(self) -> AbstractContextManager[None]:
        """Context in which forward passes leave no statistics (gradient penalties, saliency maps in a training loop)."""
        return self.engine.paused()

    def forget_statistics(self) -> None:
        """Drops all statistics since the last step, for loops that throw gradients away.

        `KFAC.zero_grad` calls this; `model.zero_grad()` and the `zero_grad` of another optimizer do not.
        """
        self.engine.forget_statistics()

    def close(self) -> None:
        """Removes the hooks from the model; safe to call twice. A later step raises RuntimeError."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
