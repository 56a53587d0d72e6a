"""The settings of the curvature, which are checked whenever they are created or changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from . import validation
from .kernels.runtime import BACKENDS

WEIGHT_SHARING = ("expand", "reduce")
CURVATURES = ("kfac", "ekfac")
FACTOR_DTYPES = ("float32", "bfloat16")
NORMS = ("diagonal", "full", "skip")
FISHERS = ("empirical", "mc", "ggn")
LOSS_REDUCTIONS = ("mean", "sum")
LOSS_TERMS = ("examples", "tokens")
METHODS = ("auto", "newton_schulz", "factored", "cholesky", "eigh")
OVERSIZE = ("diagonal", "block")

# An engine reads these in every step. It is constructed for the values of the others.
CHANGEABLE = (
    "damping",
    "kl_clip",
    "ema_decay",
    "statistics_every",
    "inverse_every",
    "warmup",
    "loss_reduction",
    "loss_scale",
    "stats_fraction",
    "max_stats_tokens",
)

Schedule = float | Callable[[int], float]


@dataclass(frozen=True)
class Settings:
    """Settings of the curvature; see `KFAC` for their meaning.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is outside its range.
    """

    damping: Schedule = 3e-2
    kl_clip: float | None = 1e-3
    ema_decay: float = 0.95
    statistics_every: int | Callable[[int], int] = 1
    inverse_every: int | Callable[[int], int] = 1
    warmup: int = 0
    fisher: str = "empirical"
    fisher_samples: int = 1
    loss: Any = None
    curvature: str = "kfac"
    exact_damping: bool = False
    weight_sharing: str = "expand"
    inverse: str = "auto"
    inverse_tolerance: float = 0.05
    loss_reduction: str = "mean"
    loss_terms: str = "examples"
    loss_scale: Any = 1.0
    stats_fraction: float = 1.0
    max_stats_tokens: int | None = None
    max_factor_size: int | None = 8192
    oversize: str = "diagonal"
    factor_dtype: str = "float32"
    norms: str = "diagonal"
    skip: Any = ()
    include: Any = "*"
    split: dict[str, int] | None = None
    capturable: bool = False
    backend: str = "auto"

    def __post_init__(self) -> None:
        self.damping_at(0)
        self.interval_at("statistics_every", 0)
        self.interval_at("inverse_every", 0)
        if self.kl_clip is not None:
            validation.real("kl_clip", self.kl_clip, open_low=True)
        validation.real("ema_decay", self.ema_decay, high=1.0)
        validation.whole("warmup", self.warmup, low=0)
        validation.choice("fisher", self.fisher, FISHERS)
        validation.whole("fisher_samples", self.fisher_samples)
        if self.loss is None and self.fisher != "empirical":
            raise ValueError(
                f"fisher is {self.fisher!r}, which needs the distribution that the model's outputs parametrize (logits): pass "
                "loss=nn.CrossEntropyLoss() or the loss that you train with, and call accumulate_fisher(outputs, targets) "
                "between forward and backward"
            )
        validation.choice("curvature", self.curvature, CURVATURES)
        if not isinstance(self.exact_damping, bool):
            raise TypeError(f"exact_damping must be True or False, but is {self.exact_damping!r}")
        validation.choice("weight_sharing", self.weight_sharing, WEIGHT_SHARING)
        validation.choice("inverse", self.inverse, METHODS)
        validation.real("inverse_tolerance", self.inverse_tolerance, high=0.3, open_low=True)
        validation.choice("loss_reduction", self.loss_reduction, LOSS_REDUCTIONS)
        validation.choice("loss_terms", self.loss_terms, LOSS_TERMS)
        if validation.real("stats_fraction", self.stats_fraction, open_low=True) > 1:
            raise ValueError(f"stats_fraction must be at most 1, but is {self.stats_fraction}")
        for name in ("max_stats_tokens", "max_factor_size"):
            if getattr(self, name) is not None:
                validation.whole(name, getattr(self, name))
        validation.choice("oversize", self.oversize, OVERSIZE)
        validation.choice("factor_dtype", self.factor_dtype, FACTOR_DTYPES)
        validation.choice("norms", self.norms, NORMS)
        for name in ("skip", "include"):
            _check_choice(name, getattr(self, name))
        if self.split is not None:
            _check_split(self.split)
        validation.choice("backend", self.backend, BACKENDS)
        if not isinstance(self.capturable, bool):
            raise TypeError(f"capturable must be True or False, but is {self.capturable!r}")
        if self.capturable:
            self.require_constant()
        if not callable(self.loss_scale) and not isinstance(self.loss_scale, GradScaler):
            validation.real("loss_scale", self.loss_scale, open_low=True)

    def damping_at(self, step: int) -> float:
        """The damping in this step."""
        return validation.real("damping", self.damping(step) if callable(self.damping) else self.damping, open_low=True)

    def interval_at(self, name: str, step: int) -> int:
        """The value of `statistics_every` or `inverse_every` in this step, which is 1 during warm-up."""
        value = getattr(self, name)
        interval = validation.whole(name, value(step) if callable(value) else value)
        return 1 if step < self.warmup else interval

    def changed(self, **settings: Any) -> Settings:
        """A copy with other values for some of them.

        Raises:
            TypeError: if a name is unknown, or a setting is fixed at construction.
        """
        for name in settings:
            if name not in CHANGEABLE:
                known = name in Settings.__dataclass_fields__
                what = "is fixed at construction: make a new optimizer and load the state_dict" if known else "is not a setting"
                raise TypeError(f"{name} {what}; these can be changed: {', '.join(CHANGEABLE)}")
        return replace(self, **settings)

    def require_constant(self) -> None:
        """Refuses settings that a CUDA graph cannot repeat: every replay does the same.

        Raises:
            ValueError: if statistics or inverses are not due in every step, a value is scheduled, or the host has to wait.
        """
        for name in ("statistics_every", "inverse_every"):
            if getattr(self, name) != 1:
                raise ValueError(f"capturable is True, so {name} must be 1, but is {getattr(self, name)!r}")
        if callable(self.damping):
            raise ValueError("capturable is True, so damping must be a number, but is a function of the step")
        if callable(self.loss_scale) and self.scaler is None:
            raise ValueError("capturable is True, so loss_scale must be a number or a GradScaler, but is a function")
        if self.curvature != "kfac" or self.exact_damping:
            raise ValueError("capturable is True, so curvature must be 'kfac' without exact_damping: the host waits for bases")
        if self.factor_dtype != "float32":
            raise ValueError("capturable is True, so factor_dtype must be 'float32': stochastic rounding is not recorded")

    def is_due(self, name: str, step: int) -> bool:
        """Whether statistics are taken, or inverses computed, in this step."""
        return step % self.interval_at(name, step) == 0

    @property
    def scaler(self) -> GradScaler | None:
        """The GradScaler, if loss_scale is one or its method `get_scale`; None if there is none, or it is disabled."""
        owner = getattr(self.loss_scale, "__self__", self.loss_scale)
        return owner if isinstance(owner, GradScaler) and owner.is_enabled() else None

    def current_loss_scale(self) -> float | Tensor:
        """The loss scale of the current gradients.

        A tensor is returned as it is: reading it would make the host wait.

        Raises:
            ValueError: if the function returns something that is not a positive finite number.
        """
        if self.scaler is not None:
            scale = self.scaler._get_scale_async()  # its get_scale would wait for the device
            return self.scaler.get_scale() if scale is None else scale
        if isinstance(self.loss_scale, GradScaler):
            return 1.0
        scale = self.loss_scale() if callable(self.loss_scale) else self.loss_scale
        if isinstance(scale, Tensor):
            return scale
        return validation.real("loss_scale", scale, open_low=True)


def _check_choice(name: str, value: Any) -> None:
    if callable(value) or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"{name} must be a pattern, a list of patterns or a function of name and module, but is {value!r}")


def _check_split(value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"split must be a dict of patterns and numbers of blocks, but is {value!r}")
    for pattern, count in value.items():
        validation.whole(f"split[{pattern!r}]", count)
