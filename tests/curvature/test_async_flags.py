"""Inverses whose certificates nobody waits for: what is refused keeps its last certified inverse and is done again later."""

from __future__ import annotations

import pytest
import torch
from support.helpers import energy_error
from torch import Tensor

from kfac_triton.curvature.async_flags import AsyncFlags
from kfac_triton.curvature.factor_stack import FactorStack
from kfac_triton.curvature.inverse import ACCEPT, InverseGroup, InverseStack, refresh_together
from kfac_triton.kernels import runtime
from kfac_triton.settings import METHODS

NAMED_METHODS = [method for method in METHODS if method != "auto"]


def _inverses(stack: InverseStack) -> Tensor:
    values = stack.values.double()
    return values.mT @ values if stack.factored else values


def _factors(condition: float) -> Tensor:
    """Two matrices of largest eigenvalue 1; the second one of this condition number."""
    basis = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))[0]
    exponents = torch.linspace(0, 1, 24, dtype=torch.float64)
    stack = torch.stack([(basis * c**-exponents) @ basis.T for c in (10.0, condition)])
    return ((stack + stack.mT) / 2).float()


@pytest.mark.parametrize("method", NAMED_METHODS)
def test_a_refused_matrix_is_done_again_a_refresh_later(method: str) -> None:
    easy, hard = _factors(100.0), _factors(1e12)
    damping, little = torch.tensor([0.1, 0.1]), torch.tensor([0.1, 1e-12])
    stack = InverseStack(easy, method, 0.05, "torch", wait=False)
    for _ in range(2):
        stack.refresh(easy, damping)
    before, certificate = stack.values.clone(), stack.residual.clone()
    stack.refresh(hard, little)  # beyond float32
    assert torch.equal(stack.values[1], before[1])
    assert torch.equal(stack.residual[1], certificate[1])
    assert stack.damping.tolist() == damping.tolist()
    assert stack.fallbacks.tolist() == [0, 1]
    assert energy_error(hard[0] + 0.1 * torch.eye(24), _inverses(stack)[0]) < ACCEPT  # its neighbour is up to date
    stack.refresh(hard, little)
    assert (stack.residual <= ACCEPT).all()
    assert not torch.equal(stack.values[1], before[1])
    assert stack.raised[1] > 0
    assert energy_error(hard[1] + stack.damping[1] * torch.eye(24), _inverses(stack)[1]) < ACCEPT


@pytest.mark.parametrize("method", NAMED_METHODS)
def test_what_is_certified_is_what_waiting_would_have_given(method: str) -> None:
    waiting, late = (InverseStack(_factors(10.0), method, 0.05, "torch", wait=wait) for wait in (True, False))
    factors, damping = _factors(1e3), torch.tensor([0.1, 0.01])
    for _ in range(3):
        factors = 0.9 * factors + 0.1 * _factors(1e3)  # as a moving average moves
        for stack in (waiting, late):
            stack.refresh(factors, damping)
        assert torch.equal(waiting.values, late.values)
        assert torch.equal(waiting.residual, late.residual)


def test_a_recorded_refresh_takes_the_steps_that_no_host_can_make_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small eigenvalue grows by 9/4 a step at most: four steps are too few for a jump by 100.

    In a replayed graph, where no host factors the matrix anew, they would be too few at every replay after it.
    """
    basis = torch.linalg.qr(torch.randn(24, 24))[0]
    before, after = ((basis * torch.linspace(1, top, 24)) @ basis.T for top in (1.0, 100.0))
    damping = torch.full((1,), 0.01)
    refused = []
    for recording in (False, True):
        stack = InverseStack(before[None], "factored", 0.05, "torch", wait=False)
        stack.refresh(before[None], damping)
        monkeypatch.setattr(runtime, "is_recording", lambda recording=recording: recording)
        stack.refresh(after[None], damping)
        monkeypatch.undo()
        refused.append(stack.fallbacks.item())
        if recording:
            assert energy_error(after + 0.01 * torch.eye(24), _inverses(stack)[0]) < ACCEPT
    assert refused == [1, 0]


def test_the_first_refresh_and_one_after_a_restart_wait() -> None:
    """There is no last certified inverse yet, or none of these factors."""
    stack = InverseStack(_factors(10.0), "newton_schulz", 0.05, "torch", wait=False)
    hard, little = _factors(1e12), torch.tensor([0.1, 1e-12])
    stack.refresh(hard, little)
    assert (stack.residual <= ACCEPT).all()
    stack.refresh(_factors(10.0), torch.tensor([0.1, 0.1]))
    stack.restart()
    before = stack.values.clone()
    stack.refresh(hard, little)
    assert (stack.residual <= ACCEPT).all()
    assert not torch.equal(stack.values[1], before[1])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("method", NAMED_METHODS)
def test_flags_of_several_stacks_find_their_matrices(method: str, backend: str) -> None:
    """Two stacks of different sizes that share flags: a matrix of each is refused, and done again a refresh later."""
    easy, hard = _factors(100.0), _factors(1e12)
    factors = [easy, torch.nn.functional.pad(easy, (0, 8, 0, 8))]
    damping, little = torch.tensor([0.1, 0.1]), torch.tensor([0.1, 1e-12])
    stacks = [InverseStack(x, method, 0.05, backend, wait=False) for x in factors]
    flags = AsyncFlags(4, torch.device("cpu"))
    for stack, x in zip(stacks, factors, strict=True):
        stack.refresh(x, damping)
    before = [x.values.clone() for x in stacks]
    worse, dampings = [hard, torch.nn.functional.pad(hard.flip(0), (0, 8, 0, 8))], [little, little.flip(0)]
    refresh_together(stacks, worse, dampings, flags)
    assert [x.fallbacks.tolist() for x in stacks] == [[0, 1], [1, 0]]
    assert torch.equal(stacks[0].values[1], before[0][1])
    assert torch.equal(stacks[1].values[0], before[1][0])
    middle = [x.values.clone() for x in stacks]
    refresh_together(stacks, worse, dampings, flags)
    assert [(x.raised > 0).tolist() for x in stacks] == [[False, True], [True, False]]
    assert not torch.equal(stacks[0].values[1], middle[0][1])
    assert not torch.equal(stacks[1].values[0], middle[1][0])
    assert all((x.residual <= ACCEPT).all() for x in stacks)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.float64)])
def test_stacks_of_one_type_are_one_group(dtypes: tuple[torch.dtype, ...]) -> None:
    """And a checkpoint that leaves one of them cold makes all wait, which leaves no matrix without an inverse."""
    stores = [FactorStack([24, 24], dtype, torch.device("cpu")) for dtype in dtypes]
    for store in stores:
        store.factors[:, :24, :24] = _factors(10.0)
    inverses = [InverseStack(store.sums, "factored", 0.05, "torch", wait=False) for store in stores]
    groups = InverseGroup.all_of(inverses, [slice(0, 2), slice(2, 4)])
    assert [group.stores for group in groups] == ([[0, 1]] if dtypes[0] == dtypes[1] else [[0], [1]])
    damping = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    for restarted in (None, None, 1):
        if restarted is not None:
            inverses[restarted].restart()
        for group in groups:
            group.refresh([stores[i] for i in group.stores], damping)
        for inverse, part in zip(inverses, damping.split(2), strict=True):
            assert (inverse.residual <= ACCEPT).all()
            torch.testing.assert_close(inverse.damping.double(), part)


def test_flags_are_given_once() -> None:
    flags = AsyncFlags(3, torch.device("cpu"))
    assert flags.arrived() == []
    flags.copy_to_host(torch.tensor([False, True, True]))
    assert flags.arrived() == [1, 2]
    assert flags.arrived() == []
