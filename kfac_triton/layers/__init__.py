"""Layers that K-FAC covers: adapters for module types, their registry, and the division into blocks, parts and tiles."""

from .base import Layer
from .registry import LAYER_TYPES, BatchDim, Choice, find_layers, register, weights_of
from .rows import Rows, meeting_all

__all__ = ["LAYER_TYPES", "BatchDim", "Choice", "Layer", "Rows", "find_layers", "meeting_all", "register", "weights_of"]
