"""SOAP and Shampoo, which the user brings: the authors' code, imported from where it lies.

SOAP: the file `soap.py` of github.com/nikhilvyas/SOAP. Shampoo: a checkout of github.com/facebookresearch/optimizers.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

SOAP, SHAMPOO = "SOAP", "Shampoo"
_FILES = {SOAP: "soap.py", SHAMPOO: "distributed_shampoo/__init__.py"}
_paths: dict[str, Path] = {}
_modules: dict[str, ModuleType] = {}


class MissingPeerError(ValueError):
    """There is no implementation of the peer at the given place."""


def find(name: str, path: Path) -> Path:
    """The peer's file: `path` itself, or the file below the folder `path`.

    Raises:
        MissingPeerError: if there is none.
    """
    file = path / _FILES[name] if path.is_dir() else path
    if not file.is_file():
        raise MissingPeerError(f"{str(path)!r} is neither {_FILES[name]} nor a folder with it; fetch {name} and name its place")
    return file.resolve()


def use(paths: dict[str, Path]) -> None:
    """Import peers from these places from now on, in this process."""
    _paths.clear()
    _modules.clear()
    _paths.update({name: find(name, path) for name, path in paths.items()})


def places() -> dict[str, Path]:
    """Where the peers in use lie."""
    return dict(_paths)


def sources(name: str) -> str:
    """Fingerprint of a peer's code."""
    file = _paths[name]
    files = [file] if name == SOAP else sorted(file.parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def _module(name: str) -> ModuleType:
    if name not in _modules:
        file = _paths[name]
        package = file.parent.name if file.name == "__init__.py" else file.stem
        locations = [str(file.parent)] if file.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(package, file, submodule_search_locations=locations)
        assert spec is not None and spec.loader is not None
        _modules[name] = importlib.util.module_from_spec(spec)
        sys.modules[package] = _modules[name]  # a package imports its parts by its own name
        spec.loader.exec_module(_modules[name])
    return _modules[name]


def make_soap(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    """SOAP with its authors' defaults where the settings say nothing."""
    return _module(SOAP).SOAP(model.parameters(), **_pairs(settings))


def make_shampoo(model: nn.Module, betas: Sequence[float] = (0.9, 0.99), **settings: Any) -> torch.optim.Optimizer:
    """Shampoo with Adam's step length grafted on, with the same betas; otherwise its authors' defaults.

    It starts when it has seen as many gradients as a refresh of the inverse roots waits for, as it does by default.
    """
    module = _module(SHAMPOO)
    graft = module.AdamPreconditionerConfig(beta2=betas[1], epsilon=1e-8)
    every = settings.get("precondition_frequency", 1)
    return module.DistributedShampoo(
        model.parameters(), betas=tuple(betas), grafting_config=graft, start_preconditioning_step=every, **settings
    )


def _pairs(settings: dict[str, Any]) -> dict[str, Any]:
    """The log makes lists of pairs."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
