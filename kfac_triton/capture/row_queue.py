"""A queue of passes that are not summed yet, so that one launch adds those of many layers to their sums."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..kernels.device_tables import device_vector
from ..layers import Layer, Rows
from .gate import Gate
from .loss_terms import ONE, Number, Weight, is_one
from .sums import Item, Kind


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Pass(NamedTuple):
    """Rows of one backward pass through a layer.

    Attributes:
        rows: the rows.
        with_inputs: whether those of A are to be summed, too.
        weight: of those of G.
        with_gradients: whether those of G are to be summed.
    """

    rows: Rows
    with_inputs: bool
    weight: Weight = ONE
    with_gradients: bool = True


class Summed(Hashable, Protocol):
    """A layer whose passes can be queued: its `capture.statistics.Statistics`."""

    layer: Layer

    def targets(self, one: Pass) -> list[tuple[Kind, Item, int]]:
        """For every sum that the pass is added to its kind, the item, and its place in the shared vector of betas."""


class RowQueue:
    """The passes of all layers that have their sums on one device and in one type.

    They are summed together at the end of the backward pass, or before, as soon as their rows take more than
    `Gate.max_kept_bytes`. Afterwards the user may overwrite activations and gradients in place, and their memory is freed. If
    the backward pass fails, they are summed with those of the next one, or when the step begins.

    Args:
        betas: the vector that these layers share, with an entry for each sum; see `SharedCounts`.
        gate: has the limit.
        backend: backend of the kernels.
        can_wait: whether a launch can sum many layers. Otherwise waiting gains nothing, and every pass is summed at once.
    """

    def __init__(self, betas: Tensor, gate: Gate, backend: str, can_wait: bool) -> None:
        self._betas, self._alphas = betas, torch.ones_like(betas)
        self._gate, self._backend, self._can_wait = gate, backend, can_wait
        self._passes: dict[Summed, list[Pass]] = {}
        self._storages: dict[int, int] = {}  # bytes of each storage that rows are views of, by its address
        self._bytes = 0
        self._versions: list[tuple[Summed, Tensor, int]] = []  # how often each source had been changed in place
        self._task = -1  # the backward pass at whose end the queue is emptied
        self._stream: Any = None  # the stream on which the rows were computed

    def put(self, statistics: Summed, passes: list[Pass]) -> None:
        """Queues passes through a layer; if there are earlier ones, these are summed first."""
        if statistics in self._passes:
            self.flush()
        stream = _current_stream(self._betas.device)
        if self._passes and stream != self._stream:
            with torch.cuda.stream(self._stream):  # where the rows are ready
                self.flush()
        self._stream = stream
        self._passes[statistics] = passes
        task = torch._C._current_graph_task_id()
        if not self._can_wait or task < 0:
            self.flush()
            return
        self._count_bytes(passes)
        sources = [source for one in passes for source in one.rows.inputs + one.rows.gradients]
        self._versions += [(statistics, source, source._version) for source in sources]
        if self._bytes > self._gate.max_kept_bytes:
            self.flush()
        elif task != self._task:
            self._task = task
            torch.autograd.Variable._execution_engine.queue_callback(self.flush)

    def flush(self) -> None:
        """Sums all passes. Where a layer has several, as many calls follow one another, each with at most one of a layer.

        Raises:
            RuntimeError: if a source was changed in place, as an autograd function must not do with its incoming gradient.
        """
        if not self._passes:
            return
        for statistics, source, version in self._versions:
            if source._version != version:
                raise RuntimeError(
                    f"an input or a gradient of layer {statistics.layer.name!r} was changed in place before the backward pass "
                    "ended, by an autograd function or a hook: let it change a copy, or pass max_kept_bytes=0"
                )
        stream = _current_stream(self._betas.device)
        if stream != self._stream:  # that of the caller of backward, at its end, or that of the step
            self._lend_to(stream)
        with torch.no_grad():
            while self._passes:
                self._sum({statistics: passes[0] for statistics, passes in self._passes.items()})
                # Not before, so that a pass whose sum failed (no memory) is not lost.
                self._passes = {statistics: passes[1:] for statistics, passes in self._passes.items() if len(passes) > 1}
        self.clear()

    def clear(self) -> None:
        """Drops all passes."""
        self._passes, self._bytes = {}, 0
        self._storages.clear()
        self._versions.clear()

    @without_autocast
    def _sum(self, passes: dict[Summed, Pass]) -> None:
        found: dict[Kind, list[tuple[int, Item, Weight]]] = defaultdict(list)
        for statistics, one in passes.items():
            for kind, item, place in statistics.targets(one):
                found[kind].append((place, item, ONE if item.part.is_input else one.weight))
        # In the order of layers, so that the tables of a launch are the same in every step.
        members = {kind: sorted(entries, key=lambda entry: entry[0]) for kind, entries in found.items()}
        everything = [entry for entries in members.values() for entry in entries]
        if not everything:
            return
        first, count = everything[0][0], len(everything)
        places = [place for place, _, _ in everything]
        if places == list(range(first, first + count)):  # those of one layer, always: no table is needed
            own = betas = self._betas[first : first + count]
            index = None
        else:
            index = device_vector(places, self._betas.device)
            own, betas = self._betas, self._betas.index_select(0, index)
        start, alphas = 0, self._alphas
        if any(weight is not ONE or item.rows.share != 1 for _, item, weight in everything):
            alphas = vector_of([divided(weight.new, item.rows.share) for _, item, weight in everything], alphas)
            if not all(is_one(weight.old) for _, _, weight in everything):
                betas = betas * vector_of([weight.old for _, _, weight in everything], alphas)
        for kind, entries in members.items():
            run = slice(start, start + len(entries))
            kind([item for _, item, _ in entries], alphas[run], betas[run], self._backend)
            start = run.stop
        own.fill_(1.0) if index is None else own.index_fill_(0, index, 1.0)

    def _count_bytes(self, passes: list[Pass]) -> None:
        """Of whole storages: a view of every tenth row keeps all rows. Layers that read one input keep it once."""
        for one in passes:
            for source in one.rows.inputs + one.rows.gradients:
                storage = source.untyped_storage()
                address = storage.data_ptr()
                if address not in self._storages:
                    self._storages[address] = size = storage.nbytes()
                    self._bytes += size

    def _lend_to(self, stream: Any) -> None:
        """Lets this stream read rows of another one: when they are ready, and before their memory is reused."""
        stream.wait_stream(self._stream)
        for passes in self._passes.values():
            for one in passes:
                for source in one.rows.inputs + one.rows.gradients:
                    source.record_stream(stream)


def divided(weight: Number, share: float) -> Number:
    """The weight of rows of which this share was kept."""
    return weight if share == 1 else weight / share


def vector_of(numbers: list[Number], like: Tensor) -> Tensor:
    """A vector of numbers that the host knows, and of others that only the device does."""
    on_host = [number for number in numbers if not isinstance(number, Tensor)]
    if len(on_host) == len(numbers):
        return device_vector(on_host, like.device, like.dtype)
    places = [i for i, number in enumerate(numbers) if isinstance(number, Tensor)]
    on_device = torch.stack([number.to(like) for number in numbers if isinstance(number, Tensor)])
    known = device_vector([1.0 if isinstance(number, Tensor) else number for number in numbers], like.device, like.dtype)
    return known.index_put((device_vector(places, like.device),), on_device)  # no number is copied to the device with a wait
