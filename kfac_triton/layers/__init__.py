"""Layers that K-FAC covers: adapters for module types, their registry, and the division into blocks, parts and tiles."""

from .base import Layer, Rows, meeting_all
from .registry import LAYER_TYPES, BatchDim, Choice, find_layers, register, weights_of

__all__ = ["LAYER_TYPES", "BatchDim", "Choice", "Layer", "Rows", "find_layers", "meeting_all", "register", "weights_of"]
