"""Inverses of the damped factors of one stack: a method, its certificates, and the way back when one is missing.

Each method returns a bound on the energy-norm error ||I - B^1/2 X B^1/2|| per matrix. What exceeds `ACCEPT` is done again by
Cholesky in float32, in float64, and then with ten times the damping until it is certified: a matrix that float32 cannot
invert gets the least damping at which it can.

On a GPU the host does not wait for a certificate. A matrix that misses it keeps its last certified inverse, and is done again
by Cholesky one refresh later, when the news has reached the host.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..kernels import ops, runtime
from ..kernels.certificate import MULTIPLIED, damped, inverse_residual, mirror, probe_error, root_residual, rounding_error
from .async_flags import AsyncFlags
from .groups import SideGroup
from .triangular import symmetric_product, triangular_inverse

# K-FAC trains as well with an energy error of 0.3 as with none; below 1 the inverse is positive definite.
ACCEPT = 0.3
_PIECE = 2**23  # bytes of a stack that are inverted at a time
_DOUBLINGS = 20  # of Newton-Schulz; what takes more than 16 is beyond float32, and every one is a launch
# Newton steps of a warm refresh. Where the host does not look, each is launched, needed or not: a start that needs more than
# the fewer is better factored anew, which the host does in the next step. In a replayed CUDA graph it cannot, and launches cost
# little: there a start that is left behind would stay behind, and K-FAC would train on old inverses.
_REFINEMENTS, _BLIND_REFINEMENTS = 8, 4


def resolve(method: str, device: torch.device) -> str:
    """The method that "auto" stands for: the warm refresh is all tensor-core products, which a CPU does not have."""
    if method != "auto":
        return method
    return "factored" if device.type == "cuda" else "cholesky"


def cholesky(factor: Tensor, damping: Tensor, as_root: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(inverse or its root T, residual) by Cholesky in the factor's precision, to be kept in dtype."""
    target = damped(factor, damping)
    lower, info = torch.linalg.cholesky_ex(target)
    failed = (info != 0) | ~torch.isfinite(lower.diagonal(dim1=-2, dim2=-1).sum(-1))
    identity = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    if lower.is_cuda or bool(failed.any()):  # where the host may not look, or has seen one
        lower = torch.where(failed[:, None, None], identity, lower)
    result = triangular_inverse(lower)
    if as_root:
        _, distance, rounding = root_residual(target, result.to(dtype).to(factor.dtype))
        residual = distance + rounding  # adding the damping was rounded, too, and the distance does not see that
    else:
        result = symmetric_product(result)
        if factor.dtype == dtype:
            residual = rounding_error(target, result.diagonal(dim1=-2, dim2=-1), dtype, MULTIPLIED)
            residual = torch.maximum(residual, probe_error(target, result))
        else:  # there are digits left to measure what the rounding did
            residual = inverse_residual(target, result.to(dtype).to(factor.dtype))
    result = result.to(dtype)
    failed = failed | ~torch.isfinite(result.sum((-2, -1)))
    return result, residual.to(dtype).masked_fill(failed, torch.inf)


def eigh(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(inverse, residual) from the eigenbasis; negative eigenvalues of a rounded factor count as zero."""
    finite = _finite(factor)  # eigh refuses a whole stack for one that is not
    try:
        values, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], factor, 0.0))
    except torch.linalg.LinAlgError:  # did not converge for one of the stack
        if len(factor) == 1:
            return torch.zeros_like(factor), torch.full_like(damping, torch.inf)
        alone = [eigh(*pair) for pair in zip(factor.split(1), damping.split(1), strict=True)]
        return torch.cat([inverse for inverse, _ in alone]), torch.cat([residual for _, residual in alone])
    root = (vectors * (values.clamp_min(0) + damping[:, None]).rsqrt().unsqueeze(-2)).mT
    inverse = mirror(root.mT @ root)
    # Not `inverse_residual`: where float32 has too few digits its trace, a sum of terms of both signs, may vanish.
    _, distance, rounding = root_residual(damped(factor, damping), root)
    return inverse, (distance + rounding).masked_fill(~(finite & _finite(inverse)), torch.inf).nan_to_num(nan=torch.inf)


def _finite(stack: Tensor) -> Tensor:
    """Whether all of a matrix is finite, (B,)."""
    return torch.isfinite(stack).flatten(1).all(1)


class Inverse(ABC):
    """What stands for the inverses of the damped factors of one store.

    Args:
        values: tensor that they are kept in; zero where there is no certificate.
        count: number of factors.

    Attributes:
        kind: what is kept: "inverse", "root" (T with inverse T^T T) or "basis". A refresh of the latter two needs the last.
        residual: certificate (factors,) of values; infinite where there is none.
        damping: the damping (factors,) that values were made with.
        fallbacks: how often the method's own result was refused, (factors,).
        raised: how often damping had to be raised, (factors,).
    """

    kind = "inverse"

    def __init__(self, values: Tensor, count: int) -> None:
        self.values = values
        self.residual = values.new_full((count,), torch.inf)
        self.damping = values.new_zeros(count)
        self.fallbacks = torch.zeros(count, dtype=torch.long, device=values.device)
        self.raised = torch.zeros_like(self.fallbacks)
        self._is_cold = True

    @abstractmethod
    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts the factors of the store, damping (factors,) added to each."""

    @abstractmethod
    def left(self, side: SideGroup, x: Tensor) -> Tensor:
        """G^-1 x for the factors of a group and gradients x (tiles, m, n)."""

    @abstractmethod
    def right(self, side: SideGroup, x: Tensor) -> Tensor:
        """The same for x A^-1."""

    def restart(self) -> None:
        """Makes the next refresh start from nothing and wait: the factors were written from outside."""
        self._is_cold = True

    def kept(self, index: int) -> Tensor:
        """What a checkpoint keeps of one inverse."""
        return self.values[index]

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` gave, with its certificate."""
        self.values[index] = values.to(self.values)
        self.residual[index], self.damping[index] = residual, damping
        self._is_cold = not bool((self.residual <= ACCEPT).all())


class InverseStack(Inverse):
    """Damped inverses of a stack of factors, refreshed in place.

    Args:
        factors: the stack (B, n, n), for its shape, type and place.
        method: one of `METHODS`.
        tolerance: energy-norm error at which the iterative methods stop.
        backend: of the kernels.
        wait: whether `refresh` waits for the certificates.

    Attributes:
        values: (B, n, n), X = (A + damping I)^-1, or T with X = T^T T when `factored`.
    """

    def __init__(self, factors: Tensor, method: str, tolerance: float, backend: str = "auto", wait: bool = True) -> None:
        super().__init__(torch.zeros_like(factors), len(factors))
        self.method = resolve(method, factors.device)
        self.factored = self.method == "factored"
        self.kind = "root" if self.factored else "inverse"
        self.tolerance = tolerance
        self._backend = backend
        self._refused = None if wait else AsyncFlags(len(factors), factors.device)

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts factors (B, n, n) + damping (B,) I; afterwards every matrix is certified, or zero."""
        damping = damping.to(factors)
        if self._refused is not None and not self._is_cold:
            self._refresh_without_waiting(factors, damping, self._refused)
            return
        self.damping.copy_(damping)
        cold = ~(self.residual <= ACCEPT)  # nothing to refresh from
        if self.factored and bool(cold.all()):
            self.residual.fill_(torch.inf)
        else:
            self._invert(factors, damping, self.values, self.residual)
            if self.factored:
                self.residual.masked_fill_(cold, torch.inf)
        refused = ~(self.residual <= ACCEPT)
        if bool(refused.any()):
            expected = cold if self.factored else torch.zeros_like(cold)
            self.fallbacks += refused & ~expected
            self._fall_back(factors, refused.nonzero().squeeze(-1))
        self._is_cold = False

    def restart(self) -> None:
        """See `Inverse`."""
        super().restart()
        self.residual.fill_(torch.inf)

    def left(self, side: SideGroup, x: Tensor) -> Tensor:
        """See `Inverse`."""
        values = side.select(self.values)
        return values.mT @ (values @ x) if self.factored else values @ x

    def right(self, side: SideGroup, x: Tensor) -> Tensor:
        """See `Inverse`."""
        values = side.select(self.values)
        return (x @ values.mT) @ values if self.factored else x @ values

    def _refresh_without_waiting(self, factors: Tensor, damping: Tensor, refused: AsyncFlags) -> None:
        late = refused.receive()
        values, residual = self.values.clone(), torch.empty_like(self.residual)
        self._invert(factors, damping, values, residual)
        certified = residual <= ACCEPT
        self.values.copy_(torch.where(certified[:, None, None], values, self.values))
        self.residual.copy_(torch.where(certified, residual, self.residual))
        self.damping.copy_(torch.where(certified, damping, self.damping))
        self.fallbacks += ~certified
        refused.send(~certified)
        if late:
            self.damping[late] = damping[late]
            self._fall_back(factors, torch.tensor(late, device=factors.device))

    def _invert(self, factors: Tensor, damping: Tensor, values: Tensor, residual: Tensor) -> None:
        """The method's own result and its certificates, written to values and residual."""
        if self.method == "newton_schulz":
            tolerance = 0.1 * self.tolerance
            ops.newton_schulz_inverse(factors, damping, values, residual, tolerance, _DOUBLINGS, backend=self._backend)
        elif self.method == "factored":
            is_blind = self._refused is not None and not runtime.is_recording()
            steps = _BLIND_REFINEMENTS if is_blind else _REFINEMENTS
            ops.factored_newton_refresh(factors, damping, values, residual, self.tolerance, steps, backend=self._backend)
        else:
            invert = eigh if self.method == "eigh" else _cholesky_inverse
            # Where the host waits anyway, a part of the stack at a time: each asks for some five times its size.
            most = max(1, _PIECE // factors[0].nbytes) if self._refused is None else len(factors)
            for piece in (slice(i, i + most) for i in range(0, len(factors), most)):
                values[piece], residual[piece] = invert(factors[piece], damping[piece])

    def _fall_back(self, factors: Tensor, remaining: Tensor) -> None:
        """Cholesky for the matrices in remaining: in their own precision, in float64, then there with growing damping."""
        self.values[remaining] = 0.0
        self.residual[remaining] = torch.inf
        remaining = remaining[_finite(factors[remaining])]  # the others have no inverse with any damping
        # In the factors' type, so that it is what the inverses are made with.
        damping, least = self.damping.clone(), torch.finfo(self.damping.dtype).tiny
        attempts = [torch.float64] if self.method == "cholesky" else [factors.dtype, torch.float64]
        for attempt in itertools.count():
            if attempt >= len(attempts):
                damping[remaining] = (10 * damping[remaining]).clamp_min(least)
                remaining = remaining[torch.isfinite(damping[remaining])]
                self.raised[remaining] += 1
            if not len(remaining):
                return
            dtype = attempts[min(attempt, len(attempts) - 1)]
            values, residual = cholesky(
                factors[remaining].to(dtype), damping[remaining].to(dtype), self.factored, factors.dtype
            )
            certified = residual <= ACCEPT
            done, remaining = remaining[certified], remaining[~certified]
            self.values[done], self.residual[done] = values[certified], residual[certified]
            self.damping[done] = damping[done]


def _cholesky_inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    return cholesky(factor, damping, as_root=False, dtype=factor.dtype)
