"""Defaults in the API reference as values: `KFAC` and `KFACAdam` take those of the curvature from `Settings`."""

from __future__ import annotations

from typing import Any

import griffe


class Defaults(griffe.Extension):
    """Puts the value in the place of `Settings.name`."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Called once a package is read."""
        if pkg.name != "kfac_triton":
            return
        settings = pkg["settings.Settings"]
        for optimizer in ("optimizer.KFAC", "adam.KFACAdam"):
            for parameter in pkg[f"{optimizer}.__init__"].parameters:
                owner, _, name = str(parameter.default).partition(".")
                if owner == settings.name:
                    parameter.default = settings[name].value
