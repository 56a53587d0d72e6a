"""A step of orthogonal iteration with checked arguments.

Only a step calls it, which torch.compile never traces, so it is no operator of `torch.library`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import require, require_like, require_stack, require_vector
from ..operators import on_device
from ..runtime import choose
from .launch import can_use, launch
from .reference import orthogonal_iteration_reference


def orthogonal_iteration(
    factors: list[Tensor],
    bases: list[Tensor],
    residuals: list[Tensor],
    refused: list[Tensor],
    shift: float = 1e-3,
    rescue_shift: float = 1.0,
    max_steps: int = 9,
    accept: float = 0.1,
    backend: str = "auto",
) -> None:
    """One step of orthogonal iteration in place, Q <- the Q factor of (A + s I) Q with R's diagonal positive.

    Lists have an entry for each stack. The stacks may be of different sizes: one call serves them all. The kernels never make
    the host wait.

    Args:
        factors: A, symmetric positive semidefinite stacks (B, n, n), fp32 or fp64. They may be padded with zeros.
        bases: Q, orthonormal columns, (B, n, n). They stay as they are where a factor is zero or not finite, and where one is
            refused. The identity in the padding stays exactly that.
        residuals: output (B,): ||Q^T Q - I||_F of the basis that is in `bases` afterwards, measured. That of a new one is at
            most 1e-4 in float32.
        refused: output (B,), bool: neither shift led to an orthonormal basis. It needs another way to compute one: always
            refused, a basis would never change again.
        shift: s in units of A's mean diagonal entry, padding included; positive.
        rescue_shift: that of a second attempt, for matrices with which the first one fails. The larger, the easier, and
            the slower the basis turns.
        max_steps: largest number of Newton steps for either root.
        accept: largest ||Q^T Q - I||_F after these that is corrected; it decides when an attempt has failed.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes, dtypes or devices disagree, a number is out of range, or backend is "triton" and no kernel can
            serve the call.
    """
    count = len(factors)
    require(
        len(bases) == len(residuals) == len(refused) == count,
        f"factors, bases, residuals and refused must describe the same number of stacks, but have {count}, {len(bases)}, "
        f"{len(residuals)} and {len(refused)}",
    )
    require(shift > 0 and rescue_shift > 0, f"shift and rescue_shift must be positive, but are {shift} and {rescue_shift}")
    require(max_steps >= 1, f"max_steps must be at least 1, but is {max_steps}")
    require(0 < accept <= 0.1, f"accept must be positive and at most 0.1, but is {accept}")
    for i, factor in enumerate(factors):
        require_stack(f"factors[{i}]", factor)
        if factor.dtype != factors[0].dtype or factor.device != factors[0].device:
            raise ValueError(
                f"factors[{i}] must have dtype {factors[0].dtype} and device {factors[0].device}, as all factors, but has "
                f"{factor.dtype} and {factor.device}"
            )
        require_like(f"bases[{i}]", bases[i], tuple(factor.shape), factor)
        require_like(f"residuals[{i}]", residuals[i], (factor.shape[0],), factor)
        require_vector(f"refused[{i}]", refused[i], factor.shape[0], factor.device)
        require(refused[i].dtype == torch.bool, f"refused[{i}] must be torch.bool, but is {refused[i].dtype}")
    if not factors:
        return
    arguments = factors, bases, residuals, refused, shift, rescue_shift, max_steps, accept
    device = factors[0].device
    if choose("orthogonal_iteration", backend, device, lambda: can_use(*arguments)):
        with on_device(device):
            launch(*arguments)
    else:
        orthogonal_iteration_reference(*arguments)
