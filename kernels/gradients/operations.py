"""Gradients of all parameters into stacks of matrices, updates out of them, and the KL clip: one launch each.

Only a step calls these, which torch.compile never traces, so they are no operators of `torch.library`. Layouts are objects.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import require, require_like, require_vector
from ..operators import Operator
from . import launch
from .layout import Layout
from .reference import clip_reference, gather_reference, inner_reference, scatter_reference

_GATHER = Operator(gather_reference, launch.launch_gather, launch.can_use_gather)
_INNER = Operator(inner_reference, launch.launch_inner, launch.can_use_inner)
_SCATTER = Operator(scatter_reference, launch.launch_scatter, launch.can_use_scatter)
_CLIP = Operator(clip_reference, launch.launch_clip, launch.can_use_clip)


def gather(stacks: list[Tensor], gradients: list[Tensor], layout: Layout, backend: str = "auto") -> None:
    """Pieces of gradients into matrices of several stacks, zero wherever no piece is.

    Args:
        stacks: outputs, (B, m, n) each.
        gradients: any tensors on the same device.
        layout: where the pieces are; none of them overlap.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if the layout is that of other tensors, or backend is "triton" and no kernel can serve the call.
    """
    _require_layout("gradients", gradients, stacks, layout)
    _GATHER.run("gather", stacks, gradients, layout, backend=backend)


def inner(gradients: list[Tensor], updates: list[Tensor], out: Tensor, backend: str = "auto") -> None:
    """`<V, W>`, `<W, W>` and `<V, V>` of every matrix.

    Args:
        gradients: stacks of W, (B, m, n) each.
        updates: stacks of V, of the same shapes.
        out: output, (3, matrices), over all stacks.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes disagree, or backend is "triton" and no kernel can serve the call.
    """
    require(len(gradients) == len(updates), f"there are {len(gradients)} stacks of gradients and {len(updates)} of updates")
    for i, (gradient, update) in enumerate(zip(gradients, updates, strict=True)):
        require_like(f"updates[{i}]", update, gradient.shape, gradient)
    require_like("out", out, (3, sum([gradient.shape[0] for gradient in gradients])), gradients[0])
    _INNER.run("inner", gradients, updates, out, backend=backend)


def scatter(
    stacks: list[Tensor], updates: list[Tensor], scale: Tensor, zeros: Tensor, layout: Layout, backend: str = "auto"
) -> None:
    """Scaled pieces of matrices of several stacks into updates.

    Args:
        stacks: (B, m, n) each.
        updates: outputs, any tensors on the same device; one of them may be a stack, and then the matrix is scaled in place.
        scale: a scalar.
        zeros: (matrices,), bool; a piece with such a flag becomes zero, whatever the matrix holds.
        layout: where the pieces are.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if the layout is that of other tensors, or backend is "triton" and no kernel can serve the call.
    """
    require(scale.dim() == 0, f"scale must be a scalar, but has shape {tuple(scale.shape)}")
    require_vector("zeros", zeros, sum([stack.shape[0] for stack in stacks]), stacks[0].device)
    _require_layout("updates", updates, stacks, layout)
    _SCATTER.run("scatter", stacks, updates, scale, zeros, layout, backend=backend)


def clip(
    products: Tensor,
    rates: Tensor,
    members: Tensor,
    places: Tensor,
    kl_clip: float | None,
    scale: Tensor,
    finite: Tensor,
    zeros: Tensor,
    dropped: Tensor,
    backend: str = "auto",
) -> None:
    """The scale nu = min(1, sqrt(kl_clip / sum lr^2 `<V, W>`)) of the KL clip, without weights whose gradients are not finite.

    Args:
        products: `<V, W>`, (matrices,); those that are not finite tell of gradients that are not.
        rates: learning rates, (weights,), of the type of the products.
        members: int32 (weights, k): the matrices of each weight, then -1. Every matrix belongs to one weight.
        places: int64 (matrices,), where each matrix is counted in dropped.
        kl_clip: the bound, or None for no clipping.
        scale: output, a scalar.
        finite: output, bool (weights,).
        zeros: output, bool (matrices,): whether a matrix belongs to a weight that is not finite.
        dropped: int64; elements are counted up where a product is not finite.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes disagree, or backend is "triton" and no kernel can serve the call.
    """
    device = products.device
    require(members.dim() == 2 and members.dtype == torch.int32, "members must be an int32 matrix (weights, k)")
    require(scale.dim() == 0, f"scale must be a scalar, but has shape {tuple(scale.shape)}")
    for name, vector in (("rates", rates), ("finite", finite)):
        require_vector(name, vector, len(members), device)
    for name, vector in (("places", places), ("zeros", zeros)):
        require_vector(name, vector, len(products), device)
    bound = math.inf if kl_clip is None else kl_clip
    _CLIP.run("clip", products, rates, members, places, float(bound), scale, finite, zeros, dropped, backend=backend)


def _require_layout(name: str, tensors: list[Tensor], stacks: list[Tensor], layout: Layout) -> None:
    most = layout.remembered("most", lambda: max((piece.tensor for piece in layout.pieces), default=-1))
    require(most < len(tensors), f"the layout has pieces of {name}[{most}], but there are {len(tensors)} {name}")
    most = layout.remembered("stacks", lambda: max((piece.stack for piece in layout.pieces), default=-1))
    require(most < len(stacks), f"the layout has pieces of stacks[{most}], but there are {len(stacks)} stacks")
