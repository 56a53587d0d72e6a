"""Operations that move data or only add, over many tensors of different shapes in one launch, with checked arguments."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import require, require_digits, require_like, require_stack, require_vector
from ..operators import operator
from . import launch
from .diagonals import runs_of
from .reference import blend_reference, restore_reference, squares_reference, traces_reference


@operator(
    "Tensor[] inputs, Tensor(a!) out",
    reference=squares_reference,
    launch=launch.launch_squares,
    can_use=launch.can_use_squares,
)
def squares(inputs: list[Tensor], out: Tensor, backend: str = "auto") -> None:
    """Sum of the squares of all elements of each tensor: finite exactly when nothing in it is NaN, infinite or too large.

    Args:
        inputs: tensors of any shapes.
        out: output, (inputs,), fp32 or fp64.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if out does not fit, or backend is "triton" and no kernel can serve the call.
    """
    require_digits("out", out)
    require(tuple(out.shape) == (len(inputs),), f"out must have shape ({len(inputs)},), but has {tuple(out.shape)}")
    device = out.device
    for i, source in enumerate(inputs):
        if source.device != device:
            raise ValueError(f"inputs[{i}] must be on {device}, as out, but is on {source.device}")
    if inputs:
        torch.ops.kfac_triton.squares(inputs, out, backend=backend)


@operator(
    "Tensor(a!)[] factors, Tensor(b!)[] sums, Tensor keep, Tensor gain, Tensor accept, Tensor summed, Tensor(c!) old, "
    "int[] sizes",
    reference=blend_reference,
    launch=launch.launch_blend,
    can_use=launch.can_use_blend,
)
def blend(
    factors: list[Tensor],
    sums: list[Tensor],
    keep: Tensor,
    gain: Tensor,
    accept: Tensor,
    summed: Tensor,
    old: Tensor,
    sizes: Sequence[int] = (),
    backend: str = "auto",
) -> None:
    """Factor <- keep factor + gain sum for accepted factors, whose old values are left in the buffers of the sums.

    Args:
        factors: stacks (B, n, n), or vectors of diagonals, one after another; fp32 or fp64, updated in place.
        sums: the new statistics, of the same shapes; ignored where accept or summed is false, whatever they hold.
        keep: (factors,), over all matrices of all stacks.
        gain: likewise.
        accept: bool flags, likewise. Neither a factor nor its sum changes where it is false.
        summed: bool flags, likewise. Where it is false, the factor is only copied to its sum.
        old: output, bool flags, likewise: set for factors whose old values are in their sums. All false before.
        sizes: of the diagonals in the vectors; without them, each vector is one diagonal.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes disagree, or backend is "triton" and no kernel can serve the call.
    """
    require(len(factors) == len(sums), f"factors and sums must have the same length, but have {len(factors)} and {len(sums)}")
    if not factors:
        return
    for i, (factor, total) in enumerate(zip(factors, sums, strict=True)):
        if factor.dim() > 1:
            require_stack(f"factors[{i}]", factor)
        require_like(f"sums[{i}]", total, factor.shape, factor)
    count = _count(factors, sizes)
    for name, vector in (("keep", keep), ("gain", gain), ("accept", accept), ("summed", summed), ("old", old)):
        require_vector(name, vector, count, factors[0].device)
    torch.ops.kfac_triton.blend(factors, sums, keep, gain, accept, summed, old, sizes, backend=backend)


@operator(
    "Tensor[] stacks, Tensor(a!) out, int[] sizes",
    reference=traces_reference,
    launch=launch.launch_traces,
    can_use=launch.can_use_traces,
)
def traces(stacks: list[Tensor], out: Tensor, sizes: Sequence[int] = (), backend: str = "auto") -> None:
    """The trace of every matrix of some stacks.

    Args:
        stacks: (B, n, n), or vectors of the diagonals of matrices, one after another; fp32 or fp64.
        out: output, (matrices,), over all stacks.
        sizes: of the diagonals in the vectors; without them, each vector is one diagonal.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if out does not fit, or backend is "triton" and no kernel can serve the call.
    """
    require_vector("out", out, _count(stacks, sizes), stacks[0].device if stacks else out.device)
    if stacks:
        torch.ops.kfac_triton.traces(stacks, out, sizes, backend=backend)


def _count(stacks: list[Tensor], sizes: Sequence[int]) -> int:
    """The number of matrices in some stacks and vectors.

    Raises:
        ValueError: if the sizes do not divide the vectors.
    """
    if sizes:
        lengths = tuple([stack.shape[0] for stack in stacks if stack.dim() == 1])
        if runs_of(tuple(sizes), lengths) is None:
            raise ValueError(f"sizes must divide vectors of {list(lengths)} numbers, but are {list(sizes)}")
        return sum([stack.shape[0] for stack in stacks if stack.dim() > 1]) + len(sizes)
    return sum([stack.shape[0] if stack.dim() > 1 else 1 for stack in stacks])


@operator(
    "Tensor(a!)[] tensors, Tensor[] kept, Tensor finite",
    reference=restore_reference,
    launch=launch.launch_restore,
    can_use=launch.can_use_restore,
)
def restore(tensors: list[Tensor], kept: list[Tensor], finite: Tensor, backend: str = "auto") -> None:
    """Tensors get the values of their copies, bit for bit, where a flag is false; the host does not wait for the flags.

    Args:
        tensors: of any shapes and types, changed in place.
        kept: a copy of each, of the same shape and type.
        finite: (flags,) bool, on the tensors' device; their number divides that of the tensors, and tensor i obeys flag
            i modulo it.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if a copy does not fit its tensor, or backend is "triton" and no kernel can serve the call.
    """
    require(
        finite.dtype == torch.bool and finite.dim() == 1 and len(tensors) == len(kept),
        f"finite must hold flags, and kept a copy of each of {len(tensors)} tensors, but these are {tuple(finite.shape)} of "
        f"{finite.dtype} and {len(kept)} copies",
    )
    if not tensors:
        return
    require(len(finite) > 0 and len(tensors) % len(finite) == 0, f"{len(finite)} flags must divide {len(tensors)} tensors")
    for i, (tensor, copy) in enumerate(zip(tensors, kept, strict=True)):
        if tensor.device != finite.device:
            raise ValueError(f"tensors[{i}] must be on {finite.device} as finite is, but is on {tensor.device}")
        require_like(f"kept[{i}]", copy, tensor.shape, tensor)
    torch.ops.kfac_triton.restore(tensors, kept, finite, backend=backend)
