"""Whole optimizer steps: time, memory and floating-point operations."""
