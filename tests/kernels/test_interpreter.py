"""What tests change in Triton's interpreter: kernels compute the same, and nothing stays replaced."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from kfac_triton.kernels.runtime import tl, triton


@triton.jit
def _larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def _kernel(numbers, FAILS: tl.constexpr):
    x = tl.load(numbers + tl.arange(0, 4))
    tl.static_assert(not FAILS)
    tl.store(numbers + tl.arange(0, 4), _larger(2 * x, tl.sum(x)))


def _members() -> dict[str, object]:
    return {**vars(tl), **{f"tensor.{name}": member for name, member in vars(tl.tensor).items()}}


@pytest.mark.parametrize("fails", [True, False])
def test_functions_of_the_language_are_put_back_after_a_launch(fails: bool) -> None:
    """Device functions are called, of the kernel's module and of Triton's own, and the next launch replaces all anew."""
    before, numbers = _members(), torch.tensor([0.0, 1.0, 2.0, 5.0])
    for expected in ([8.0, 8.0, 8.0, 10.0], [34.0] * 4):
        with pytest.raises(triton.runtime.errors.InterpreterError) if fails else nullcontext():
            _kernel[(1,)](numbers, fails)
        after = _members()
        assert [name for name in before if after[name] is not before[name]] == []
        assert fails or numbers.tolist() == expected
