"""Hooks that take inputs and output gradients of the layers, and the sums that they make of them."""
