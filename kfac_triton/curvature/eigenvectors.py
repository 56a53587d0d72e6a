"""Orthonormal eigenvectors of the factors of one stack: first by `eigh`, then followed by orthogonal iteration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import ops, runtime
from .async_flags import AsyncFlags
from .diagonal import DiagonalBasis
from .eigenbasis import Rotation
from .factor_stack import FactorStack

# What orthogonal iteration adds to the diagonal, in units of its mean. Without it, rounding errors would rotate eigenvectors
# with tiny eigenvalues at random.
_SHIFT = 1e-3


def departure(vectors: Tensor) -> Tensor:
    """||Q^T Q - I||_F for each matrix of a stack, (B,)."""
    gram = vectors.mT @ vectors
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return torch.linalg.matrix_norm(gram)


class EigenvectorStack(Rotation):
    """Eigenvectors of a stack of factors, in descending order of their eigenvalues, refreshed in place.

    They are a basis, and nothing else: no damping is needed, and no eigenvalue is kept. A basis that lags behind its factor is
    still orthonormal.

    Args:
        factors: the stack (B, n, n), padded with zeros; only its shape, dtype and device are used.
        sizes: sizes of the factors without padding.
        method: "qr" or "products" for one step of orthogonal iteration, or "eigh"; "auto" is products on a GPU, else QR.
        backend: of the kernels that "products" uses.

    Attributes:
        vectors: eigenvectors as columns, (B, n, n), those of the padding last. The identity where there are none yet.
        values: the same tensor, under its name in `Inverse`.
        residual: ||Q^T Q - I||_F, (B,).
        fallbacks: how often products did not make a basis orthonormal, (B,).
        is_known: for each factor, whether its eigenvectors have been computed.
    """

    kind = "eigenvectors"

    def __init__(self, factors: Tensor, sizes: list[int], method: str, backend: str = "auto") -> None:
        super().__init__(torch.eye(factors.shape[-1]).to(factors).expand_as(factors).clone(), len(factors))
        self.vectors = self.values
        self.residual.zero_()
        is_gpu = factors.is_cuda or backend == "triton"
        self.method = ("products" if is_gpu else "qr") if method == "auto" else method
        self.is_known = [False] * len(factors)
        self.backend = backend
        self._sizes = sizes

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """One refresh of all eigenvectors of factors (B, n, n); damping is not used. `Eigenvectors` does more."""
        self.follow(factors, range(len(factors)))

    def follow(self, factors: Tensor, places: Sequence[int]) -> None:
        """Refreshes the eigenvectors in these places by eigh, or by QR."""
        self.decompose(factors, places) if self.method == "eigh" else self.iterate(factors, places)

    def decompose(self, factors: Tensor, places: Sequence[int]) -> None:
        """Computes eigenvectors by eigh; the host waits. Where it fails, or the factor is zero, the last ones remain."""
        for place in places:
            size = self._sizes[place]
            factor = factors[place, :size, :size]
            if not bool(factor.any()):
                continue
            for dtype in dict.fromkeys((factor.dtype, torch.float64)):
                try:
                    vectors = torch.linalg.eigh(factor.to(dtype))[1]
                except torch.linalg.LinAlgError:
                    continue
                self.vectors[place, :size, :size] = vectors.flip(-1)
                self.residual[place] = departure(self.vectors[place])
                break

    def iterate(self, factors: Tensor, places: Sequence[int]) -> None:
        """One step of orthogonal iteration by QR, Q <- the Q factor of (A + s I) Q; a factor that is zero keeps its basis."""
        for place in places:
            factor, old = factors[place], self.vectors[place]
            mean = factor.diagonal().sum() / self._sizes[place]
            vectors = torch.linalg.qr(torch.addmm(old, factor, old, beta=0).add_(_SHIFT * mean * old))[0]
            vectors = torch.where(mean > 0, vectors, old)
            self.vectors[place] = vectors
            self.residual[place] = departure(vectors)

    def restart(self) -> None:
        """See `Inverse`."""
        super().restart()
        self.is_known = [False] * len(self.is_known)

    def forget(self, place: int) -> None:
        """The factor in this place was replaced: the next refresh computes its eigenvectors by eigh."""
        self.is_known[place] = False

    def restore(self, index: int, values: Tensor, residual: Tensor, damping: Tensor) -> None:
        """Writes what `kept` returned, with its distance from orthonormality."""
        self.values[index] = values.to(self.values)
        self.residual[index] = residual
        self.is_known[index] = True


class IdentityBasis(DiagonalBasis):
    """The eigenvectors of diagonal factors, in the order of their rows: nothing is computed."""

    kind = "eigenvectors"

    def refresh(self, factors: Tensor, damping: Tensor) -> None:
        """Nothing."""


class _Together:
    """The stacks of one device that one call of `ops.orthogonal_iteration` refreshes, without the host waiting.

    Attributes:
        places: of the stacks, in the list of all.
        refused: flags of their matrices that products did not make orthonormal, for the host to read later.
    """

    def __init__(self, places: list[int], stacks: Sequence[EigenvectorStack]) -> None:
        self.places = places
        self._stacks = [stacks[i] for i in places]
        self._sizes = [len(stack.is_known) for stack in self._stacks]
        self.refused = AsyncFlags(sum(self._sizes), self._stacks[0].vectors.device)

    def refresh(self, factors: list[Tensor]) -> None:
        """One step of orthogonal iteration, by products, for all stacks."""
        stacks = self._stacks
        flags = torch.zeros(sum(self._sizes), dtype=torch.bool, device=stacks[0].vectors.device)
        parts = list(flags.split(self._sizes))
        bases, residuals = [stack.vectors for stack in stacks], [stack.residual for stack in stacks]
        ops.orthogonal_iteration(factors, bases, residuals, parts, _SHIFT, backend=stacks[0].backend)
        for stack, part in zip(stacks, parts, strict=True):
            stack.fallbacks += part
        self.refused.copy_to_host(flags)

    def overdue(self) -> dict[int, list[int]]:
        """Number of each stack -> places of the matrices whose flags have arrived, once for each refresh."""
        found: dict[int, list[int]] = defaultdict(list)
        for flag in self.refused.arrived():
            number = flag
            for place, size in zip(self.places, self._sizes, strict=True):
                if number < size:
                    found[place].append(number)
                    break
                number -= size
        return dict(found)


class Eigenvectors:
    """The eigenvectors of all dense factors.

    Args:
        stacks: one for each stack of factors.
    """

    def __init__(self, stacks: Sequence[EigenvectorStack]) -> None:
        self._stacks = list(stacks)
        members: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for i, stack in enumerate(stacks):
            if stack.method == "products":
                members[stack.vectors.device, stack.vectors.dtype].append(i)
        self._together = [_Together(places, stacks) for places in members.values()]
        self._overdue: dict[int, list[int]] = {}

    def refresh(self, stores: Sequence[FactorStack], new: Sequence[Sequence[int]]) -> None:
        """Refreshes all of them.

        Args:
            stores: the factors.
            new: for each stack, the places of the factors whose eigenvectors eigh computes, for which the host waits.
        """
        for stack, store, places in zip(self._stacks, stores, new, strict=True):
            if places or stack.method != "products":
                factors, chosen = store.factors, set(places)
                stack.decompose(factors, places)
                if stack.method != "products":
                    stack.follow(factors, [i for i in range(len(store)) if i not in chosen])
                for i in places:
                    stack.is_known[i] = True
        for group in self._together:
            group.refresh([stores[i].factors for i in group.places])

    @property
    def known(self) -> list[list[bool]]:
        """For each stack a copy of `EigenvectorStack.is_known`."""
        return [list(stack.is_known) for stack in self._stacks]

    @known.setter
    def known(self, flags: Sequence[Sequence[bool]]) -> None:
        for stack, own in zip(self._stacks, flags, strict=True):
            stack.is_known = list(own)

    def overdue(self) -> dict[int, list[int]]:
        """Number of a stack -> places of the matrices that products did not make orthonormal, as far as the host knows.

        The same ones are returned until `settle`, because a step that rescues them may fail.
        """
        if runtime.is_recording():
            return {}
        for group in self._together:
            for number, places in group.overdue().items():
                self._overdue[number] = sorted({*self._overdue.get(number, ()), *places})
        return dict(self._overdue)

    def settle(self) -> None:
        """Those that were overdue have been rescued, in a step that did not fail."""
        self._overdue.clear()

    def rescue(self, stores: Sequence[FactorStack], overdue: dict[int, list[int]]) -> None:
        """Refreshes those by QR. A basis that were merely kept would soon be as far from its factor as never refreshed."""
        for number, places in overdue.items():
            self._stacks[number].iterate(stores[number].factors, places)

    def was_refused(self) -> bool:
        """Whether the host has been told of matrices that products did not make orthonormal."""
        return any(group.refused.is_any_set() for group in self._together)
