"""A step that fails half way leaves parameters, factors and counters as they were, wherever it fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.runs import SETTINGS, backward, net, train, vector
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.kernels import ops


class OutOfMemory(TorchDispatchMode):
    """Refuses the at-th operation that asks for memory."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.count = at, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        asks = not schema.is_mutable and not any(r.alias_info for r in schema.returns) and func.namespace != "profiler"
        self.count += asks
        if asks and self.count == self.at:
            raise torch.OutOfMemoryError(f"no memory for {func}")
        return func(*args, **(kwargs or {}))


def _everything(model: nn.Module, optimizer: KFAC) -> list[Tensor]:
    engine = optimizer.engine
    factors = [side for pair in optimizer.factors().values() for side in pair]
    state = [x for p in model.parameters() for x in optimizer.state[p].values() if x is not None]
    if engine.curvature.adam is not None:
        for number in range(len(engine.partition.tiles)):
            state += engine.curvature.adam.views(number)
        state.append(engine.bank.sampling)
    numbers = torch.tensor([engine.progress.steps, engine.progress.refreshes, len(engine.progress.without_statistics)])
    return [x.detach().clone() for x in (*model.parameters(), *factors, *state, engine.bank.updates, numbers)]


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 4, 3, groups=2), nn.Flatten(), nn.Tanh(), nn.Linear(16, 3), nn.LayerNorm(3))


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("first", [0, 2], ids=["first step", "later step"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "adamw"])
def test_out_of_memory_anywhere_in_a_step(name: str, first: int, stride: int) -> None:
    """The k-th request for memory is refused, for every k until a step asks for fewer; and the next step is a good one."""
    refused = first
    while True:
        model = _model()
        optimizer = KFAC(model, lr=0.1, **SETTINGS[name])
        train(model, optimizer, range(first))
        backward(model, first)
        before, memory = _everything(model, optimizer), OutOfMemory(refused + stride)
        try:
            with memory:
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            refused += stride
        assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True)), f"request {refused}"
        train(model, optimizer, range(first, first + 1))
        assert optimizer.engine.progress.steps == first + 1
        assert vector(model).isfinite().all()
    assert refused > 50


@pytest.mark.parametrize("name", ["default", "old inverses", "diagonals"])
def test_the_step_after_a_failed_one_is_as_if_it_had_not_been(name: str) -> None:
    results = []
    for fails in (False, True):
        model = _model()
        optimizer = KFAC(model, lr=0.1, **SETTINGS[name])
        train(model, optimizer, range(3))
        if fails:
            backward(model, 99)
            with pytest.raises(torch.OutOfMemoryError), OutOfMemory(30):
                optimizer.step()
        train(model, optimizer, range(3, 6))
        results.append(vector(model))
    assert torch.equal(*results)


def test_kernels_path_backs_up_what_waited() -> None:
    """There rows go straight into the factors: the copies are made before."""
    for at in range(1, 500, 17):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
        optimizer = KFAC(model, lr=0.1, backend="triton")

        def gradients(model: nn.Module = model, optimizer: KFAC = optimizer) -> None:
            optimizer.zero_grad()
            model(torch.randn(3, 5).requires_grad_()).square().mean().backward()

        gradients()
        optimizer.step()
        gradients()
        assert all(s.deferred for s in optimizer.engine.statistics)
        before = _everything(model, optimizer)
        try:
            with OutOfMemory(at):
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))
    assert at > 50


def test_a_closure_that_fails_in_lr_auto() -> None:
    model = net(torch.float64)
    optimizer = KFAC(model, lr="auto", loss=nn.MSELoss(), damping=1.0)
    train(model, optimizer, range(2))
    before, calls = _everything(model, optimizer), []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(torch.ones(8, 2, 6, dtype=torch.float64)), torch.zeros(8, 3, dtype=torch.float64)

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))
    train(model, optimizer, range(2, 4))
    assert optimizer.engine.progress.steps == 4


def test_a_preconditioner_that_fails_leaves_its_factors() -> None:
    model = net()
    preconditioner = KFACPreconditioner(model)
    backward(model, 0)
    preconditioner.precondition_()
    backward(model, 1)
    before, updates = preconditioner.factors(), preconditioner.engine.bank.updates.clone()
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(100):
        preconditioner.precondition_()
    after = preconditioner.factors()
    assert all(torch.equal(x, y) for k in before for x, y in zip(before[k], after[k], strict=True))
    assert torch.equal(preconditioner.engine.bank.updates, updates)
    assert preconditioner.engine.progress.steps == 1


@pytest.mark.parametrize("at_step", range(4))
def test_a_step_that_fails_and_is_done_again_is_the_step(at_step: int) -> None:
    """Wherever it failed: whether statistics, inverses, both or neither were due, and damping has changed."""
    settings: dict[str, Any] = {"statistics_every": 3, "inverse_every": 2, "inverse": "cholesky", "lr": 0.1}

    def run(refused: int | None) -> tuple[Tensor, int, bool]:
        model, failed = _model(), False
        optimizer = KFAC(model, damping=lambda step: 0.1 if step < 1 else 0.05, **settings)
        train(model, optimizer, range(at_step))
        refreshes = optimizer.engine.progress.refreshes
        if refused is not None:
            backward(model, at_step)
            try:
                with OutOfMemory(refused):
                    optimizer.step()
            except torch.OutOfMemoryError:
                failed = True
            else:
                return vector(model), 0, False
        train(model, optimizer, range(at_step, 6))
        return vector(model), optimizer.engine.progress.refreshes - refreshes, failed

    expected, refreshes, _ = run(None)
    for refused in range(1, 2000, 11):
        found, its_refreshes, failed = run(refused)
        if not failed:
            break
        assert torch.equal(found, expected), f"request {refused}"
        assert its_refreshes == refreshes, f"request {refused}"
    assert refused > 20


def test_a_failed_step_with_another_damping_leaves_no_inverses_of_it() -> None:
    """Neither where none were made (nothing is due again then), nor where they were."""
    for at_step, refreshes in ((1, 1), (2, 2)):
        results = []
        for fails in (False, True):
            model = _model()
            optimizer = KFAC(model, lr=0.1, damping=0.1, inverse="cholesky", statistics_every=9, inverse_every=2)
            train(model, optimizer, range(at_step))
            if fails:
                optimizer.change(damping=0.5)
                _fail_at_the_end(model, optimizer, at_step)
                optimizer.change(damping=0.1)
            train(model, optimizer, range(at_step, 4))
            results.append(vector(model))
        assert torch.equal(*results)
        assert optimizer.engine.progress.refreshes == refreshes


def _fail_at_the_end(model: nn.Module, optimizer: KFAC, step: int) -> None:
    """The last request for memory of a step is refused, when all but the parameters has changed."""
    twin, its = copy.deepcopy((model, optimizer))
    backward(twin, step)
    memory = OutOfMemory(0)
    with memory:
        its.step()
    backward(model, step)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(memory.count):
        optimizer.step()


@pytest.mark.parametrize("at_step", [3, 4], ids=["inverses due", "statistics alone"])
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "adamw"])
def test_the_batch_of_a_failed_step_leaves_no_trace(name: str, at_step: int) -> None:
    """Where inverses or moments start from the last, too: whatever the batch was, the run goes on with the same bits."""
    results = []
    for batch in (98, 99):
        model = net()
        optimizer = KFAC(model, **{"lr": 0.1, **SETTINGS[name], "inverse_every": 3, "statistics_every": 1})
        train(model, optimizer, range(at_step))
        _fail_at_the_end(model, optimizer, batch)
        train(model, optimizer, range(at_step, at_step + 3))
        results.append(vector(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ArithmeticError])
def test_an_attached_closure_that_is_interrupted_leaves_no_statistics(error: type[BaseException]) -> None:
    model = net()
    preconditioner = KFACPreconditioner(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner.attach(optimizer)

    def closure() -> Tensor:
        backward(model, 0)
        raise error

    with pytest.raises(error):
        optimizer.step(closure)
    assert all(s.counts.tolist() == [0, 0] for s in preconditioner.engine.statistics)
    assert preconditioner.engine.progress.steps == 0


def test_kernels_path_backs_up_what_waited_beside_what_was_summed() -> None:
    """One stack has both: the first layer's input is the user's own, and cannot wait."""
    kept = None
    for at in (None, *range(1, 500, 17)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
        optimizer = KFAC(model, lr=0.1, backend="triton" if at else "torch")
        for seed in range(2):
            optimizer.zero_grad()
            model(torch.randn(3, 5, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            if seed == 0:
                optimizer.step()
        if at is None:
            optimizer.step()
            kept = optimizer.factors()
            continue
        assert [bool(s.deferred) for s in optimizer.engine.statistics] == [False, True]
        before = _everything(model, optimizer)
        try:
            with OutOfMemory(at):
                optimizer.step()
            break
        except torch.OutOfMemoryError:
            assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True)), f"request {at}"
    assert at is not None
    assert at > 50
    assert kept is not None
    for name, pair in optimizer.factors().items():
        for x, y in zip(pair, kept[name], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor_dtype", ["float32", "bfloat16"])
def test_an_interrupt_in_the_middle_of_the_average(factor_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And after it: what a second failure finds are the factors as they are by then."""
    model, other = _model(), _model()
    optimizer, source = KFAC(model, factor_dtype=factor_dtype), KFAC(other, factor_dtype=factor_dtype)
    train(model, optimizer, range(2))
    train(other, source, range(5))
    blend = ops.blend

    def interrupted(*args: Any, **kwargs: Any) -> None:
        blend(*args, **kwargs)
        raise KeyboardInterrupt

    backward(model, 2)
    before = _everything(model, optimizer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ops, "blend", interrupted)
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))
    optimizer.load_state_dict(source.state_dict())
    backward(model, 5)
    before = _everything(model, optimizer)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(2):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))


@pytest.mark.parametrize("name", ["default", "16-bit factors", "diagonals"])
def test_two_failures_one_after_the_other(name: str) -> None:
    """The second comes when the buffers hold new sums already, and not the old factors."""
    model = _model()
    optimizer = KFAC(model, lr=0.1, **SETTINGS[name])
    train(model, optimizer, range(2))
    before = _everything(model, optimizer)
    _fail_at_the_end(model, optimizer, 2)
    backward(model, 2)
    with pytest.raises(torch.OutOfMemoryError), OutOfMemory(2):
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, _everything(model, optimizer), strict=True))


def test_a_step_that_failed_at_its_end_takes_its_statistics_when_it_is_done_again() -> None:
    model = net()  # with a parameter that is not covered, which is looked at last
    optimizer = KFAC(model, lr=0.1, statistics_every=2)
    _fail_at_the_end(model, optimizer, 0)
    train(model, optimizer, range(3))
    assert {layer["updates"] for layer in optimizer.diagnostics()["layers"].values()} == {2}
