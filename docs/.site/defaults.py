"""Defaults in the API reference as values: `KFAC` takes those of the curvature from `Settings`."""

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
        for parameter in pkg["optimizer.KFAC.__init__"].parameters:
            owner, _, name = str(parameter.default).partition(".")
            if owner == settings.name:
                parameter.default = settings[name].value
