"""Layers that K-FAC covers: one small class per module type, the registry of them, and how they fall into factors."""

from .base import Layer, Rows
from .registry import LAYER_TYPES, Choice, find_layers, register, weights_of

__all__ = ["LAYER_TYPES", "Choice", "Layer", "Rows", "find_layers", "register", "weights_of"]
