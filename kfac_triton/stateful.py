"""What KFAC keeps: the layers that its engine covers, checkpoints, copies and pickles."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer

from . import summary
from .base import KFACBase, Run
from .engine import Engine
from .state import state_dict as checkpoint
from .state.layer_state import check_layers, export_layers, rebuild_engine, restore_layers
from .steps import param_groups
from .steps.auto import AutoStep


class StatefulKFAC(KFACBase, Optimizer):
    """The part of `KFAC` that takes no steps."""

    _model: nn.Module
    _betas: tuple[float, float]
    _is_adam: bool  # curvature="adam"
    _argument_names: ClassVar[Mapping[str, str]] = {}  # of settings that the constructor calls otherwise

    def __repr__(self) -> str:
        """The options of the groups, settings of the curvature, and how many parameters it covers; waits for no device."""
        lines = [f"{self.__class__.__name__} (", *summary.of_groups(self.param_groups)]
        run: Run | None = getattr(self, "_run", None)  # missing while the constructor runs
        if run is not None:
            lines += summary.of_curvature(run.engine, self._parameters(), self._argument_names, is_auto=run.auto is not None)
        return "\n".join([*lines, ")"])

    @property
    def is_auto(self) -> bool:
        """Whether the quadratic model chooses the steps: lr="auto"."""
        return self._run.auto is not None

    def _parameters(self) -> list[nn.Parameter]:
        return param_groups.parameters_of(self)

    def _keep_up(self) -> None:
        """Keeps up with groups or parameters that were replaced, and with a model that was moved to another device."""
        if len(self._parameters()) != len(self._run.known):  # Lightning's finetuning callback assigns groups when it resumes
            self._run.known = self._complete()
            self._cover_anew()
        self._run.known = param_groups.rekey_swapped(self, self._run.known)
        if self.engine.changed_device():
            param_groups.move_state(self)
            self._cover_anew()

    def _cover_anew(self) -> None:
        """Selects the layers again; those that were covered before keep their state."""
        run = self._run
        run.engine = rebuild_engine(self._model, run.engine, self._parameters())
        run.dropped = run.dropped.to(run.engine.bank.home)
        self._complete()
        if run.auto is not None:
            run.auto = self._auto_from(run.auto.arguments())
        checkpoint.declare_keys(self, self.engine, self.is_auto)

    def _complete(self) -> list[nn.Parameter]:
        return param_groups.complete(self, self._betas, self.engine.moved_by_averages())

    def _auto_from(self, arguments: dict[str, Any]) -> AutoStep:
        return AutoStep.from_arguments(self._model, self.engine, self._parameters(), arguments)

    def state_dict(self, *, include_factors: bool = True, include_inverses: bool = True) -> dict[str, Any]:
        """The state dict of any optimizer, with factors in the state of each covered weight (float32 for weights of 16 bits).

        Args:
            include_factors: without them factors start again after loading; steps, schedules, momentum and Adam's averages
                continue (with curvature="adam" those of parameters that K-FAC does not cover).
            include_inverses: keeps inverses, and EKFAC's moments, if a resumed run could not compute the same ones from the
                factors (inverse_every above 1, warm inverses, eigenbases). Without them the checkpoint has half the size, and
                a resumed run has fresher inverses than the uninterrupted one. With curvature="adam" it also keeps Adam's
                averages in the eigenbasis, which otherwise start again.
        """
        self._keep_up()
        checkpoint.declare_keys(self, self.engine, self.is_auto)
        extra = self._run.auto.export() if self._run.auto is not None else []
        layers = export_layers(self.engine, include_inverses) if include_factors else None
        return checkpoint.add_layer_state(super().state_dict(), self, layers, extra)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the result of `state_dict`; the next step computes inverses that are not in it from the factors.

        Raises:
            ValueError: if the state does not fit, a newer version wrote it, or a factor is not finite; nothing is changed then.
        """
        self._keep_up()
        plain, by_parameter, extra = checkpoint.take_layer_state(state_dict)
        layers = checkpoint.layer_states(self, by_parameter)
        param_groups.check_tail(self, plain)
        if self._is_adam:
            param_groups.require_adam(plain["param_groups"], "load a checkpoint of KFACAdam, or make a KFAC for this one")
        check_layers(self.engine, layers)
        if self._run.auto is not None:
            self._run.auto.restore([extra.get(i, {}) for i in range(len(self._parameters()))])
        super().load_state_dict(plain)
        if (step := checkpoint.saved_step(state_dict)) is not None:
            self.engine.resume(self.engine.progress.at_step(step))
        restore_layers(self.engine, layers)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. They include the model, so that a copy has its own layers to hook."""
        return {
            **super().__getstate__(),
            "model": self._model,
            "settings": self.engine.settings,
            "layers": export_layers(self.engine),
            "closed": self.engine.closed,
            "betas": self._betas,
            "dropped": self._run.dropped,
            "auto": self._run.auto.arguments() if self._run.auto is not None else None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copies and pickles. The base class also calls it in `load_state_dict`, with state and groups alone."""
        super().__setstate__({key: state[key] for key in ("defaults", "state", "param_groups") if key in state})
        if "model" in state:
            self._betas, self._model = state["betas"], state["model"]
            known = param_groups.parameters_of(self)
            self._is_adam = state["settings"].curvature == "adam"
            self._run = Run(Engine(self._model, state["settings"], known), known, state["dropped"])
        self._run.known = self._complete()
        if "model" in state:
            restore_layers(self.engine, state["layers"])
            if state["auto"] is not None:
                self._run.auto = self._auto_from(state["auto"])
            if state["closed"]:
                self.close()
        checkpoint.declare_keys(self, self.engine, self.is_auto)
