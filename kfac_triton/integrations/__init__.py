"""Support for the trainers of other packages. They are imported only when a function here is called."""

from .hf import kfac_adam_factory, kfac_factory

__all__ = ["kfac_adam_factory", "kfac_factory"]
