"""KFACPreconditioner: K-FAC in front of any optimizer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from . import validation
from .base import KFACBase, Run
from .engine import EAGER, Engine
from .settings import Settings
from .state.layer_state import check_layers, export_layers, rebuild_engine, restore_layers
from .state.state_dict import FORMAT, require_readable
from .state.transaction import transaction


class KFACPreconditioner(KFACBase):
    """Replaces gradients by preconditioned ones, for another optimizer to use.

    Either call `precondition_()` between backward and the optimizer's step, or `attach(optimizer)` once.

    Args:
        model: the module to train.
        lr: learning rate for the KL clip of parameters that no attached optimizer has; others take that of their group.
        settings: curvature settings by name: the arguments of `KFAC` from `damping` on.

    Raises:
        TypeError: if an argument has the wrong type or an unknown name.
        ValueError: if an argument is outside its range, curvature is "adam", or the model has no layer that K-FAC covers.

    Examples:
        >>> import torch
        >>> from kfac_triton import KFACPreconditioner
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> preconditioner = KFACPreconditioner(model, damping=0.1)
        >>> handle = preconditioner.attach(optimizer)
        >>> model(torch.randn(8, 4)).square().mean().backward()
        >>> optimizer.step()
        >>> preconditioner.close()
    """

    def __init__(self, model: nn.Module, *, lr: float = 0.1, **settings: Any) -> None:
        self.lr = validation.real("lr", lr)
        checked = Settings(**settings)
        if checked.curvature == "adam":
            raise ValueError(
                "curvature must be 'kfac' or 'ekfac' for KFACPreconditioner, but is 'adam', whose directions have the length "
                "of a step of Adam beside plain gradients of what is not covered: use KFACAdam, which moves both by Adam"
            )
        self._run = Run(Engine(model, checked))
        self._model = model
        # A weak reference: the optimizer's hook holds the preconditioner, and both should be freed with the optimizer.
        self._attached: list[tuple[weakref.ref[Optimizer], RemovableHandle]] = []

    @torch.compiler.disable(reason=EAGER)
    def precondition_(self) -> None:
        """Overwrites the gradients of covered layers, in place, with the KL-clipped preconditioned ones.

        A layer whose gradient has a NaN or Inf gets zeros. Its parameters may still move, by the optimizer's momentum and
        weight decay, unlike with `KFAC`. Gradients of parameters that K-FAC does not cover are not changed.

        Raises:
            RuntimeError: if the preconditioner is closed.
        """
        rates: dict[nn.Parameter, float | Tensor] = {
            p: group["lr"] for optimizer in self._optimizers() for group in optimizer.param_groups for p in group["params"]
        }
        if self.engine.changed_device():
            self._cover_anew()
        with transaction(self.engine):
            for parameter, update in self.engine.precondition(lambda p: rates.get(p, self.lr)).items():
                assert parameter.grad is not None
                parameter.grad.zero_() if update is None else parameter.grad.copy_(update)
        if self.engine.has_unfrozen():
            self._cover_anew()

    def _cover_anew(self) -> None:
        """Selects the layers again, on their current device; those that were covered before keep their state."""
        self._run.engine = rebuild_engine(self._model, self.engine, None)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Preconditions at the start of every step of the optimizer, from now on.

        If a step has a closure, it is called first and the optimizer gets its result. So optimizers that call a closure more
        than once (LBFGS) cannot be preconditioned in this way. With `torch.amp.GradScaler`, gradients are unscaled before
        they are preconditioned, and nothing happens in a step that the scaler skips.

        Returns:
            A handle; its remove() detaches.

        Raises:
            TypeError: if optimizer is not a torch.optim.Optimizer, or is LBFGS.
        """
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError("optimizer must call its closure once in a step, but is LBFGS, which calls it many times")
        handle = optimizer.register_step_pre_hook(self._before_step)
        self._attached.append((weakref.ref(optimizer), handle))
        return handle

    def state_dict(self, *, include_inverses: bool = True) -> dict[str, Any]:
        """Factors and inverses as plain tensors by module name; see `KFAC.state_dict` for include_inverses."""
        return {
            "kfac_format": FORMAT,
            "kfac_steps": self.engine.progress.steps,
            "layers": export_layers(self.engine, include_inverses),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`; layers that are not in it keep their factors.

        Raises:
            ValueError: if a newer version wrote it, it does not fit, or it is not finite; nothing is changed then.
        """
        if missing := {"kfac_format", "kfac_steps", "layers"} - state_dict.keys():
            raise ValueError(f"state_dict must be that of a KFACPreconditioner, but has no {', '.join(sorted(missing))}")
        require_readable(int(state_dict["kfac_format"]))
        check_layers(self.engine, state_dict["layers"])
        self.engine.resume(self.engine.progress.at_step(int(state_dict["kfac_steps"])))
        restore_layers(self.engine, state_dict["layers"])

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. They include the model and the attached optimizers."""
        return {
            "lr": self.lr,
            "model": self._model,
            "settings": self.engine.settings,
            "layers": export_layers(self.engine),
            "attached": self._optimizers(),
            "closed": self.engine.closed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.lr, self._model, self._attached = state["lr"], state["model"], []
        self._run = Run(Engine(self._model, state["settings"]))
        restore_layers(self.engine, state["layers"])
        for optimizer in state["attached"]:
            self.attach(optimizer)
        if state["closed"]:
            self.close()

    def close(self) -> None:
        """Removes the hooks from the model and from attached optimizers; safe to call twice."""
        for _, handle in self._attached:
            handle.remove()
        self._attached.clear()
        super().close()

    def _optimizers(self) -> list[Optimizer]:
        """The attached optimizers that still exist."""
        return [optimizer for reference, _ in self._attached if (optimizer := reference()) is not None]

    @torch.compiler.disable(reason=EAGER)
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # This hook runs before the step calls the closure, when there are no gradients yet. So it calls the closure itself.
        closure: Callable[[], Any] | None = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self.precondition_()
            return None
        try:
            with torch.enable_grad():
                loss = closure()
        except BaseException:
            # The gradients will be cleared by the other optimizer's zero_grad, which keeps statistics.
            self.engine.forget_statistics()
            raise
        self.precondition_()
        return (optimizer,), {"closure": lambda: loss}
