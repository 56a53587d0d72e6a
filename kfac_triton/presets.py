"""Settings to begin with, for three kinds of networks, each where it was found to train well."""

from __future__ import annotations

from typing import Any

from . import validation

# An AdamW tail needs no KL clip, and norms train better along their gradient.
_ADAMW = {"momentum": 0.0, "tail": "adamw", "betas": (0.8, 0.9), "kl_clip": None, "norms": "skip", "inverse_every": 2}

PRESETS: dict[str, dict[str, Any]] = {
    # A few dense layers, a smooth loss, batches of hundreds: fresh curvature, and the quadratic model takes the steps.
    "small": {"lr": "auto", "fisher": "mc", "damping": 0.1, "ema_decay": 0.9},
    # Convolutions and BatchNorm.
    "conv": {**_ADAMW, "lr": 0.03, "damping": 0.05, "ema_decay": 0.9},
    # Tokens: low damping pays. For runs of thousands of steps longer averages will, too: betas and ema_decay nearer to 1.
    "transformer": {**_ADAMW, "lr": 6e-3, "damping": 1e-3, "ema_decay": 0.8},
}


def preset(name: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `KFAC` for a kind of network, for a cross entropy; see docs/curvature.md for where they come from.

        KFAC(model, **preset("transformer", loss_terms="tokens", skip="positions"))

    Args:
        name: "small", "conv" or "transformer".
        changes: arguments that replace the preset's, or come beside them.

    Raises:
        ValueError: if there is no such preset.
    """
    return PRESETS[validation.choice("name", name, tuple(PRESETS))] | changes
