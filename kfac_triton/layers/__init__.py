"""Layers that K-FAC covers: an adapter for each module type, their registry, and how weights are divided into blocks and parts."""

from .base import Layer, Rows
from .registry import LAYER_TYPES, Choice, find_layers, register, weights_of

__all__ = ["LAYER_TYPES", "Choice", "Layer", "Rows", "find_layers", "register", "weights_of"]
