"""Benchmarks of the kernels, of whole steps, and of convergence; README.md has the results."""
