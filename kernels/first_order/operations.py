"""A step of SGD or AdamW with checked arguments.

Only a step calls it, which torch.compile never traces, so it is no operator of `torch.library`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import require, require_vector
from ..runtime import choose
from .launch import Launch, can_use
from .reference import move_reference
from .rule import Rule


def move(
    parameters: list[Tensor],
    gradients: list[Tensor],
    moments: list[list[Tensor]],
    steps: list[Tensor],
    rate: Tensor,
    finite: Tensor,
    rule: Rule,
    backend: str = "auto",
) -> None:
    """One step of SGD or AdamW for parameters whose flag says that their gradient is finite; nothing of the others changes.

    Args:
        parameters: moved in place.
        gradients: one for each parameter.
        moments: for AdamW means and squares, for SGD with momentum its buffers, changed in place; one for each parameter.
        steps: the counter of each parameter, a float32 scalar on its device, counted up.
        rate: learning rate, float64 (1,).
        finite: bool (parameters,).
        rule: SGD or AdamW, and its options.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if lists or flags do not fit, or backend is "triton" and no kernel can serve the call.
    """
    require(
        len(moments) == rule.moments and all(len(x) == len(parameters) for x in (gradients, steps, *moments)),
        f"gradients, steps and {rule.moments} lists of moments must have {len(parameters)} tensors, as parameters",
    )
    if not parameters:
        return
    device = parameters[0].device
    require_vector("finite", finite, len(parameters), device)
    require_vector("rate", rate, 1, device)
    require(rate.dtype == torch.float64, f"rate must be float64, but is {rate.dtype}")
    for i, step in enumerate(steps):
        if step.device != device:
            raise ValueError(f"steps[{i}] must be on {device}, but is on {step.device}")
    arguments = parameters, gradients, moments, steps, rate, finite, rule
    if choose("move", backend, device, lambda: can_use(*arguments)):
        Launch(*arguments).run()
    else:
        move_reference(*arguments)
