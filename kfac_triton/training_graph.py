"""A whole training step as one CUDA graph: recorded, replayed, mended and recorded anew without the user's help."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import validation
from .base import KFACBase
from .cuda_graphs import require_recordable_settings
from .steps.recorded import RecordedRates, Watch
from .warning import warn

# Replays between two eager steps that mend refused inverses: a factor that every refresh refuses must not make all steps eager.
_APART = 10


def graphed_step(
    optimizer: Optimizer,
    loss_of_batch: Callable[..., Tensor],
    *,
    warmup: int = 3,
    mend_every: int = 100,
    max_shapes: int = 4,
    before_step: Callable[[], object] | None = None,
) -> GraphedStep:
    """Makes a function that trains on a batch: forward pass, backward pass and optimizer step as one CUDA graph.

    Every call takes one step on its batch. The first ones run eagerly, then the step is recorded, and later batches are copied
    into the recorded one and replayed. Whatever a replay cannot do is done by an eager step in its place: a batch of another
    shape, inverses that were refused, changed settings. On a CPU every step is eager.

    Args:
        optimizer: `KFAC` with capturable=True; or any other optimizer that a CUDA graph can record, also with an attached
            `KFACPreconditioner`. A learning rate that is a number becomes a tensor on the parameters' device where the group
            has capturable=True, so that schedulers work.
        loss_of_batch: computes the loss from what the step is called with. It must not read from the device.
        warmup: number of eager steps with batches of one shape before these are recorded.
        mend_every: largest number of replays without an eager step, which recomputes inverses that a replay could not. When
            a refusal has been seen, the eager step comes earlier.
        max_shapes: number of batch shapes to record, each with memory of its own; batches of other shapes run eagerly.
        before_step: called between the backward pass and the step, for example to clip gradients; it is recorded, too.

    Returns:
        A `GraphedStep`.

    Raises:
        TypeError: if an argument has the wrong type.
        ValueError: if a number is out of range, or a CUDA graph cannot record steps with this optimizer's settings.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from kfac_triton import KFAC, graphed_step
        >>> device = "cuda" if torch.cuda.is_available() else "cpu"
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(device)
        >>> optimizer = KFAC(model, lr=0.1, damping=0.1, capturable=True)
        >>> loss_function = nn.CrossEntropyLoss()
        >>> step = graphed_step(optimizer, lambda x, y: loss_function(model(x), y))
        >>> for _ in range(5):
        ...     loss = step(torch.randn(16, 4), torch.randint(2, (16,)))
        >>> optimizer.close()
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, but is {type(optimizer).__name__}")
    if not callable(loss_of_batch):
        raise TypeError(f"loss_of_batch must be a function of the batch, but is {type(loss_of_batch).__name__}")
    numbers = {"warmup": warmup, "mend_every": mend_every, "max_shapes": max_shapes}
    numbers = {name: validation.whole(name, value) for name, value in numbers.items()}
    return GraphedStep(optimizer, loss_of_batch, before_step, **numbers)


@dataclass
class _Recording:
    """A recorded step.

    Attributes:
        graph: to replay.
        batch: the tensors that it reads.
        loss: the tensor that it writes.
    """

    graph: torch.cuda.CUDAGraph
    batch: list[Tensor]
    loss: Tensor


@dataclass
class _Shape:
    """Batches of one shape: how many ran eagerly since something changed, and the recorded step."""

    eager: int = 0
    recording: _Recording | None = None


@dataclass
class _Counts:
    """Steps since construction, by kind.

    Attributes:
        eager: not replayed.
        replayed: as a graph.
        mended: eager ones that came because of replays.
        recorded: graphs that were made.
    """

    eager: int = 0
    replayed: int = 0
    mended: int = 0
    recorded: int = 0


class GraphedStep:
    """Trains on a batch; see `graphed_step`.

    Attributes:
        counts: number of steps so far, by kind: `eager`, `replayed`, `mended` (eager, because of refused inverses or
            `mend_every`), and the number of graphs that were `recorded`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        loss_of_batch: Callable[..., Tensor],
        before_step: Callable[[], object] | None,
        warmup: int,
        mend_every: int,
        max_shapes: int,
    ) -> None:
        self._optimizer, self._loss_of_batch, self._before_step = optimizer, loss_of_batch, before_step
        self._warmup, self._mend_every, self._max_shapes = warmup, mend_every, max_shapes
        self._kfac = _kfac_of(optimizer)
        self.counts = _Counts()
        self._shapes: dict[Hashable, _Shape] = {}
        self._since_eager = self._since_recorded = 0  # replays
        self._short_lived = 0  # graphs in a row that were hardly replayed
        self._warned = False
        self._device = self._require_device()
        self._rates, self._watch = RecordedRates(self._device), Watch()
        self._records = can_record(self._device)
        self._require_recordable()
        if self._records:
            self._stream = torch.cuda.Stream(self._device)
        else:
            warn(f"CUDA graphs need a GPU, and the parameters are on {self._device}: graphed_step runs every step eagerly")
        this = weakref.ref(self)  # the optimizer must not keep the graphs

        def forget(_: Optimizer) -> None:
            """The loaded state is in other tensors, and inverses have to be computed from it."""
            if (step := this()) is not None:
                step.forget()

        optimizer.register_load_state_dict_post_hook(forget)

    def __call__(self, *batch: Any, **named: Any) -> Tensor:
        """One training step.

        Args:
            batch: arguments of `loss_of_batch`: tensors on any device that need no gradient, and containers of tensors. Other
                values must be hashable; each is recorded as it is.
            named: likewise.

        Returns:
            The loss before the step, a tensor of its own on the device; reading it waits for the step.

        Raises:
            RuntimeError: if the step cannot be recorded; the cause says why. Nothing has been trained then.
            ValueError: if a tensor of the batch requires a gradient.
        """
        leaves, layout = tree_flatten((batch, named))
        if any(isinstance(x, Tensor) and x.requires_grad for x in leaves):
            raise ValueError(
                "a tensor of the batch requires a gradient, which replays would not compute: compute this tensor in "
                "loss_of_batch, or detach it"
            )
        if not self._records:
            return self._eager(layout, self._on_device(leaves))
        self._rates.keep(self._optimizer.param_groups)
        self._notice_changes()
        # 1, 1.0 and True are equal, but not the same step.
        key = (layout, *((x.shape, x.dtype) if isinstance(x, Tensor) else (type(x), x) for x in leaves))
        shape = self._shapes.setdefault(key, _Shape())
        if shape.recording is None and shape.eager >= self._warmup and self._has_room() and self._is_ready():
            shape.recording = self._record(layout, self._on_device(leaves))
            return self._replay(shape.recording, leaves)
        if shape.recording is None:
            shape.eager += 1
            return self._eager(layout, self._on_device(leaves))
        if self._must_mend():
            self.counts.mended += 1
            return self._eager(layout, self._on_device(leaves))
        return self._replay(shape.recording, leaves)

    def forget(self) -> None:
        """Drops the recorded graphs. The next step is eager, and graphs are recorded anew after it."""
        for shape in self._shapes.values():
            shape.recording, shape.eager = None, min(shape.eager, self._warmup - 1)
        self._since_recorded = 0

    def _on_device(self, leaves: Iterable[Any]) -> list[Any]:
        # Detached, so that requires_grad_() in loss_of_batch does not change the user's tensor.
        return [x.to(self._device, non_blocking=True).detach() if isinstance(x, Tensor) else x for x in leaves]

    def _step(self, layout: Any, leaves: list[Any]) -> Tensor:
        self._optimizer.zero_grad()
        batch, named = tree_unflatten(leaves, layout)
        loss = self._loss_of_batch(*batch, **named)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_of_batch must return the loss, a tensor with one element, but the result is {what}")
        loss.backward()
        if self._before_step is not None:
            self._before_step()
        self._optimizer.step()
        return loss.detach()

    def _eager(self, layout: Any, leaves: list[Any]) -> Tensor:
        if self._records:
            # On the stream that will be recorded: what PyTorch's libraries set up at their first calls is set up for it.
            current = torch.cuda.current_stream(self._device)
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    loss = self._step(layout, leaves)
            finally:
                current.wait_stream(self._stream)  # also for what a step that failed has restored
        else:
            loss = self._step(layout, leaves)
        self._since_eager = 0
        self.counts.eager += 1
        return loss

    def _record(self, layout: Any, leaves: list[Any]) -> _Recording:
        # Copies, because the user's batch may be freed or overwritten.
        leaves = [x.clone() if isinstance(x, Tensor) else x for x in leaves]
        graph = torch.cuda.CUDAGraph()
        cause: Exception | None = None
        try:
            # Only this thread is restricted: a loader's thread may go on pinning memory. Graphs share no memory: shared pools
            # are safe for graphs that are replayed in the order in which they were recorded.
            # The outer context makes the user's stream current again, which torch.cuda.graph does not do after an error.
            with (
                torch.cuda.stream(self._stream),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                try:
                    loss = self._step(layout, leaves)
                except Exception as error:
                    cause = error  # ending the recording raises another one, which says less
                    raise
        except Exception as error:
            self._drop_unfinished()
            reason = str(cause or error).strip().partition("\n")[0]
            raise RuntimeError(
                f"a CUDA graph cannot record this step: {reason}. Take what reads from the device out of loss_of_batch, or "
                "train without graphed_step (docs/speed.md lists what cannot be recorded)"
            ) from (cause or error)
        self.counts.recorded += 1
        self._since_recorded = 0
        return _Recording(graph, [x for x in leaves if isinstance(x, Tensor)], loss)

    def _drop_unfinished(self) -> None:
        """Drops gradients and statistics of a recording that failed: their memory was never written."""
        self._optimizer.zero_grad()
        if self._kfac is not None:
            self._kfac.forget_statistics()

    def _replay(self, recording: _Recording, leaves: Iterable[Any]) -> Tensor:
        with torch.no_grad():  # loss_of_batch may have asked for the gradient of a tensor of the batch
            for static, new in zip(recording.batch, (x for x in leaves if isinstance(x, Tensor)), strict=True):
                static.copy_(new, non_blocking=True)
        recording.graph.replay()
        self._since_eager += 1
        self._since_recorded += 1
        self.counts.replayed += 1
        return recording.loss.clone()  # the next replay writes another one

    def _has_room(self) -> bool:
        return sum(shape.recording is not None for shape in self._shapes.values()) < self._max_shapes

    def _is_ready(self) -> bool:
        """Whether K-FAC has the inverses that a replay starts from."""
        return self._kfac is None or not self._kfac.engine.progress.has_new_layers

    def _must_mend(self) -> bool:
        """Whether an eager step is due: K-FAC's inverses that a refresh refused are recomputed by code on the host."""
        if self._kfac is None:
            return False
        if self._since_eager >= self._mend_every or not self._is_ready():
            return True
        return self._since_eager >= _APART and self._kfac.engine.curvature.was_refused()

    def _notice_changes(self) -> None:
        """Drops graphs that no longer do what a step would do."""
        groups = self._optimizer.param_groups
        parts: list[Any] = [x for group in groups for name, value in group.items() if name != "params" for x in (name, value)]
        if self._kfac is not None:
            parts += [self._kfac.engine, self._kfac.engine.settings, self._kfac.engine.closed]
        for group in groups:
            parts += [x for p in group["params"] for x in (p, p.data_ptr(), p.requires_grad)]
        has_graphs = any(shape.recording is not None for shape in self._shapes.values())
        if self._watch.differs(parts) and has_graphs:
            self._short_lived = self._short_lived + 1 if self._since_recorded < 2 else 0
            if self._short_lived >= 2 and not self._warned:
                self._warned = True
                warn(
                    "graphed_step records anew, because an option of a parameter group changes in almost every step, and so "
                    "hardly replays: keep options other than lr constant, and pass capturable=True for lr"
                )
            self.forget()

    def _require_device(self) -> torch.device:
        devices = {p.device for group in self._optimizer.param_groups for p in group["params"]}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ValueError(f"a CUDA graph records one device, but the optimizer's parameters are on {names}")
        return devices.pop()

    def _require_recordable(self) -> None:
        # PyTorch's own optimizers refuse capturable=True on a CPU.
        must_be_capturable = self._records or isinstance(self._optimizer, KFACBase)
        for number, group in enumerate(self._optimizer.param_groups):
            if must_be_capturable and group.get("capturable") is False:
                raise ValueError(
                    f"group {number} has capturable=False, so no CUDA graph can record a step: pass capturable=True"
                )
        if self._records and self._kfac is not None:
            engine = self._kfac.engine
            require_recordable_settings(engine.settings, engine.bank.stacks, engine.uses_kernels)


def can_record(device: torch.device) -> bool:
    """Whether there are CUDA graphs."""
    return device.type == "cuda"


def _kfac_of(optimizer: Optimizer) -> KFACBase | None:
    """The optimizer itself if it is K-FAC, or a preconditioner that is attached to it."""
    if isinstance(optimizer, KFACBase):
        return optimizer
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", {}).values()
    owners = (getattr(hook, "__self__", None) for hook in hooks)
    return next((owner for owner in owners if isinstance(owner, KFACBase)), None)
