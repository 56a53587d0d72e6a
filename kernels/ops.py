"""The operations of K-FAC with checked arguments: tensors in, results written to tensors that the caller owns.

Five do the mathematics and are defined here; the others process many tensors of any shapes at a time, and are in
`multi_tensor/`, `gradients/`, `first_order/` and `eigen_adam/`. Each has two implementations, a Triton kernel and a reference
in plain PyTorch: `backend="auto"` uses the kernel on a GPU if its `can_use` accepts the call, `"triton"` requires it, `"torch"`
uses the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import (
    require,
    require_digits,
    require_layers,
    require_layers_once,
    require_like,
    require_norms,
    require_norms_once,
    require_running,
    require_stack,
    require_vector,
)
from .covariance import launch as covariance_launch
from .covariance.reference import covariance_ema_reference
from .covariance.window import ROWS, Window, flatten, window
from .eigen_adam.operations import adam_direction, adam_moments
from .factored_newton import launch as factored_newton_launch
from .factored_newton.reference import factored_newton_refresh_reference
from .first_order.operations import move
from .gradients.operations import clip, gather, inner, scatter
from .multi_tensor.operations import blend, restore, squares, traces
from .newton_schulz import launch as newton_schulz_launch
from .newton_schulz.reference import newton_schulz_inverse_reference
from .norm_fisher import launch as norm_fisher_launch
from .norm_fisher.norm import Norm
from .norm_fisher.norm import flatten as flatten_norms
from .norm_fisher.reference import norm_fisher_diagonal_reference
from .operators import operator
from .orthogonal_iteration.operations import orthogonal_iteration
from .precondition import launch as precondition_launch
from .precondition.reference import precondition_reference

__all__ = [
    "ROWS",
    "Norm",
    "Window",
    "adam_direction",
    "adam_moments",
    "blend",
    "clip",
    "covariance_ema",
    "factored_newton_refresh",
    "gather",
    "inner",
    "move",
    "newton_schulz_inverse",
    "norm_fisher_diagonal",
    "orthogonal_iteration",
    "precondition",
    "restore",
    "scatter",
    "squares",
    "traces",
    "window",
]


@operator(
    "Tensor(a!)[] factors, Tensor[] inputs, Tensor alpha, Tensor beta, bool[] ones_column, int[] windows, Tensor? accept=None",
    reference=covariance_ema_reference,
    launch=covariance_launch.launch,
    can_use=covariance_launch.can_use,
    plan=covariance_launch.look_at,
)
def covariance_ema(
    factors: list[Tensor],
    inputs: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    ones_column: Sequence[bool],
    windows: Sequence[Window],
    accept: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """A <- beta A + alpha X^T X for every layer of a list, in place (Martens and Grosse 2015, section 5).

    Args:
        factors: per layer a symmetric matrix (N, N), fp32 or fp64, N at least the number of columns of X. Only the leading
            block that X reaches is written; it comes out bitwise symmetric. With beta = 0 the old content is not read.
        inputs: per layer X (rows, n), or the input (N, C, *spatial) of a convolution, whose patches are the rows. Any strides;
            bf16 and fp16 are summed in the factor's precision.
        alpha: weight of the new statistics, (layers,), on the factors' device.
        beta: weight of the old factor, (layers,).
        ones_column: per layer, whether X gets a last column of ones (the bias).
        windows: per layer `window(...)` for a convolution and `ROWS` for a matrix.
        accept: optional (layers,) flags; a factor whose flag is false stays as it is.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if the lists differ in length, a factor is too small or has too few digits, an input does not fit its
            window, devices differ, or backend is "triton" and no kernel can serve the call.
    """
    count = len(factors)
    require(
        len(inputs) == count and len(ones_column) == count and len(windows) == count,
        f"factors, inputs, ones_column and windows must describe the same number of layers, but have {count}, "
        f"{len(inputs)}, {len(ones_column)} and {len(windows)}",
    )
    device = factors[0].device if factors else alpha.device
    for name, vector in (("alpha", alpha), ("beta", beta), ("accept", accept)):
        if vector is not None:
            require_vector(name, vector, count, device)
    # A hundred layers are checked at a time. Dynamo traces the check itself, not what is remembered of it.
    check = require_layers if torch.compiler.is_compiling() else require_layers_once
    check(
        tuple([x.shape for x in factors]),
        tuple([x.shape for x in inputs]),
        tuple([x.dtype for x in factors]),
        tuple(ones_column),
        tuple(windows),
    )
    for i, (factor, source) in enumerate(zip(factors, inputs, strict=True)):
        if source.device != device or factor.device != device:
            raise ValueError(
                f"inputs[{i}] must be on the device of all factors, {device}, but is on {source.device} "
                f"(factors[{i}] on {factor.device})"
            )
    torch.ops.kfac_triton.covariance_ema(factors, inputs, alpha, beta, ones_column, flatten(windows), accept, backend=backend)


@operator(
    "Tensor(a!)[] totals, Tensor[] inputs, Tensor[] gradients, Tensor alpha, Tensor beta, Tensor?[] means, "
    "Tensor?[] variances, int[] norms, float[] epsilons",
    reference=norm_fisher_diagonal_reference,
    launch=norm_fisher_launch.launch,
    can_use=norm_fisher_launch.can_use,
    plan=norm_fisher_launch.look_at,
)
def norm_fisher_diagonal(
    totals: list[Tensor],
    inputs: list[Tensor],
    gradients: list[Tensor],
    alpha: Tensor,
    beta: Tensor,
    norms: Sequence[Norm],
    running: Sequence[tuple[Tensor, Tensor] | None],
    backend: str = "auto",
) -> None:
    """D <- beta D + alpha sum of u^2 for every norm layer of a list, in place.

    U is the gradient of [scale | shift] that belongs to one loss term: summed over the positions of an example, or of a single
    position. The sum of u^2 over terms is the diagonal of their Fisher matrix, times the number of terms.

    Args:
        totals: per layer D, [scale | shift] or the scale alone, fp32 or fp64. With beta = 0 the old content is not read.
        inputs: per layer the input: (examples, ..., normalized dimensions) or, with a scale per channel, (N, C, ...). Any
            strides; bf16 and fp16 are summed in single precision.
        gradients: per layer the gradient of the output, of the input's shape and any of its types.
        alpha: weight of the new statistics, (layers,), on the layers' device.
        beta: weight of the old ones, (layers,).
        norms: what each layer normalizes.
        running: per layer running mean and variance, (C,), if kind "batch" normalizes by them; None otherwise.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if the lists differ in length, a tensor has a wrong shape, device or too few digits, or backend is "triton"
            and no kernel can serve the call.
    """
    count = len(totals)
    require(
        len(inputs) == count and len(gradients) == count and len(norms) == count and len(running) == count,
        f"totals, inputs, gradients, norms and running must describe the same number of layers, but have {count}, "
        f"{len(inputs)}, {len(gradients)}, {len(norms)} and {len(running)}",
    )
    device = totals[0].device if totals else alpha.device
    for name, vector in (("alpha", alpha), ("beta", beta)):
        require_vector(name, vector, count, device)
    check = require_norms if torch.compiler.is_compiling() else require_norms_once  # see `covariance_ema`
    check(
        tuple(norms),
        tuple([x.shape for x in totals]),
        tuple([x.dtype for x in totals]),
        tuple([x.shape for x in inputs]),
        tuple([x.shape for x in gradients]),
    )
    for i, (total, x, gradient) in enumerate(zip(totals, inputs, gradients, strict=True)):
        if total.device != device:
            raise ValueError(f"totals[{i}] must be on the device of all layers, {device}, but is on {total.device}")
        if x.device != device or gradient.device != device:
            raise ValueError(
                f"inputs[{i}], gradients[{i}] and totals[{i}] must be on one device, but are on {x.device}, {gradient.device} "
                f"and {total.device}"
            )
        if (statistics := running[i]) is not None:
            require_running(i, norms[i], statistics, x)
    means, variances = ([None if pair is None else pair[side] for pair in running] for side in (0, 1))
    numbers, epsilons = flatten_norms(norms)
    torch.ops.kfac_triton.norm_fisher_diagonal(
        totals, inputs, gradients, alpha, beta, means, variances, numbers, epsilons, backend=backend
    )


@operator(
    "Tensor factor, Tensor damping, Tensor(a!) inverse, Tensor(b!) residual, float tolerance, int max_steps",
    reference=newton_schulz_inverse_reference,
    launch=newton_schulz_launch.launch,
    can_use=newton_schulz_launch.can_use,
)
def newton_schulz_inverse(
    factor: Tensor,
    damping: Tensor,
    inverse: Tensor,
    residual: Tensor,
    tolerance: float = 1e-3,
    max_steps: int = 40,
    backend: str = "auto",
) -> None:
    """Cold start: inverse <- (factor + damping I)^-1 by coupled Newton-Schulz with damped-Chebyshev coefficients.

    Args:
        factor: symmetric positive semidefinite stack (B, n, n), exactly symmetric, fp32 or fp64.
        damping: (B,), positive: the lower bound of the damped spectrum that the schedule is built on.
        inverse: output (B, n, n).
        residual: output (B,): the certificate, a bound on ||I - B^1/2 X B^1/2|| of the damped factor B, truncation and
            rounding included. Below 1 the inverse is positive definite; infinite where nothing useful came out.
        tolerance: distance of the smallest eigenvalue of X B from 1 at which a matrix stops.
        max_steps: largest number of doublings; a condition number of 1e8 takes 16.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes, dtypes or devices disagree, or backend is "triton" and no kernel can serve the call.
    """
    require_stack("factor", factor)
    require_like("inverse", inverse, tuple(factor.shape), factor)
    require_like("damping", damping, (factor.shape[0],), factor)
    require_like("residual", residual, (factor.shape[0],), factor)
    torch.ops.kfac_triton.newton_schulz_inverse(factor, damping, inverse, residual, tolerance, max_steps, backend=backend)


@operator(
    "Tensor[] factors, Tensor[] dampings, Tensor(a!)[] roots, Tensor(b!)[] residuals, float tolerance, int max_steps, "
    "float? accept, Tensor(c!)[] used, Tensor(d!)[] fallbacks, Tensor(e!)[] refused",
    reference=factored_newton_refresh_reference,
    launch=factored_newton_launch.launch,
    can_use=factored_newton_launch.can_use,
)
def factored_newton_refresh(
    factors: list[Tensor],
    dampings: list[Tensor],
    roots: list[Tensor],
    residuals: list[Tensor],
    tolerance: float = 0.05,
    max_steps: int = 8,
    accept: float | None = None,
    used: Sequence[Tensor] = (),
    fallbacks: Sequence[Tensor] = (),
    refused: Sequence[Tensor] = (),
    backend: str = "auto",
) -> None:
    """Warm refresh in place of T, lower triangular with T^T T close to (factor + damping I)^-1 (see `factored_newton`).

    Lists have an entry for each stack. The stacks may be of different sizes: one call serves them all.

    Args:
        factors: symmetric positive semidefinite stacks (B, n, n), fp32 or fp64.
        dampings: (B,), positive.
        roots: T, (B, n, n), updated in place; a matrix whose step does not contract keeps its last finite T.
        residuals: output (B,): bound on the energy-norm error of T^T T after the refresh; infinite asks for a refactoring.
        tolerance: residual at which a matrix stops; it also stops when rounding makes up half of its residual.
        max_steps: largest number of Newton steps; at least one is taken.
        accept: if given, a matrix with a larger residual is refused: it keeps the T and the residual that came in.
        used: with `accept`, the damping in each T, (B,), updated where it is not refused.
        fallbacks: with `accept`, counters (B,), int64, increased where it is refused.
        refused: with `accept`, output (B,), bool.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if lists differ in length, shapes, dtypes or devices disagree, or backend is "triton" and no kernel can
            serve the call.
    """
    count = len(factors)
    kept = count if accept is not None else 0
    lengths = [len(x) for x in (dampings, roots, residuals, used, fallbacks, refused)]
    require(
        lengths == [count] * 3 + [kept] * 3,
        f"dampings, roots and residuals must have an entry for each of {count} factors, and used, fallbacks and refused for "
        f"each of {kept}, but have {', '.join(map(str, lengths))}",
    )
    require(accept is None or max_steps > 0, f"max_steps must be at least 1 with accept, but is {max_steps}")
    for i, factor in enumerate(factors):
        require_stack(f"factors[{i}]", factor)
        if factor.dtype != factors[0].dtype or factor.device != factors[0].device:
            raise ValueError(
                f"factors[{i}] must have the dtype and device of factors[0], {factors[0].dtype} and {factors[0].device}, but "
                f"has {factor.dtype} and {factor.device}"
            )
        require_like(f"roots[{i}]", roots[i], factor.shape, factor)
        for name, vectors in (("dampings", dampings), ("residuals", residuals), ("used", used)):
            if vectors:
                require_like(f"{name}[{i}]", vectors[i], (factor.shape[0],), factor)
        for name, vectors, dtype in (("fallbacks", fallbacks, torch.int64), ("refused", refused, torch.bool)):
            if vectors:
                require_vector(f"{name}[{i}]", vectors[i], factor.shape[0], factor.device)
                if vectors[i].dtype != dtype:
                    raise ValueError(f"{name}[{i}] must be {dtype}, but is {vectors[i].dtype}")
    torch.ops.kfac_triton.factored_newton_refresh(
        factors, dampings, roots, residuals, tolerance, max_steps, accept, used, fallbacks, refused, backend=backend
    )


@operator(
    "Tensor gradient, Tensor left, Tensor right, Tensor(a!) out, Tensor(b!)? product, bool factored",
    reference=precondition_reference,
    launch=precondition_launch.launch,
    can_use=precondition_launch.can_use,
    library=precondition_launch.multiply_by_library,
    prefers_library=precondition_launch.prefers_library,
)
def precondition(
    gradient: Tensor,
    left: Tensor,
    right: Tensor,
    out: Tensor,
    product: Tensor | None,
    factored: bool = False,
    backend: str = "auto",
) -> None:
    """V = G^-1 W A^-1 for a stack of layers of one shape, and the products `<V, W>` (Martens and Grosse 2015, section 4.2).

    Args:
        gradient: W, (B, m, n), fp32 or fp64.
        left: G^-1 (B, m, m), symmetric, or its lower triangular root T with G^-1 = T^T T.
        right: A^-1 (B, n, n), or its root.
        out: output V, (B, m, n).
        product: output `<V, W>`, (B,); None if it is not needed.
        factored: whether left and right are roots.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: if shapes, dtypes or devices disagree, or backend is "triton" and no kernel can serve the call.
    """
    require_digits("gradient", gradient)
    if gradient.dim() != 3:
        raise ValueError(f"gradient must have shape (B, m, n), but has {tuple(gradient.shape)}")
    batch, m, n = gradient.shape
    require_like("left", left, (batch, m, m), gradient)
    require_like("right", right, (batch, n, n), gradient)
    require_like("out", out, (batch, m, n), gradient)
    if product is not None:
        require_like("product", product, (batch,), gradient)
    torch.ops.kfac_triton.precondition(gradient, left, right, out, product, factored, backend=backend)
