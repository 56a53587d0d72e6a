"""Certified inverses of damped factors: the interface of all inverses, and stacks of dense ones.

Each method returns, for every matrix B and its computed inverse X, a bound on the error ||I - B^1/2 X B^1/2|| in the energy
norm: the certificate. A matrix whose bound exceeds `ACCEPT` is inverted again by Cholesky, first in float32, then in float64.
If that fails, too, its damping is multiplied by ten until the inverse is certified.

On a GPU the host does not wait for the certificates. A matrix whose new inverse is refused keeps the last certified one, and is
inverted by Cholesky in the next refresh, when the host has received the flag.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property, partial

import torch
from torch import Tensor

from ..kernels import ops, runtime
from ..kernels.device_tables import device_vector
from .async_flags import AsyncFlags
from .factor_stack import FactorStack
from .factorizations import all_finite, cholesky, eigh, pieces
from .groups import SideGroup

# Training with errors up to 0.3 is as good as with exact inverses. With an error below 1 the inverse is positive definite.
ACCEPT = 0.3
_DOUBLINGS = 20  # largest number of Newton-Schulz steps; a matrix that needs more than 16 is too ill-conditioned for float32
# Newton steps of a warm refresh. Where the host does not read the residuals, all steps are launched, needed or not. Four are
# enough there: the host factors a matrix that needs more by Cholesky in the next step. A replayed CUDA graph cannot do that, so
# a matrix that four steps leave behind would keep its old inverse for good; launches in a graph are cheap, so it takes eight.
_REFINEMENTS, _BLIND_REFINEMENTS = 8, 4


def resolve(method: str, device: torch.device) -> str:
    """Replaces "auto" by a method: on a GPU the warm refresh, whose matrix products run on tensor cores, else Cholesky."""
    if method != "auto":
        return method
    return "factored" if device.type == "cuda" else "cholesky"


class Inverse(ABC):
    """The inverses of the damped factors of one store, in whatever form.

    Args:
        values: the tensor that stores them; zero for a factor without a certified inverse.
        count: number of factors.

    Attributes:
        kind: form of the values: "inverse", "root" (T, where the inverse is T^T T) or "basis". A refresh of the latter two
            starts from the last values.
        residual: certificates (factors,); infinite where there is no certified inverse.
        damping: the damping (factors,) in the values.
        fallbacks: how often the result of the chosen method was refused, (factors,).
        raised: how often the damping had to be raised, (factors,).
    """

    kind = "inverse"

    def __init__(self, values: Tensor, count: int) -> None:
        self.values = values
        self.residual = values.new_full((count,), torch.inf)
        self.damping = values.new_zeros(count)
        self.fallbacks = torch.zeros(count, dtype=torch.long, device=values.device)
        self.raised = torch.zeros_like(self.fallbacks)
        self.is_cold = True

    @abstractmethod
    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts factor + damping I for all factors of the store, with damping (factors,)."""

    @abstractmethod
    def left(self, side: SideGroup, x: Tensor) -> Tensor:
        """G^-1 x for the factors of a tile group and their gradients x (tiles, m, n)."""

    @abstractmethod
    def right(self, side: SideGroup, x: Tensor) -> Tensor:
        """Likewise x A^-1."""

    def restart(self) -> None:
        """Makes the next refresh ignore the present values, because the factors were replaced."""
        self.is_cold = True

    def kept(self, index: int) -> Tensor:
        """The part of a checkpoint for one inverse."""
        return self.values[index]

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` returned, with its certificate."""
        self.values[index] = values.to(self.values)
        self.residual[index], self.damping[index] = residual, damping
        self.is_cold = not bool((self.residual <= ACCEPT).all())


class InverseStack(Inverse):
    """Damped inverses of a stack of factors, refreshed in place.

    Args:
        factors: the stack (B, n, n); only its shape, dtype and device are used.
        method: one of `METHODS`.
        tolerance: energy-norm error at which the iterative methods stop.
        backend: of the kernels.
        wait: whether `refresh` waits for the certificates.

    Attributes:
        values: (B, n, n), X = (A + damping I)^-1, or T with X = T^T T if `factored`.
    """

    def __init__(self, factors: Tensor, method: str, tolerance: float, backend: str = "auto", wait: bool = True) -> None:
        super().__init__(torch.zeros_like(factors), len(factors))
        self.method = resolve(method, factors.device)
        self.factored = self.method == "factored"
        self.kind = "root" if self.factored else "inverse"
        self.tolerance = tolerance
        self.backend = backend
        self.waits = wait

    @cached_property
    def refused(self) -> AsyncFlags | None:
        """Refused matrices, for the host to read when the flags arrive; None where refreshes wait."""
        return None if self.waits else AsyncFlags(len(self.values), self.values.device)

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts factors (B, n, n) + damping (B,) I; afterwards every inverse is certified, or zero."""
        damping = damping.to(factors)
        if self.refused is None or self.is_cold:
            self.refresh_and_wait(factors, damping)
        else:
            refresh_together([self], [factors], [damping], self.refused)

    def refresh_and_wait(self, factors: Tensor, damping: Tensor) -> None:
        """Inverts and reads the certificates; matrices whose inverse is refused are inverted by Cholesky at once."""
        self.damping.copy_(damping)
        cold = ~(self.residual <= ACCEPT) & self.factored  # without the certified inverse that this method starts from
        if not self.factored or not bool(cold.all()):
            self._invert(factors, damping, self.values, self.residual)
        self.residual.masked_fill_(cold, torch.inf)
        refused = ~(self.residual <= ACCEPT)
        if bool(refused.any()):
            self.fallbacks += refused & ~cold
            self._fall_back(factors, refused.nonzero().squeeze(-1))
        self.is_cold = False

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

    def invert_unless_refused(self, factors: Tensor, damping: Tensor, refused: Tensor) -> None:
        """Writes which matrices are refused to flags (B,). They keep their last inverse; nobody waits."""
        values, residual = self.values.clone(), torch.empty_like(self.residual)
        self._invert(factors, damping, values, residual)
        torch.gt(residual.nan_to_num(nan=torch.inf), ACCEPT, out=refused)
        self.values.copy_(torch.where(refused[:, None, None], self.values, values))
        self.residual.copy_(torch.where(refused, self.residual, residual))
        self.damping.copy_(torch.where(refused, self.damping, damping))
        self.fallbacks += refused

    def invert_by_cholesky(self, factors: Tensor, damping: Tensor, places: list[int]) -> None:
        """Inverts the matrices in these places with their new damping."""
        chosen = device_vector(places, factors.device)
        self.damping.index_copy_(0, chosen, damping[chosen])
        self._fall_back(factors, chosen)

    def _invert(self, factors: Tensor, damping: Tensor, values: Tensor, residual: Tensor) -> None:
        """Inverts by the chosen method and writes the results and their certificates to values and residual."""
        if self.method == "newton_schulz":
            tolerance = 0.1 * self.tolerance
            ops.newton_schulz_inverse(factors, damping, values, residual, tolerance, _DOUBLINGS, backend=self.backend)
        elif self.method == "factored":
            ops.factored_newton_refresh(
                [factors], [damping], [values], [residual], self.tolerance, _REFINEMENTS, backend=self.backend
            )
        else:
            invert = eigh if self.method == "eigh" else partial(cholesky, as_root=False, dtype=factors.dtype)
            for piece in pieces(len(factors), factors, factors.dtype):
                values[piece], residual[piece] = invert(factors[piece], damping[piece])

    def _fall_back(self, factors: Tensor, remaining: Tensor) -> None:
        """Inverts the matrices in remaining by Cholesky: in their own precision, in float64, then with growing damping.

        The host waits once for each attempt, of which most matrices need one.
        """
        # In the dtype of the factors, so that `damping` is exactly the damping in the inverses.
        damping, least = self.damping[remaining], torch.finfo(self.damping.dtype).tiny
        attempts = [torch.float64] if self.method == "cholesky" else [factors.dtype, torch.float64]
        for attempt in itertools.count():
            if attempt >= len(attempts):
                damping = (10 * damping).clamp_min(least)
                self.raised.index_add_(0, remaining, torch.isfinite(damping).long())
            dtype = attempts[min(attempt, len(attempts) - 1)]
            # No damping makes a matrix invertible that is not finite, or a damping that has become infinite.
            hopeless = ~all_finite(damping[:, None])
            certified = torch.zeros_like(hopeless)
            for piece in pieces(len(remaining), factors, dtype):
                places = remaining[piece]
                targets = factors[places]
                hopeless[piece] |= ~all_finite(targets)
                values, residual = cholesky(targets.to(dtype), damping[piece].to(dtype), self.factored, factors.dtype)
                certified[piece] = residual <= ACCEPT
                self.values.index_copy_(0, places, values.masked_fill_(~certified[piece, None, None], 0.0))
                self.residual.index_copy_(0, places, residual.masked_fill_(~certified[piece], torch.inf))
            self.damping.index_copy_(0, remaining, torch.where(certified, damping, self.damping[remaining]))
            again = [i for i, is_done in enumerate((certified | hopeless).tolist()) if not is_done]
            if not again:
                return
            chosen = device_vector(again, factors.device)
            remaining, damping = remaining[chosen], damping[chosen]


def refresh_together(
    stacks: Sequence[InverseStack], factors: Sequence[Tensor], dampings: Sequence[Tensor], refused: AsyncFlags
) -> None:
    """Inverts the factors of several stacks of one device, dtype and method without waiting for the certificates.

    Warm refreshes share their launches. None of the stacks may be cold.

    Args:
        stacks: where the inverses are.
        factors: for each stack, its factors (B, n, n).
        dampings: for each stack, the damping (B,) in the dtype of the factors.
        refused: flags of the matrices of all stacks.
    """
    cases = list(zip(stacks, factors, dampings, strict=True))
    overdue = refused.arrived()
    sizes = [len(stack.values) for stack in stacks]
    flags = torch.empty(sum(sizes), dtype=torch.bool, device=factors[0].device)
    parts = flags.split(sizes)
    if stacks[0].factored:
        steps = _REFINEMENTS if runtime.is_recording() else _BLIND_REFINEMENTS
        ops.factored_newton_refresh(
            list(factors), list(dampings), [x.values for x in stacks], [x.residual for x in stacks], stacks[0].tolerance, steps,
            ACCEPT, [x.damping for x in stacks], [x.fallbacks for x in stacks], list(parts), backend=stacks[0].backend,
        )  # fmt: skip
    else:
        for (stack, factor, damping), part in zip(cases, parts, strict=True):
            stack.invert_unless_refused(factor, damping, part)
    refused.copy_to_host(flags)
    for (stack, factor, damping), start in zip(cases, itertools.accumulate(sizes, initial=0), strict=False):
        places = [i - start for i in overdue if start <= i < start + len(stack.values)]
        if places:
            stack.invert_by_cholesky(factor, damping, places)


class InverseGroup:
    """The inverse stacks of one device and dtype, whose warm refreshes share launches, and their flags a copy to the host.

    Args:
        stores: the places of the stacks in the list of all inverses.
        stacks: the stacks themselves.
        runs: for each stack, the slots of its factors in vectors over all slots.
        slots: number of all slots.

    Attributes:
        stores: see above.
        refused: see `refresh_together`.
    """

    def __init__(self, stores: list[int], stacks: list[InverseStack], runs: list[slice], slots: int) -> None:
        self.stores = stores
        self._stacks = stacks
        self._runs = runs
        values = stacks[0].values
        self.refused = None if stacks[0].waits else AsyncFlags(sum(len(stack.values) for stack in stacks), values.device)
        self._damping = values.new_zeros(slots)  # kept, because kernels find it by its address

    @staticmethod
    def all_of(inverses: Sequence[Inverse], runs: Sequence[slice]) -> list[InverseGroup]:
        """The groups of all inverse stacks in a list; runs: the slots of each inverse."""
        members: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for i, inverse in enumerate(inverses):
            if isinstance(inverse, InverseStack):
                members[inverse.values.device, inverse.values.dtype].append(i)
        groups = []
        for stores in members.values():
            stacks = [inverse for i in stores if isinstance(inverse := inverses[i], InverseStack)]
            groups.append(InverseGroup(stores, stacks, [runs[i] for i in stores], runs[-1].stop))
        return groups

    def refresh(self, stores: Sequence[FactorStack], damping: Tensor) -> None:
        """Inverts the factors of every stack; damping is a vector over all slots."""
        self._damping.copy_(damping)
        dampings = [self._damping[run] for run in self._runs]
        if self.refused is not None and not any(stack.is_cold for stack in self._stacks):
            refresh_together(self._stacks, [store.factors for store in stores], dampings, self.refused)
            return
        for stack, store, part in zip(self._stacks, stores, dampings, strict=True):  # one by one, because factors may be copies
            stack.refresh_and_wait(store.factors, part)
