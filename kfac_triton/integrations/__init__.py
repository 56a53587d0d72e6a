"""What the trainers of other packages need. Nothing here imports them before it is called."""

from .hf import kfac_factory

__all__ = ["kfac_factory"]
