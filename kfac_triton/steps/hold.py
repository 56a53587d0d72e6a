"""Parameters with a NaN or Inf in their gradient keep their values, even if only the device knows which parameters they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..curvature.finite_flags import FiniteFlags
from ..kernels import ops
from ..kernels.strides import is_dense
from ..layers.dtensor import local
from ..warning import warn

_FEW = 1 << 22  # elements: smaller portions would save little memory, and each costs some launches
_ALIGNMENT = 64  # bytes between which copies begin

State = dict[str, Any]


def portions(params: Sequence[Tensor], together: bool) -> list[list[int]]:
    """Indices of the parameters that one operation takes together: those of one device and type, or each alone.

    A portion has no more elements than the largest parameter (or `_FEW`), so that temporaries stay small.
    """
    most = max([_FEW, *(p.numel() for p in params)])
    result: list[list[int]] = []
    last: dict[Any, tuple[list[int], int]] = {}
    for i, p in enumerate(params):
        kind = (p.device, p.dtype) if together else i
        portion, size = last.get(kind, ([], 0))
        if not portion or size + p.numel() > most:
            portion, size = [], 0
            result.append(portion)
        portion.append(i)
        last[kind] = portion, size + p.numel()
    return result


def move_counters(params: Sequence[Tensor], states: Sequence[State]) -> None:
    """Puts counters of steps on the devices of their parameters, unless they are there."""
    for p, state in zip(params, states, strict=True):
        if state["step"].device != p.device:
            state["step"] = state["step"].to(p.device)


class Hold:
    """Restores parameters, and the state that the first-order rule keeps of them, if their gradient was not finite.

    The device decides, and the host does not wait. The step is taken, and then the old numbers are selected in place of the new
    ones, so that they are the same bit for bit. (Nothing is multiplied by zero: zero times a NaN is a NaN.)

    Args:
        finite: whether the gradient of a parameter is finite, on the device.
        backend: of the kernels. "triton" counts as "auto": what no kernel can restore must not fail when parameters have moved.
    """

    def __init__(self, finite: FiniteFlags, backend: str = "auto") -> None:
        self._finite = finite
        self._backend = "torch" if backend == "torch" else "auto"
        self._flags: dict[Any, Tensor] = {}  # those of a portion together, by its first parameter
        self._uncounted: dict[Any, Tensor] = {}  # 1 for a parameter that stays, 0 for others
        self._room: dict[torch.device, Tensor] = {}

    def reserve(self, params: Sequence[Tensor], states: Sequence[State], names: Sequence[str], together: bool) -> None:
        """Allocates what `over` needs for any portion of these parameters, before the first of them changes.

        Counters that were on the host until now (before the first step, or in a checkpoint) move to the parameters' device.
        """
        move_counters(params, states)
        for places in portions(params, together):
            some = [params[i] for i in places]
            flags = self._finite.gathered(some, params[places[0]].device)
            self._flags[some[0]] = flags
            self._uncounted.update(zip(some, (~flags).to(torch.float32).unbind(), strict=True))
            changing = _changing(some, [states[i] for i in places], names)
            device, needed = changing[0].device, sum(map(_bytes, changing))
            if device not in self._room or len(self._room[device]) < needed:
                self._room.pop(device, None)  # before the new buffer, so that memory never has to hold both
                self._room[device] = torch.empty(needed, dtype=torch.uint8, device=device)

    @contextmanager
    def over(self, params: Sequence[Tensor], states: Sequence[State], names: Sequence[str]) -> Iterator[None]:
        """Context of a step of one portion; `names` are the tensors of a state that it changes, beside the counter."""
        changing = _changing(params, states, names)
        kept = self._copies(changing)
        yield
        try:
            ops.restore(changing, kept, self._flags[params[0]], backend=self._backend)
        except Exception as error:  # no room for the kernel's table, or no kernel; parameters have moved, so this must succeed
            ops.restore(changing, kept, self._flags[params[0]], backend="torch")
            warn(f"parameters with a bad gradient were restored without a kernel, because it failed: {error}")
        torch._foreach_sub_([state["step"] for state in states], [self._uncounted[p] for p in params])

    def _copies(self, tensors: list[Tensor]) -> list[Tensor]:
        sizes = [_bytes(x) for x in tensors]
        pieces = self._room[tensors[0].device][: sum(sizes)].split(sizes)
        kept = []
        for x, piece in zip(tensors, pieces, strict=True):
            elements = piece.view(x.dtype)  # in the order of the tensor's own, where these fill one stretch of memory
            kept.append(elements.as_strided(x.shape, x.stride()) if is_dense(x) else elements[: x.numel()].view(x.shape))
        torch._foreach_copy_(kept, tensors)
        return kept


def _changing(params: Sequence[Tensor], states: Sequence[State], names: Sequence[str]) -> list[Tensor]:
    """All parameters, then all tensors of the first name, and so on."""
    return [_stored(local(x)) for x in (*params, *(state[name] for name in names for state in states))]


def _stored(tensor: Tensor) -> Tensor:
    """The numbers as they are in memory: operators cannot change conjugated and negated views."""
    tensor = tensor.conj() if tensor.is_conj() else tensor
    return tensor._neg_view() if tensor.is_neg() else tensor


def _bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
