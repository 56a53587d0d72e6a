"""What is noted of a backward pass, and which passes wait for the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.capture.calls import Call
from kfac_triton.capture.gate import Gate
from kfac_triton.kernels import runtime


def test_a_pass_outside_of_a_graph_is_noted_until_the_step_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, call, weight = Gate(), Call(), torch.zeros(1, requires_grad=True)
    for task, recording in enumerate((True, False, True)):
        monkeypatch.setattr(runtime, "is_recording", lambda recording=recording: recording)
        assert gate.counts(task, weight, call)
        if recording and not gate.is_unrecorded:
            continue
        assert gate.is_unrecorded
    gate.forget()
    assert not gate.is_unrecorded
    assert gate.counts(2, weight, call)
    assert not gate.is_unrecorded


def _factors(backend: str, batches: list[Tensor], whose: list[bool], **settings: Any) -> tuple[list[Tensor], list[int]]:
    """Factors of one step over several passes, and how many of them waited at the end."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
    with KFAC(model, lr=0.1, backend=backend, **settings) as optimizer:
        for x, owned_by_autograd in zip(batches, whose, strict=True):
            model(x.clone().requires_grad_(owned_by_autograd)).square().mean().backward()
        waited = [len(s.deferred) for s in optimizer.engine.statistics]
        optimizer.step()
        return [side for pair in optimizer.factors().values() for side in pair], waited


@pytest.mark.parametrize(
    ("sizes", "whose", "waiting"),
    [
        ([3, 2], [True, True], [2, 2]),
        ([3, 2], [True, False], [0, 2]),  # what waited goes into the sums with it
        ([3, 2, 2], [False, True, True], [0, 3]),  # and nothing waits beside sums
        ([3, 400], [True, True], [0, 0]),  # rows that take more memory than the sums
        ([400, 3], [True, True], [0, 0]),
    ],
)
def test_all_passes_of_a_layer_wait_or_none(sizes: list[int], whose: list[bool], waiting: list[int]) -> None:
    batches = [torch.randn(size, 5) for size in sizes]
    found, waited = _factors("triton", batches, whose)
    assert waited == waiting
    for x, y in zip(found, _factors("torch", batches, whose)[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_what_waited_is_summed_with_its_inputs_by_a_pass_that_has_none_to_add() -> None:
    """The columns of a GGN after the first add to G alone."""
    found = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 4))
        x, y = torch.randn(3, 5).requires_grad_(), torch.tensor([0, 1, 2])
        with KFAC(model, lr=0.1, backend=backend, fisher="ggn", loss=nn.CrossEntropyLoss()) as optimizer:
            outputs = model(x)
            optimizer.accumulate_fisher(outputs, y)
            nn.functional.cross_entropy(outputs, y).backward()
            optimizer.step()
            found.append([side for pair in optimizer.factors().values() for side in pair])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_layer_with_a_diagonal_factor_waits_for_nothing() -> None:
    """A launch over rows knows no diagonals."""
    batches = [torch.randn(3, 5), torch.randn(2, 5)]
    found, waited = _factors("triton", batches, [True, True], max_factor_size=5)
    assert waited == [0, 0]
    assert [side.dim() for side in found] == [1, 2, 1, 2]
    for x, y in zip(found, _factors("torch", batches, [True, True], max_factor_size=5)[0], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_moments_of_a_step_are_not_those_of_the_next() -> None:
    """EKFAC: a step whose passes leave none (a paused one) blends none."""
    model = nn.Linear(4, 3)
    optimizer = KFAC(model, lr=0.1, curvature="ekfac")
    curvature = optimizer.engine.curvature
    counts = []
    for paused in (False, False, True, False):
        optimizer.zero_grad()
        if paused:
            with optimizer.paused():
                model(torch.randn(6, 4)).square().mean().backward()
        else:
            model(torch.randn(6, 4)).square().mean().backward()
        moments = optimizer.engine.statistics[0].moments
        assert moments is not None
        assert moments.fresh == (not paused and bool(counts))
        optimizer.step()
        counts.append(int(curvature.moment_updates_of(0)))
    assert counts == [1, 2, 2, 3]
