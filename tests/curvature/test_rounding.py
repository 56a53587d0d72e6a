"""Rounding at random, of moving averages that are kept in 16 bits."""

from __future__ import annotations

import torch

from kfac_triton.curvature.factor_stack import FactorStack

LAST_DIGIT = 2.0**-7  # of bfloat16 between 1 and 2


def test_every_number_of_an_average_moves_although_its_steps_are_small() -> None:
    """512 steps of an eighth of the last digit: 0.5 in all, with a standard deviation of 0.058 a number."""
    stack = FactorStack([16] * 4, torch.float32, torch.device("cpu"), is_compact=True)
    ones = torch.ones(4)
    stack.store(torch.ones(4, 16, 16))
    for step in range(512):
        stack.sums.fill_(LAST_DIGIT / 8)
        stack.blend(ones, ones, ones.bool(), step, "torch")
        stack.old = None
    assert (stack.factors - 1.5).abs().max() < 0.35
    assert abs(stack.factors.mean() - 1.5) < 0.02


def test_a_step_is_rounded_by_numbers_of_its_own_and_always_the_same() -> None:
    found = []
    for step in (3, 4, 3):
        torch.rand(1)  # the program's numbers do not matter
        stack = FactorStack([16], torch.float32, torch.device("cpu"), is_compact=True)
        stack.store(torch.full((1, 16, 16), 1 + LAST_DIGIT / 2), step)
        found.append(stack.factors)
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
