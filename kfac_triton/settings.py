"""The engine's settings, checked whenever they are made or changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import validation
from .fisher import LOSS_REDUCTIONS, LOSS_TERMS
from .inverse import METHODS
from .kernels.runtime import BACKENDS

WEIGHT_SHARING = ("expand", "reduce")


@dataclass(frozen=True)
class Settings:
    """Hyperparameters of the curvature; see `KFAC` for their meaning.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is outside its range.
    """

    damping: float = 3e-2
    kl_clip: float | None = 1e-3
    ema_decay: float = 0.95
    statistics_every: int = 1
    inverse_every: int = 1
    weight_sharing: str = "expand"
    inverse: str = "auto"
    inverse_tolerance: float = 0.05
    loss_reduction: str = "mean"
    loss_terms: str = "examples"
    loss_scale: Any = 1.0
    backend: str = "auto"

    def __post_init__(self) -> None:
        validation.real("damping", self.damping, open_low=True)
        if self.kl_clip is not None:
            validation.real("kl_clip", self.kl_clip, open_low=True)
        validation.real("ema_decay", self.ema_decay, high=1.0)
        validation.whole("statistics_every", self.statistics_every)
        validation.whole("inverse_every", self.inverse_every)
        validation.choice("weight_sharing", self.weight_sharing, WEIGHT_SHARING)
        validation.choice("inverse", self.inverse, METHODS)
        validation.real("inverse_tolerance", self.inverse_tolerance, high=0.3, open_low=True)
        validation.choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        validation.choice("loss_terms", self.loss_terms, LOSS_TERMS)
        validation.choice("backend", self.backend, BACKENDS)
        if not callable(self.loss_scale):
            validation.real("loss_scale", self.loss_scale, open_low=True)

    def current_loss_scale(self) -> float | Tensor:
        """The loss scale of the gradients at hand: a number, or what the callable says (`GradScaler.get_scale`).

        A tensor is taken as it is, unread: the host does not wait for it.

        Raises:
            ValueError: if the callable's answer is not a positive finite number.
        """
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        if isinstance(scale, Tensor):
            return scale
        return validation.real("loss_scale", scale, open_low=True)
