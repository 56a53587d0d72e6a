"""A step by the first-order kernels either moves everything or nothing: all that can fail comes before the first parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton import KFAC
from kfac_triton.kernels.first_order import kernel, launch

GROUPS: list[dict[str, Any]] = [
    {"momentum": 0.9},
    {"tail": "adamw", "betas": (0.8, 0.9)},
    {"momentum": 0.0, "weight_decay": 0.1},
]


class Mixed(nn.Module):
    """A covered layer, and beside it parameters of four types, one of which no kernel can move."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        kinds = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
        self.beside = nn.ParameterList(nn.Parameter(torch.rand(n, dtype=kind)) for n, kind in enumerate(kinds, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).square().mean() + sum(p.float().square().sum() for p in self.beside)


def _run() -> tuple[Mixed, KFAC]:
    """Groups of different rules, each with parameters of two types, after two steps and a backward pass."""
    torch.manual_seed(0)
    model = Mixed()
    parameters = [model.layer.weight, *model.beside[:2], *model.beside[2:], model.layer.bias]
    groups = [{"params": parameters[i::3], **options} for i, options in enumerate(GROUPS)]
    optimizer = KFAC(model, groups, lr=0.1, backend="triton")
    for _ in range(2):
        _backward(model, optimizer)
        optimizer.step()
    _backward(model, optimizer)
    return model, optimizer


def _backward(model: Mixed, optimizer: KFAC) -> None:
    optimizer.zero_grad()
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(1))).backward()


def _everything(model: Mixed, optimizer: KFAC) -> list[Tensor]:
    state = [x for p in model.parameters() for x in optimizer.state[p].values() if x is not None]
    return [x.detach().clone() for x in (*model.parameters(), *state)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def moved() -> list[Tensor]:
    """What a step that does not fail leaves."""
    model, optimizer = _run()
    optimizer.step()
    return _everything(model, optimizer)


class NoMemory(TorchDispatchMode):
    """Refuses the at-th request of kernels for memory or for a table, and all later ones."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def ask(self) -> None:
        self.count += 1
        if self.count >= self.at:
            raise torch.OutOfMemoryError(f"request {self.count}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, schema = func(*args, **(kwargs or {})), func._schema
        asks = not schema.is_mutable and not any(r.alias_info for r in schema.returns)
        if asks and (not isinstance(result, Tensor) or result.numel() > 0):  # the interpreter makes empty tensors
            self.ask()
        return result

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Tables are remembered; here they are asked for every time."""

        def asked(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
            def make(*args: Any) -> Tensor:
                self.ask()
                return made(*args)

            return make

        with pytest.MonkeyPatch.context() as patch, self:
            for name in ("device_table", "device_vector"):
                patch.setattr(launch, name, asked(getattr(launch, name)))
            yield


@pytest.mark.parametrize("nesterov", [False, True])
def test_kernels_and_the_rules_beside_them_take_the_steps_of_the_formula(nesterov: bool) -> None:
    """Adam, in float64 by the formula on the gradients that each step saw; of four types, the kernel moves three."""
    torch.manual_seed(0)
    model, rate, beta1, beta2 = Mixed(), 0.1, 0.8, 0.9
    options: dict[str, Any] = {"tail": "adamw", "betas": (beta1, beta2), "nesterov": nesterov, "momentum": 0.0, "eps": 1e-4}
    optimizer = KFAC(model, lr=rate, weight_decay=0.3, backend="triton", **options)
    expected = [(p.detach().double(), 0.0, 0.0) for p in model.beside]
    for t in (1, 2, 3):
        _backward(model, optimizer)
        for i, (p, (x, mean, square)) in enumerate(zip(model.beside, expected, strict=True)):
            g = p.grad.double()
            mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g**2
            ahead = mean / (1 - beta1**t)
            ahead = beta1 * ahead + (1 - beta1) * g if nesterov else ahead
            x = x * (1 - rate * 0.3) - rate * ahead / ((square / (1 - beta2**t)).sqrt() + 1e-4)
            expected[i] = x, mean, square
        optimizer.step()
    for p, (x, *_) in zip(model.beside, expected, strict=True):
        tolerance = 8 * torch.finfo(p.dtype).eps
        torch.testing.assert_close(p.detach().double(), x, rtol=tolerance, atol=tolerance)


def test_without_memory_anywhere_nothing_moves(moved: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused are the k-th request in the constructors of all launches of a step, and all later ones, for every k."""
    constructed, requests = launch.Launch.__init__, 0
    while True:
        model, optimizer = _run()
        before, memory = _everything(model, optimizer), NoMemory(requests + 1)

        def construct(self: launch.Launch, *args: Any, memory: NoMemory = memory) -> None:
            with memory.inside():
                constructed(self, *args)

        monkeypatch.setattr(launch.Launch, "__init__", construct)
        try:
            optimizer.step()
            break
        except torch.OutOfMemoryError:
            assert _equal(before, _everything(model, optimizer)), f"request {requests + 1}"
        requests += 1
        monkeypatch.setattr(launch.Launch, "__init__", constructed)
        _backward(model, optimizer)
        optimizer.step()
        assert _equal(moved, _everything(model, optimizer))
    assert requests == 3 * len(GROUPS) + 5  # constants, counters and factors of a group; tables of one, two and two types


def test_what_moves_parameters_asks_for_nothing(moved: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    ran, calls = launch.Launch.run, []

    def run(self: launch.Launch) -> None:
        calls.append(self)
        with NoMemory(1).inside():
            ran(self)

    monkeypatch.setattr(launch.Launch, "run", run)
    model, optimizer = _run()
    optimizer.step()
    assert _equal(moved, _everything(model, optimizer))
    assert len(calls) == 3 * len(GROUPS)  # in three steps


@pytest.mark.parametrize("place", range(5))
def test_a_kernel_that_does_not_compile_moves_nothing(place: int, moved: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds of kernels that have not run before run on nothing first: groups of other rules, and types, have others."""
    model, optimizer = _run()
    before = _everything(model, optimizer)
    monkeypatch.setattr(launch, "_COMPILED", set())
    kinds: list[dict[str, Any]] = []

    class Compiler:
        """Launches, but for one kind, that of this place among those which differ."""

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launched(*args: Any, **kind: Any) -> None:
                if kind not in kinds:
                    kinds.append(kind)
                if kinds.index(kind) == place:
                    raise RuntimeError("out of registers")
                original[grid](*args, **kind)

            return launched

    original = kernel.move_kernel
    monkeypatch.setattr(kernel, "move_kernel", Compiler())
    with pytest.raises(RuntimeError, match="registers"):
        optimizer.step()
    assert _equal(before, _everything(model, optimizer))
    monkeypatch.setattr(kernel, "move_kernel", original)
    _backward(model, optimizer)
    optimizer.step()
    assert _equal(moved, _everything(model, optimizer))
