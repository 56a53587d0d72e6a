"""Defaults in the API reference as values: `KFAC` and `KFACAdam` take those of the curvature from `Settings`."""

from __future__ import annotations

from typing import Any

import griffe

from kfac_triton.settings import Settings

OPTIMIZERS = ("optimizer.KFAC", "adam.KFACAdam")


class Defaults(griffe.Extension):
    """Puts the value in the place of `Settings.name`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once a package is read."""
        if pkg.name != "kfac_triton":
            return
        for optimizer in OPTIMIZERS:
            for parameter in pkg[f"{optimizer}.__init__"].parameters:
                owner, _dot, name = str(parameter.default).partition(".")
                if owner == Settings.__name__:
                    # Not from the source, where it is an argument of `field`.
                    parameter.default = repr(getattr(Settings, name))
