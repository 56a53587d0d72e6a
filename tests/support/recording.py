"""A CUDA graph on a CPU: records what a training step does on the device, forbids what no graph records, and does it again.

A replay runs recorded operations and kernel launches on the same tensors, in their order, and not one line of the host's code.
What the host had decided stays decided, what it had counted stays where it was.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.helpers import mlp
from support.launches import READING, WAITING
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kfac_triton import KFAC
from kfac_triton.kernels import device_tables, runtime
from kfac_triton.kernels.operators import OPERATORS
from kfac_triton.kernels.runtime import triton

WARM, REPLAYS = 2, 2  # steps before a recording, and replays after it
LOSS = nn.CrossEntropyLoss()
ORIGINALS = {name: getattr(Tensor, name) for name in READING}
PACKAGE = inspect.getmodule(device_tables).__name__.partition(".")[0]  # type: ignore[union-attr]


def _tensors(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _storages(values: Any) -> set[int]:
    return {x.untyped_storage()._cdata for x in _tensors(values)}


@contextmanager
def _readable() -> Iterator[None]:
    """Inside, numbers may be read from tensors again: the interpreter of the kernels does, which a GPU does not have."""
    with pytest.MonkeyPatch.context() as patch:
        for name, original in ORIGINALS.items():
            patch.setattr(Tensor, name, original)
        yield


class Tape(TorchDispatchMode):
    """What was recorded.

    Attributes:
        actions: of the device, in their order.
        launches: names of the kernels among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.actions: list[Callable[[], None]] = []
        self.launches: list[str] = []
        self.may_send = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if func.namespace == PACKAGE:  # not what it is called, but what it does
            with self:
                return OPERATORS[name].run(name, *args, **kwargs)
        has_mask = name.startswith("index") and any(x.dtype == torch.bool for x in _tensors(args[1:2]))
        if name in WAITING or has_mask:
            raise AssertionError(f"{func} waits for the device")
        if name == "lift_fresh" and not self.may_send:
            raise AssertionError("a tensor is made of numbers on the host: a GPU would wait for the copy")
        result = func(*args, **kwargs)
        if func.namespace != "profiler":
            self._record(func, args, kwargs, _tensors(result))
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        before = _storages((args, kwargs))
        is_new = [x.untyped_storage()._cdata not in before for x in results]
        if not func._schema.is_mutable and not any(is_new):
            return  # a view, which needs nothing done

        def action() -> None:
            again = _tensors(func(*args, **kwargs))
            for old, new, own in zip(results, again, is_new, strict=True):
                if own:
                    old.copy_(new)

        self.actions.append(action)

    def launch(self, kernel: Any, args: Any, kwargs: Any) -> Any:
        """Runs a kernel and records the launch."""

        def action() -> None:
            LAUNCH(kernel, *args, **kwargs)

        with _disable_current_modes(), _readable():
            action()
        self.actions.append(action)
        self.launches.append(kernel.fn.__name__)

    def replay(self) -> None:
        """What the device does when a graph is launched."""
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for action in self.actions:
                action()


KERNEL = type(triton.jit(lambda: None))
LAUNCH = KERNEL.run


@contextmanager
def recorded() -> Iterator[Tape]:
    """Records what happens inside, which takes place as well; whatever would make the host wait raises AssertionError."""
    tape = Tape()
    make = device_tables._copies.__wrapped__

    def refuse(name: str) -> Any:
        def read(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"Tensor.{name} reads from the device")

        return read

    def table(*args: Any) -> Any:
        """The copy of pinned memory, which a graph may have; it is the same at every replay."""
        tape.may_send = True
        try:
            return make(*args)
        finally:
            tape.may_send = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "is_recording", lambda: True)
        patch.setattr(device_tables._copies, "__wrapped__", table)
        patch.setattr(KERNEL, "run", lambda self, *args, **kwargs: tape.launch(self, args, kwargs))
        for name in READING:
            patch.setattr(Tensor, name, refuse(name))
        with tape:
            yield tape


def rows(*shape: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """Batches of 12 examples of this shape, and classes."""
    return lambda: (torch.randn(12, *shape), torch.randint(4, (12,)))


def _mlp() -> nn.Module:
    return mlp(torch.float32)


@dataclass(frozen=True)
class Case:
    """A model, its batches, and options of `KFAC`."""

    model: Callable[[], nn.Module] = _mlp
    batch: Callable[[], tuple[Tensor, Tensor]] = field(default_factory=lambda: rows(5))
    options: dict[str, Any] = field(default_factory=dict)
    passes: int = 1
    clip: bool = False


class Run:
    """A training run with a static batch, whose step can be recorded; of `KFAC`, or of what `make` gives for a model."""

    def __init__(self, case: Case, make: Callable[[nn.Module], Any] | None = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.case, self.model = case, case.model()
        settings = {"lr": torch.tensor(0.1), "damping": 0.1, "inverse": "factored", "capturable": True, "backend": "triton"}
        make = make or (lambda model: KFAC(model, **{**settings, **case.options, **options}))
        self.optimizer = make(self.model)
        self.batch, self.seed = case.batch(), 0
        self.tape: Tape | None = None

    def load(self) -> None:
        """The next batch, into the static one."""
        torch.manual_seed(self.seed)
        self.seed += 1
        for static, new in zip(self.batch, self.case.batch(), strict=True):
            static.copy_(new)

    def backward(self) -> None:
        inputs, targets = self.batch
        self.optimizer.zero_grad()
        for x, y in zip(inputs.chunk(self.case.passes), targets.chunk(self.case.passes), strict=True):
            outputs = self.model(x)
            if self.case.options.get("fisher"):
                self.optimizer.accumulate_fisher(outputs, y)
            (self.case.options.get("loss", LOSS)(outputs, y) / self.case.passes).backward()

    def step(self) -> None:
        self.backward()
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.load()
            self.step()

    def record(self) -> Tape:
        self.load()
        with recorded() as self.tape:
            self.step()
        return self.tape

    def replay(self, count: int = 1) -> None:
        assert self.tape is not None
        for _ in range(count):
            self.load()
            self.tape.replay()

    def state(self) -> list[Tensor]:
        """All that a step changes on the device."""
        engine = self.optimizer.engine
        tail = [x for p in self.model.parameters() for x in self.optimizer.state[p].values()]
        inverses = [y for x in engine.curvature.inverses for y in (x.values, x.residual, x.damping, x.fallbacks)]
        factors = [side for pair in self.optimizer.factors().values() for side in pair]
        counters = [engine.bank.updates, engine.dropped_statistics, engine.dropped_gradients, self.optimizer._run.dropped]
        everything = (*self.model.parameters(), *tail, *factors, *inverses, *counters, engine.kl_clip_scale)
        return [x.detach().clone() for x in everything if x is not None]


def equal(first: Run, second: Run) -> bool:
    """Whether all that they have changed is the same, bit for bit."""
    pairs = list(zip(first.state(), second.state(), strict=True))
    assert all(x.isfinite().all() or not x.is_floating_point() for x, _ in pairs)
    return all(torch.equal(x, y) for x, y in pairs)
