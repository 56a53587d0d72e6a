"""`graphed_step`: whatever it replays, runs eagerly or records anew, training is that of eager steps, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphed import WARMUP, CapturableSGD, both, graphed, kinds, pair, pretend_gpu, same, sgd, tiny
from support.recording import LOSS, Case, Run
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner, graphed_step, training_graph
from kfac_triton.curvature.curvature import Curvature
from kfac_triton.curvature.inverse import ACCEPT


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)


WITH_KFAC = pytest.param(None, marks=pytest.mark.slow)  # beside an optimizer whose steps are quick
CASES = {
    "dropout": Case(lambda: nn.Sequential(nn.Dropout(0.2), nn.Linear(5, 4))),
    "adamw": Case(tiny, options={"tail": "adamw", "weight_decay": 0.1}),
    "adam": Case(tiny, options={"tail": "adamw", "curvature": "adam", "weight_decay": 0.1}),
}


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("name", ["dropout", "adamw", pytest.param("adam", marks=pytest.mark.slow)])  # with 200 launches
def test_training_is_that_of_eager_steps(name: str) -> None:
    """Warm-up, replays, eager steps in between; and each loss is a tensor of its own."""
    eager, run = pair(case=CASES[name])
    step = graphed(run, mend_every=2)
    losses = both(eager, run, step, 8)
    assert len(set(losses)) == len(losses)
    assert kinds(step) == (WARMUP + 2, 4, 2, 1)
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_another_shape_runs_eagerly_and_is_recorded_when_it_comes_again() -> None:
    """The last, smaller batch of an epoch; and both graphs are replayed in turn."""
    eager, run = pair(sgd)
    step = graphed(run)
    expected = [(4, 2, 0, 1), (5, 6, 0, 1), (5, 11, 0, 2), (5, 16, 0, 2)]
    both(eager, run, step, 3)
    for counts in expected:
        both(eager, run, step, 1, lambda x: x[:5])
        both(eager, run, step, 1 if counts == expected[0] else 4)
        assert kinds(step)[2:] == counts[2:]
    assert kinds(step) == (2 * WARMUP, 3 + 1 + 3 * 4 + 4 - 2 * WARMUP, 0, 2)
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_no_more_shapes_are_recorded_than_allowed() -> None:
    eager, run = pair(sgd)
    step = graphed(run, max_shapes=1)
    for _ in range(4):
        both(eager, run, step, 1)
        both(eager, run, step, 1, lambda x: x[:5])
    assert kinds(step) == (WARMUP + 4, 2, 0, 1)
    assert same(eager, run)


def _capturable(model: nn.Module) -> torch.optim.Optimizer:
    return CapturableSGD([{"params": [*model.parameters()], "capturable": True, "lr": 0.1}])


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("make", [_capturable, WITH_KFAC])
def test_a_scheduler_and_the_user_change_the_rate_of_replays(make: Any) -> None:
    """A rate that was a number has become a tensor; numbers that are assigned later go into it, without a new recording."""
    eager, run = pair(make, lr=0.1)
    eager.optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    step = graphed(run)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(x.optimizer, 20) for x in (eager, run)]
    for _ in range(6):
        both(eager, run, step, 1)
        for scheduler in schedulers:
            scheduler.step()
    rate = run.optimizer.param_groups[0]["lr"]
    assert isinstance(rate, Tensor)
    for x in (eager, run):
        x.optimizer.param_groups[0]["lr"] = 0.05
    both(eager, run, step, 3)
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.05)
    eager.optimizer.param_groups[0]["lr"] = run.optimizer.param_groups[0]["lr"] = torch.tensor(0.02)
    both(eager, run, step, 3)
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert kinds(step) == (WARMUP, 12 - WARMUP, 0, 1)
    assert same(eager, run)


def _change(run: Run) -> None:
    run.optimizer.change(damping=0.3)


def _load(run: Run) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict(include_inverses=False))


def _decay(run: Run) -> None:
    run.optimizer.param_groups[0]["weight_decay"] = 0.2


def _freeze(run: Run) -> None:
    run.model[0].bias.requires_grad_(False)  # type: ignore[index]


def _move(run: Run) -> None:
    run.model[0].weight.data = run.model[0].weight.data.clone()  # type: ignore[index]


LOAD = pytest.param(None, _load, marks=pytest.mark.slow)  # a preconditioner loads below


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(("make", "change"), [(None, _change), LOAD, (sgd, _decay), (sgd, _freeze), (sgd, _move)])
def test_what_a_graph_does_not_see_makes_it_record_anew(make: Any, change: Callable[[Run], None]) -> None:
    """One eager step, then a new graph; from there on it replays again."""
    eager, run = pair(make)
    step = graphed(run)
    both(eager, run, step, 4)
    for x in (eager, run):
        change(x)
    both(eager, run, step, 3)
    assert kinds(step) == (WARMUP + 1, 2 + 2, 0, 2)
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("has_kfac", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_new_group_is_trained_in_the_next_recording(has_kfac: bool) -> None:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        params = [*model[0].parameters()]  # type: ignore[index]
        if not has_kfac:
            return torch.optim.SGD(params, lr=0.1, momentum=0.9)
        return KFAC(model, params, lr=torch.tensor(0.1), damping=0.1, inverse="factored", capturable=True, backend="triton")

    eager, run = pair(make, Case(lambda: nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 4))))
    step = graphed(run)
    both(eager, run, step, 3)
    for x in (eager, run):
        x.optimizer.add_param_group({"params": [*x.model[1].parameters()]})  # type: ignore[index]
    both(eager, run, step, 4)
    assert step.counts.recorded == 2
    assert step.counts.replayed >= 3
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_an_option_that_changes_in_every_step_is_said_once() -> None:
    eager, run = pair(sgd)
    step = graphed(run)
    both(eager, run, step, 3)
    with pytest.warns(UserWarning, match="records anew, because an option of a parameter group") as caught:
        for i in range(6):
            for x in (eager, run):
                x.optimizer.param_groups[0]["momentum"] = 0.9 - 0.01 * i
            both(eager, run, step, 1)
    assert len(caught) == 1
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_a_refused_inverse_is_mended_soon_and_no_more_often_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_graph, "_APART", 2)
    run = Run(Case(tiny), damping=1e-3, ema_decay=0.0)
    step = graphed(run, warmup=1)

    def train(scale: float, count: int) -> None:
        for _ in range(count):
            torch.manual_seed(run.seed)
            run.seed += 1
            x, y = run.case.batch()
            step(scale * x, y)

    train(1.0, 3)
    assert kinds(step) == (1, 2, 0, 1)
    stacks = run.optimizer.engine.curvature.inverses
    before = [x.values.clone() for x in stacks]
    train(1e4, 1)
    refused = [x.fallbacks > 0 for x in stacks]
    assert any(flags.any() for flags in refused)
    assert step.counts.mended == 0
    train(1e4, 1)
    assert kinds(step) == (2, 3, 1, 1)
    for stack, old, flags in zip(stacks, before, refused, strict=True):
        assert (stack.residual <= ACCEPT).all()
        assert all(not torch.equal(x, y) for x, y in zip(stack.values[flags], old[flags], strict=True))
    monkeypatch.setattr(Curvature, "was_refused", lambda self: True)
    train(1e4, 6)
    assert step.counts.mended == 3


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize("has_kfac", [True, False])
def test_other_optimizers_with_and_without_a_preconditioner(has_kfac: bool) -> None:
    """Only K-FAC has something to mend."""

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        if has_kfac:
            KFACPreconditioner(model, damping=0.1, inverse="factored", backend="triton").attach(optimizer)
        return optimizer

    eager, run = pair(make=make)
    step = graphed(run, mend_every=4)
    both(eager, run, step, 8)
    assert kinds(step) == ((WARMUP + 1, 5, 1, 1) if has_kfac else (WARMUP, 6, 0, 1))
    assert isinstance(run.optimizer.param_groups[0]["lr"], float)
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_factors_that_a_preconditioner_loads_get_their_inverses_in_an_eager_step() -> None:
    kept: list[KFACPreconditioner] = []

    def make(model: nn.Module) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kept.append(KFACPreconditioner(model, damping=0.1, inverse="factored", backend="triton"))
        kept[-1].attach(optimizer)
        return optimizer

    eager, run = pair(make=make)
    step = graphed(run)
    both(eager, run, step, 4)
    for x in kept:
        x.load_state_dict(x.state_dict(include_inverses=False))
    both(eager, run, step, 3)
    assert kinds(step) == (WARMUP + 1, 4, 1, 1)
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_gradients_are_clipped_in_replays() -> None:
    eager, run = pair(sgd, Case(tiny, clip=True))
    step = graphed(run, before_step=lambda: nn.utils.clip_grad_norm_(run.model.parameters(), 0.1))
    for _ in range(5):
        eager.load()
        eager.step()
        step(*eager.batch)
    assert step.counts.replayed == 3
    assert same(eager, run)


@pytest.mark.usefixtures("_gpu")
def test_batches_may_be_named_and_nested_and_have_constants() -> None:
    run = Run(Case(tiny), sgd)
    seen: list[Any] = []

    def loss(pair: dict[str, Tensor], *, scale: float) -> Tensor:
        seen.append(scale)
        return scale * LOSS(run.model(pair["x"]), pair["y"])

    step = graphed_step(run.optimizer, loss, warmup=1)
    x, y = run.batch
    for scale in (1.0, 1.0, 1.0, 2.0, 2.0):
        step({"x": x, "y": y}, scale=scale)
    assert kinds(step) == (2, 3, 0, 2)
    assert seen == [1.0, 1.0, 2.0, 2.0]  # eager and recorded, each constant as it is


@pytest.mark.usefixtures("_gpu")
def test_the_batch_that_was_recorded_is_not_the_users() -> None:
    eager, run = pair(sgd)
    step = graphed(run)
    both(eager, run, step, 2)
    batch = eager.case.batch()
    step(*batch)
    before = [x.clone() for x in batch]
    step(*eager.case.batch())
    assert all(torch.equal(*x) for x in zip(batch, before, strict=True))


@pytest.mark.usefixtures("_gpu")
def test_forget_records_anew() -> None:
    eager, run = pair(sgd)
    step = graphed(run)
    both(eager, run, step, 4)
    step.forget()
    both(eager, run, step, 3)
    assert kinds(step) == (WARMUP + 1, 4, 0, 2)
    assert same(eager, run)
