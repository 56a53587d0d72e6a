"""Kronecker factors, their damped inverses and eigenbases, and the gradients that they precondition."""
