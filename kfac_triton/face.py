"""What both faces of the engine offer: looking inside, changing settings, closing."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from torch import Tensor
from typing_extensions import Self  # torch depends on it

from .diagnostics import diagnostics
from .engine import Engine


class EngineFace:
    """Mixin over an `engine` attribute."""

    engine: Engine

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Module name -> copies of the bias-corrected factors (A, G).

        A is E[a a^T], the bias as last column of ones; G is E[g g^T] with g the gradient of one loss term (see `fisher`).
        A layer with channel groups has (groups, n, n) stacks.
        """
        return self.engine.factors()

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

    def close(self) -> None:
        """Removes the hooks from the model; safe to call twice. A later step raises RuntimeError."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()
