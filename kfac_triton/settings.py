"""The settings of the curvature, which are checked whenever they are created or changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch import Tensor
from torch.amp import GradScaler

from . import validation
from .kernels.runtime import BACKENDS

LOSS_REDUCTIONS = ("mean", "sum")
LOSS_TERMS = ("auto", "examples", "tokens")
BIASES = ("joint", "separate")
REFRESHES = ("auto", "qr", "products", "eigh")
METHODS = ("auto", "newton_schulz", "factored", "cholesky", "eigh")
ROWS = ("auto", "all", "nonzero")
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
    "rows",
    "stats_fraction",
    "max_stats_tokens",
    "max_kept_bytes",
)

Schedule = float | Callable[[int], float]


def _checked_by(check: Callable[..., Any], *, or_none: bool = False, **bounds: Any) -> dict[str, Any]:
    """Metadata of a field whose values have to pass `check(name, value, **bounds)`, or may be None."""
    return {"check": check, "or_none": or_none, "bounds": bounds}  # torch.compile cannot trace a functools.partial


def _choice(*options: str) -> Any:
    """A setting with one of these strings; the first one is the default."""
    return field(default=options[0], metadata=_checked_by(validation.choice, options=options))


def _require_patterns(name: str, value: Any) -> None:
    if callable(value) or isinstance(value, str):
        return
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"{name} must be a pattern, a list of patterns or a function of name and module, but is {value!r}")


def _require_terms(name: str, value: Any) -> None:
    if isinstance(value, str):
        validation.choice(name, value, LOSS_TERMS)
    elif not callable(value):
        try:
            validation.real(name, value, open_low=True)
        except TypeError:
            raise TypeError(
                f"{name} must be one of {', '.join(LOSS_TERMS)}, a number, or a function of a call's args, kwargs and output, "
                f"but is {value!r}"
            ) from None


def _require_fraction(name: str, value: Any) -> None:
    if value == "auto":
        return
    if isinstance(value, str):
        raise ValueError(f"{name} must be 'auto' or a number, but is {value!r}")
    if validation.real(name, value, open_low=True) > 1:
        raise ValueError(f"{name} must be at most 1, but is {value}")


def _require_batch_dim(name: str, value: Any) -> None:
    if callable(value):
        return
    wanted = f"{name} must be 0, 1 for sequence-first inputs (T, B, n), or a function of name and module"
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{wanted}, but is {value!r} ({type(value).__name__})")
    if value < 0:
        raise ValueError(f"{wanted}, but is {value}; count dimensions from the front")


def _require_split(name: str, value: Any) -> None:
    if not isinstance(value, dict) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f"{name} must be a dict of patterns and numbers of blocks, but is {value!r}")
    for pattern, count in value.items():
        validation.whole(f"{name}[{pattern!r}]", count)


@dataclass(frozen=True)
class Settings:
    """Settings of the curvature; see `KFAC` for their meaning.

    Raises:
        TypeError: if a value has the wrong type.
        ValueError: if a value is outside its range.
    """

    damping: Schedule = 3e-2
    kl_clip: float | None = field(default=1e-3, metadata=_checked_by(validation.real, or_none=True, open_low=True))
    ema_decay: float = field(default=0.95, metadata=_checked_by(validation.real, high=1.0))
    statistics_every: int | Callable[[int], int] = 1
    inverse_every: int | Callable[[int], int] = 1
    warmup: int = field(default=0, metadata=_checked_by(validation.whole, low=0))
    fisher: str = _choice("empirical", "mc", "ggn")
    fisher_samples: int = field(default=1, metadata=_checked_by(validation.whole))
    loss: Any = None
    curvature: str = _choice("kfac", "ekfac", "adam")
    exact_damping: bool = field(default=False, metadata=_checked_by(validation.flag))
    weight_sharing: str = _choice("expand", "reduce")
    bias: str = _choice(*BIASES)
    noise_damping: float = field(default=0.3, metadata=_checked_by(validation.real))
    refresh: str = _choice(*REFRESHES)
    inverse: str = _choice(*METHODS)
    inverse_tolerance: float = field(default=0.05, metadata=_checked_by(validation.real, high=0.3, open_low=True))
    loss_reduction: str = _choice(*LOSS_REDUCTIONS)
    loss_terms: Any = field(default="auto", metadata=_checked_by(_require_terms))
    calls: str = _choice("accumulated", "joint", "separate")
    batch_dim: Any = field(default=0, metadata=_checked_by(_require_batch_dim))
    loss_scale: Any = 1.0
    rows: str = _choice(*ROWS)
    stats_fraction: float | str = field(default="auto", metadata=_checked_by(_require_fraction))
    max_stats_tokens: int | None = field(default=None, metadata=_checked_by(validation.whole, or_none=True))
    max_kept_bytes: int = field(default=1 << 28, metadata=_checked_by(validation.whole, low=0))
    max_factor_size: int | None = field(default=8192, metadata=_checked_by(validation.whole, or_none=True))
    oversize: str = _choice(*OVERSIZE)
    factor_dtype: str = _choice("float32", "bfloat16")
    norms: str = _choice("diagonal", "full", "skip")
    skip: Any = field(default=(), metadata=_checked_by(_require_patterns))
    include: Any = field(default="*", metadata=_checked_by(_require_patterns))
    split: dict[str, int] | None = field(default=None, metadata=_checked_by(_require_split, or_none=True))
    capturable: bool = field(default=False, metadata=_checked_by(validation.flag))
    backend: str = _choice(*BACKENDS)

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, check = getattr(self, setting.name), setting.metadata.get("check")
            if check is not None and not (value is None and setting.metadata["or_none"]):
                check(setting.name, value, **setting.metadata["bounds"])
        self.damping_at(0)
        self.interval_at("statistics_every", 0)
        self.interval_at("inverse_every", 0)
        if self.loss is None and self.fisher != "empirical":
            raise ValueError(
                f"fisher is {self.fisher!r}, which needs the distribution that the model's outputs parametrize (logits): pass "
                "loss=nn.CrossEntropyLoss() or the loss that you train with, and call accumulate_fisher(outputs, targets) "
                "between forward and backward"
            )
        if self.bias == "separate" and self.curvature != "adam":
            raise ValueError(
                f"bias is 'separate', for which curvature must be 'adam', but is {self.curvature!r}: elsewhere a bias moves "
                "with its layer's matrix"
            )
        if self.curvature == "adam" and self.exact_damping:
            raise ValueError("curvature is 'adam', which has no damping: exact_damping must be False, but is True")
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
            if self.curvature == "adam" and name in ("damping", "kl_clip"):
                raise TypeError(f"{name} has no effect with curvature='adam', which has no damping and no KL clip")
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
        for name in ("inverse_every", "statistics_every"):
            if getattr(self, name) != 1:
                shown = "refresh_every" if name == "inverse_every" and self.curvature == "adam" else name
                raise ValueError(f"capturable is True, so {shown} must be 1, but is {getattr(self, name)!r}")
        if callable(self.damping):
            raise ValueError("capturable is True, so damping must be a number, but is a function of the step")
        if callable(self.loss_scale) and self.scaler is None:
            raise ValueError("capturable is True, so loss_scale must be a number or a GradScaler, but is a function")
        if self.curvature == "ekfac" or self.exact_damping:
            raise ValueError(
                "capturable is True, so curvature must be 'kfac' or 'adam', without exact_damping: the host waits for bases"
            )
        if self.curvature == "adam" and self.refresh not in ("auto", "products"):
            raise ValueError(
                f"capturable is True, so refresh must be 'products', but is {self.refresh!r}: the host waits for it"
            )
        if self.factor_dtype != "float32":
            raise ValueError(f"capturable is True, so factor_dtype must be 'float32', but is {self.factor_dtype!r}")

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
