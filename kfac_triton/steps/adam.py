"""Settings of a run whose covered parameters move by Adam in the eigenbasis (curvature="adam")."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..curvature.eigen_adam import AdamOptions
from ..settings import Settings


def adam_settings(settings: Settings) -> Settings:
    """Without a KL clip: Adam's directions have a length of their own."""
    return dataclasses.replace(settings, kl_clip=None)


def adam_options(group: dict[str, Any]) -> AdamOptions:
    """The options of a parameter group that Adam's directions depend on."""
    beta1, beta2 = group["betas"]
    return AdamOptions(beta1, beta2, group["eps"], group["nesterov"])
