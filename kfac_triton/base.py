"""What both faces of the engine offer: looking inside, changing settings, closing."""

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
    """What is replaced as training goes on, in one place that an optimizer shares with its wrappers.

    Wrappers of Lightning and Fabric inherit from the optimizer's class, so its methods run on them. What is read they take from
    the optimizer, but what is assigned stays with them: so methods assign attributes of this alone, after construction.

    Attributes:
        engine: statistics, factors and preconditioned gradients of the layers.
        known: the parameters that the optimizer's state belongs to.
        dropped: how many gradients of parameters that K-FAC does not cover were not finite, on the device.
        auto: with lr="auto" what chooses the steps.
    """

    engine: Engine
    known: Sequence[Tensor] = ()
    dropped: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.long))
    auto: AutoStep | None = None


class KFACBase:
    """Mixin over a run."""

    _run: Run

    @property
    def engine(self) -> Engine:
        """What takes statistics and preconditions gradients; another one as soon as other layers are covered."""
        return self._run.engine

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> copies of the bias-corrected factors (A, G).

        A is E[a a^T], the bias as last column of ones; G is E[g g^T] with g the gradient of one loss term (see `fisher`).
        A layer with channel groups has (groups, n, n) stacks; of a factor that is kept as its diagonal that is returned,
        (n,), and one that is kept in blocks is zero between them.
        """
        return self.engine.factors()

    def accumulate_fisher(self, outputs: Tensor, targets: Tensor | None = None) -> None:
        """Takes the statistics of fisher="mc" or "ggn", in extra backward passes: call it between forward and backward.

        No gradient of a parameter is touched. With fisher="empirical", or in a step that takes no statistics, it does nothing
        but check. The outputs' graph is kept; under reentrant checkpointing it cannot run (use use_reentrant=False).

        Args:
            outputs: what the loss takes first: logits, or means.
            targets: what it takes second; needed where targets decide which terms count (ignore_index, class weights).

        Raises:
            RuntimeError: if no loss was passed to the constructor, or outputs have no graph.
            TypeError: if outputs are no tensor.
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
        """Drops what backward passes left since the last step, for loops that throw gradients away.

        `KFAC.zero_grad` does so by itself; `model.zero_grad()` and another optimizer's `zero_grad` cannot.
        """
        self.engine.forget_statistics()

    def close(self) -> None:
        """Removes the hooks from the model; safe to call twice. A later step raises RuntimeError."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
