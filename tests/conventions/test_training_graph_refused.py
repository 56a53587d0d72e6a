"""What `graphed_step` refuses, what it says, and what it does without a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.graphed import both, graphed, kinds, loss_of, pair, pretend_gpu, same, sgd, tiny
from support.helpers import mlp
from support.recording import LOSS, Case, Run
from torch import Tensor, nn

from kfac_triton import graphed_step, training_graph


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch)


@pytest.mark.usefixtures("_gpu")
def test_a_step_that_reads_from_the_device_is_refused_with_the_reason() -> None:
    run = Run(Case(tiny), sgd)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        value = LOSS(run.model(x), y)
        return value if value.detach() > 0 else -value

    step = graphed_step(run.optimizer, loss, warmup=1)
    step(*run.batch)
    before = [p.detach().clone() for p in run.model.parameters()]
    with pytest.raises(
        RuntimeError, match=r"cannot record this step: Tensor.__bool__ reads from the device.*docs/speed.md"
    ) as caught:
        step(*run.batch)
    assert isinstance(caught.value.__cause__, AssertionError)
    assert all(torch.equal(*x) for x in zip(before, run.model.parameters(), strict=True))


@pytest.mark.usefixtures("_gpu")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capturable": False}, "group 0 has capturable=False"),
        ({"inverse": "cholesky"}, "inverse must be 'factored', but is 'cholesky'"),
        ({"backend": "torch"}, "Triton kernels only"),
    ],
)
def test_what_cannot_be_recorded_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graphed(Run(Case(), **options))


def test_parameters_on_two_devices_are_refused() -> None:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))]
    with pytest.raises(ValueError, match="records one device, but the optimizer's parameters are on cpu, meta"):
        graphed_step(torch.optim.SGD(params, lr=0.1), lambda: params[0].sum())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"optimizer": 3}, TypeError, "optimizer must be a torch.optim.Optimizer, but is int"),
        ({"loss_of_batch": None}, TypeError, "loss_of_batch must be a function of the batch, but is NoneType"),
        ({"warmup": 0}, ValueError, "warmup"),
        ({"mend_every": 0}, ValueError, "mend_every"),
        ({"max_shapes": 1.5}, TypeError, "max_shapes"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual = {"optimizer": torch.optim.SGD(mlp().parameters(), lr=0.1), "loss_of_batch": len}
    with pytest.raises(error, match=message):
        graphed_step(**{**usual, **arguments})


@pytest.mark.filterwarnings("ignore:CUDA graphs need a GPU:UserWarning")
@pytest.mark.parametrize("result", [None, torch.zeros(2, requires_grad=True)])
def test_a_loss_that_is_none_is_refused(result: Any) -> None:
    run = Run(Case(tiny), sgd)
    with pytest.raises(TypeError, match="loss_of_batch must return the loss, a tensor with one element, but the result"):
        graphed_step(run.optimizer, lambda x: result)(run.batch[0])


def test_on_a_cpu_every_step_is_eager_and_this_is_said_once() -> None:
    eager, run = pair(sgd)
    with pytest.warns(UserWarning, match="CUDA graphs need a GPU, and the parameters are on cpu") as caught:
        step = graphed_step(run.optimizer, loss_of(run))
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(eager, run, step, 5)
        both(eager, run, step, 2, lambda x: x[:5])
    assert kinds(step) == (7, 0, 0, 0)
    assert same(eager, run)


@pytest.mark.filterwarnings("ignore:CUDA graphs need a GPU:UserWarning")
def test_on_a_cpu_pytorchs_optimizers_need_not_be_capturable_as_they_cannot() -> None:
    run = Run(Case(tiny), lambda model: torch.optim.AdamW(model.parameters()))
    graphed(run)(*run.batch)
    with pytest.raises(ValueError, match="group 0 has capturable=False"):
        graphed(Run(Case(tiny), capturable=False))


def test_on_a_gpu_alone_there_are_graphs() -> None:
    assert training_graph.can_record(torch.device("cuda"))
    assert not training_graph.can_record(torch.device("cpu"))
