"""KFACAdam: Adam in the eigenbasis of K-FAC's factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from . import validation
from .optimizer import KFAC
from .settings import Settings

_NO_DAMPING = "its steps have no damping and no KL clip: leave it out, or use KFAC"
_OTHERS = {
    "ema_decay": "write factor_decay",
    "inverse_every": "write refresh_every",
    "warmup": "write refresh_warmup",
    "inverse": "it follows eigenvectors, and computes no inverses: see refresh",
    "inverse_tolerance": "it follows eigenvectors, and computes no inverses: see refresh",
    "momentum": "write betas=(momentum, ...)",
    "tail": "it is the rule itself",
    "curvature": "use KFAC for others",
    "exact_damping": _NO_DAMPING,
    "damping": _NO_DAMPING,
    "damping_every": _NO_DAMPING,
    "damping_range": _NO_DAMPING,
    "kl_clip": _NO_DAMPING,
}


_STATISTICS_EVERY = 5  # with all rows this costs as much as a fifth of the rows in every step, and hooks rest in between
_NAMES = {"factor_decay": "ema_decay", "refresh_every": "inverse_every", "refresh_warmup": "warmup"}  # those of the settings


def _refuse_others(settings: dict[str, Any]) -> None:
    for name in settings:
        if name in _OTHERS:
            raise TypeError(f"{name} is not an argument of KFACAdam; {_OTHERS[name]}")


class KFACAdam(KFAC):
    r"""Adam in the eigenbasis of K-FAC's factors.

    A layer with the weight matrix W = [weight | bias] has the factors A = E[a a^T] of its inputs and G = E[g g^T] of the
    gradients of its outputs, both exponential moving averages, with eigenvectors Q_A and Q_G. With R = Q_G^T dW Q_A

        M <- b1 M + (1 - b1) R,    V <- b2 V + (1 - b2) R^2,    N = b1 M / (1 - b1^t) + (1 - b1) R
        W <- (1 - lr wd) W - lr Q_G [N / (sqrt(D) + eps)] Q_A^T

    where R^2, the square root and the quotient are those of the elements, and D is V / (1 - b2^t) plus a share of the means of
    its rows and columns: the noise damping. The share is min(1, c n / rows) for a side with n eigenvectors, where `rows` is the
    number of rows (examples, tokens, positions) that the moving average of its factor stands for. The scales of the factors and
    of the loss drop out, so there is no damping and no KL clip, and a number of loss terms that is the same in every step need
    not be known. The learning rate is that of an Adam step: about the size of the change of an element.

    A factor of which only the diagonal is stored (the tokens of an embedding, a side larger than `max_factor_size`) has the
    identity as its basis. Norms and parameters of no layer move by the same Adam in their own coordinates, without noise
    damping, and so do modules that `skip` names. So do biases, too: the last column of W is part of the geometry, but its
    update is not taken (see `bias`). No schedule is needed, but a cosine with 5 % warm-up trains better, as with AdamW. See
    docs/adam.md.

    Args:
        model: the module to train.
        params: parameters or parameter groups to optimize, as for any optimizer; None takes all trainable ones. Each group
            may set its own lr, betas, eps, weight_decay and nesterov. The betas, eps and nesterov of a layer are those of its
            weight's group; lr and weight_decay of each parameter those of its own.
        lr: learning rate: a number, or a tensor with one element.
        betas: decay of M and of V, b1 and b2.
        eps: added to the root of D; the unit is that of a gradient.
        weight_decay: wd, decoupled weight decay (Loshchilov and Hutter 2019).
        nesterov: whether N looks ahead; without it N = M / (1 - b1^t).
        refresh_every: steps between refreshes of the eigenvectors: a number, or a function of the step.
        refresh_warmup: number of steps at the start in which statistics are taken and eigenvectors refreshed every time
            (`KFAC`'s warmup).
        statistics_every: steps between statistics: a number, or a function of the step; None is 5, or `refresh_every` where
            that is smaller.
        stats_fraction: largest part of the rows (tokens, images) to take statistics of: see `KFAC`.
        factor_decay: decay of the factors' moving averages, which are bias-corrected (`KFAC`'s ema_decay).
        noise_damping: c; 0 for none.
        bias: "separate" moves biases by Adam in their own coordinates, "joint" along the last column of the update of W. On an
            autoencoder with saturating units, joint biases made training much slower.
        refresh: how eigenvectors are refreshed: by one step of orthogonal iteration, with "qr" or with "products" (matrix
            products alone, for GPUs), or by "eigh"; "auto" is products on a GPU and QR elsewhere. The first eigenvectors of a
            factor are always computed by eigh.
        settings: further arguments of `KFAC` by name: `fisher`, `loss`, `loss_terms`, `loss_scale`, `max_factor_size`,
            `oversize`, `skip`, `foreach`, `maximize`, `capturable`, `backend` and others. `norms` is "skip" by default.

    Raises:
        TypeError: if an argument has the wrong type or an unknown name, or is about damping, inverses or the KL clip.
        ValueError: if an argument is outside its range, or the model has no layer that K-FAC covers.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from kfac_triton import KFACAdam
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> optimizer = KFACAdam(model, lr=0.016)
        >>> x, y = torch.randn(16, 4), torch.randint(2, (16,))
        >>> loss = nn.functional.cross_entropy(model(x), y)
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.close()
    """

    _argument_names: ClassVar[Mapping[str, str]] = {name: argument for argument, name in _NAMES.items()}

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float | Tensor = 0.016,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        nesterov: bool = True,
        refresh_every: Any = 10,
        refresh_warmup: int = 100,
        statistics_every: Any = None,
        stats_fraction: float | str = 1.0,
        factor_decay: float = Settings.ema_decay,
        noise_damping: float = Settings.noise_damping,
        bias: str = "separate",
        refresh: str = Settings.refresh,
        **settings: Any,
    ) -> None:
        _refuse_others(settings)
        first = refresh_every(0) if callable(refresh_every) else refresh_every
        validation.whole("refresh_every", first)
        validation.whole("refresh_warmup", refresh_warmup, low=0)
        validation.real("factor_decay", factor_decay, high=1.0)
        if statistics_every is None:
            statistics_every = _STATISTICS_EVERY if callable(refresh_every) else min(_STATISTICS_EVERY, refresh_every)
        settings.setdefault("norms", "skip")
        super().__init__(
            model, params, lr=lr, momentum=0.0, nesterov=nesterov, weight_decay=weight_decay, tail="adamw", betas=betas,
            eps=eps, kl_clip=None, ema_decay=factor_decay, statistics_every=statistics_every, inverse_every=refresh_every,
            warmup=refresh_warmup, stats_fraction=stats_fraction, curvature="adam", noise_damping=noise_damping, bias=bias,
            refresh=refresh, **settings,
        )  # fmt: skip

    def change(self, **settings: Any) -> None:
        """Changes settings between steps, for example `change(refresh_every=20)`; see `KFAC.change`.

        Raises:
            TypeError: if a name is unknown, fixed at construction, or a value has the wrong type.
            ValueError: if a value is outside its range. Nothing is changed then.
        """
        _refuse_others(settings)
        super().change(**{_NAMES.get(name, name): value for name, value in settings.items()})
