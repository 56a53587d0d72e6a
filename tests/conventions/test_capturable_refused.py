"""What a CUDA graph cannot record is refused, and nothing is changed then; and the parts that know of graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.helpers import mlp
from support.recording import WARM, Case, Run, recorded
from torch import Tensor, nn

from kfac_triton.curvature.async_flags import AsyncFlags
from kfac_triton.kernels import device_tables, runtime


def _set_lr(run: Run) -> None:
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="meta")


def _load(run: Run) -> None:
    run.optimizer.load_state_dict(run.optimizer.state_dict(include_inverses=False))


def _capturable(run: Run) -> None:
    run.optimizer.param_groups[0]["capturable"] = True


REFUSED: dict[str, tuple[dict[str, Any], int, Callable[[Run], Any], str]] = {
    "capturable": ({"capturable": False}, WARM, id, "group 0 has capturable=False"),
    "a rate elsewhere": ({}, WARM, _set_lr, "lr of group 0 is a tensor on meta"),
    "first step": ({}, 0, id, "layers '0', '2', '4' have no statistics yet: take a step outside"),
    "checkpoint": ({}, WARM, _load, "because the host has to wait for new inverses: take a step outside"),
    "cholesky": ({"inverse": "cholesky"}, WARM, id, "inverse must be 'factored', but is 'cholesky'"),
    "intervals": ({"capturable": False, "inverse_every": 2}, WARM, _capturable, "inverse_every must be 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_recorded_is_refused(name: str) -> None:
    """And nothing is changed then."""
    options, warm, prepare, message = REFUSED[name]
    run = Run(Case(), **options)
    run.steps(warm)
    prepare(run)
    steps, before = run.optimizer.engine.progress.steps, nn.utils.parameters_to_vector(run.model.parameters()).detach()
    with pytest.raises((RuntimeError, ValueError), match=message):
        run.record()
    assert run.optimizer.engine.progress.steps == steps
    assert torch.equal(before, nn.utils.parameters_to_vector(run.model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_no_kernel_serves_the_host_reads_and_a_graph_is_refused(dtype: torch.dtype) -> None:
    run = Run(Case(lambda: mlp(dtype), lambda: (torch.randn(12, 5, dtype=dtype), torch.randint(4, (12,)))), backend="torch")
    run.steps(WARM)
    run.backward()
    with pytest.raises(ValueError, match="Triton kernels only: use a GPU, float32 factors"), recorded():
        run.optimizer.step()


def test_a_step_without_its_backward_pass_is_refused() -> None:
    """Its rows would be read at every replay, from memory that others have by then."""
    run = Run(Case())
    run.steps(WARM)
    run.backward()
    with pytest.raises(RuntimeError, match="not its backward pass: record forward, backward and step"), recorded():
        run.optimizer.step()
    run.record()  # the next one is whole


@pytest.mark.parametrize(
    "change",
    [{"statistics_every": 2}, {"damping": lambda step: 0.1}, {"inverse_every": lambda step: 1}],
    ids=lambda x: next(iter(x)),
)
def test_change_is_checked_as_the_constructor_does(change: dict[str, Any]) -> None:
    run = Run(Case())
    with pytest.raises(ValueError, match="capturable is True"):
        run.optimizer.change(**change)
    with pytest.raises(ValueError, match="capturable is True"):
        Run(Case(), **change)
    run.optimizer.change(damping=0.2)
    run.steps(WARM)
    assert run.optimizer.engine.progress.damping == 0.2


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: bool(x.all()), lambda x: x[x > 0], lambda x: x[[0, 1]], lambda x: torch.tensor([1.0])],
)
def test_the_recorder_has_teeth(wait: Callable[[Tensor], Any]) -> None:
    with pytest.raises(AssertionError, match=r"device|made of numbers on the host"), recorded():
        wait(torch.ones(3))


def test_a_replay_runs_no_code_of_the_host() -> None:
    x, calls = torch.ones(3), []
    with recorded() as tape:
        calls.append(1)
        y = x[1:] * 2
        y += len(calls)
    x.fill_(5.0)
    calls.append(1)
    tape.replay()
    assert y.tolist() == [11.0, 11.0]


@pytest.mark.parametrize("has_context", [False, True])
def test_without_a_gpu_in_use_nothing_is_asked(has_context: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: has_context)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert runtime.is_recording() == has_context


def test_tables_of_a_graph_are_its_own_and_are_kept() -> None:
    rows, cpu = ((1, 2), (3, 4)), torch.device("cpu")
    shared, kept = device_tables.device_table(rows, cpu), len(device_tables._RECORDED)
    assert device_tables.device_table(rows, cpu) is shared
    with recorded():
        own = device_tables.device_table(rows, cpu)
    assert own is not shared
    assert torch.equal(own, shared)
    assert device_tables.device_table(rows, cpu) is shared
    ((device, _),) = device_tables._RECORDED[kept:]
    assert device is own


def test_late_flags_are_not_asked_for_in_a_graph_and_can_be_after_it() -> None:
    flags, refused = AsyncFlags(2, torch.device("cpu")), torch.tensor([True, False])
    flags.copy_to_host(refused)
    with recorded() as tape:
        assert flags.arrived() == []
        flags.copy_to_host(~refused)
    assert flags.arrived() == [1]
    refused.fill_(False)
    tape.replay()
    flags.copy_to_host(torch.tensor([False, True]))
    tape.replay()
    assert flags.arrived() == [0, 1]
