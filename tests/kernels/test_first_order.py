"""SGD and AdamW in a kernel: against the formula in float64, and what must not move stays bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kfac_triton.kernels import ops, tiles
from kfac_triton.kernels.first_order import launch
from kfac_triton.kernels.first_order.rule import Rule

both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])
TYPES = [torch.float32, torch.bfloat16, torch.float16]
RULES = [
    Rule(adam=False),
    Rule(adam=False, weight_decay=0.3),
    Rule(adam=False, momentum=0.9, weight_decay=0.1),
    Rule(adam=False, momentum=0.9, nesterov=True, maximize=True),
    Rule(adam=True),
    Rule(adam=True, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3, maximize=True),
    Rule(adam=True, betas=(0.0, 0.0), eps=1e-2),
    Rule(adam=True, nesterov=True),
    Rule(adam=True, nesterov=True, betas=(0.5, 0.7), eps=1e-3, weight_decay=0.3, maximize=True),
    Rule(adam=True, nesterov=True, betas=(0.0, 0.0), eps=1e-2),
]
SHAPES = [(1,), (7,), (40, 60), (16, 8), (3000,), (2, 3, 2, 2)]


class _Problem:
    """Parameters of all shapes, gradients, states after some steps, and flags."""

    def __init__(self, dtype: torch.dtype, rule: Rule) -> None:
        torch.manual_seed(0)
        shapes = [*SHAPES, (6, 4), (2, 3, 4, 5)]
        orders: list[Any] = [lambda x: x] * len(SHAPES)
        orders += [lambda x: x.T.contiguous().T, lambda x: x.to(memory_format=torch.channels_last)]

        def draw() -> list[Tensor]:
            return [order(torch.randn(shape).to(dtype)) for shape, order in zip(shapes, orders, strict=True)]

        self.parameters, self.gradients, self.moments = draw(), draw(), [draw() for _ in range(rule.moments)]
        if rule.adam:
            self.moments[1] = [x.abs() for x in self.moments[1]]
        self.steps = [torch.tensor(float(3 * i)) for i in range(len(shapes))]
        self.finite = torch.arange(len(shapes)) % 4 != 2
        for gradient, is_finite in zip(self.gradients, self.finite, strict=True):
            if not is_finite:
                gradient.fill_(torch.nan)

    def everything(self, i: int) -> list[Tensor]:
        """What may change of a parameter."""
        return [self.parameters[i], *(x[i] for x in self.moments), self.steps[i]]


def _expected(problem: _Problem, i: int, rate: float, rule: Rule) -> list[Tensor]:
    """In float64."""
    p, *own, step = (x.double() for x in problem.everything(i))
    g = problem.gradients[i].double() * (-1 if rule.maximize else 1)
    p, count = p * (1 - rate * rule.weight_decay), float(step) + 1
    if rule.adam:
        (beta1, beta2), (mean, square) = rule.betas, own
        mean, square = beta1 * mean + (1 - beta1) * g, beta2 * square + (1 - beta2) * g**2
        ahead = mean / (1 - beta1**count)
        if rule.nesterov:
            ahead = beta1 * ahead + (1 - beta1) * g
        p = p - rate * ahead / ((square / (1 - beta2**count)).sqrt() + rule.eps)
        return [p, mean, square, step + 1]
    along = g
    if rule.momentum:
        own = [rule.momentum * own[0] + g]
        along = g + rule.momentum * own[0] if rule.nesterov else own[0]
    return [p - rate * along, *own, step + 1]


@both_backends
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_step_is_that_of_the_formula(backend: str, rule: Rule, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_BLOCK", 64)
    monkeypatch.setattr(tiles, "_ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(tiles, "_LEAST_SHARES", 2)
    problem, rate = _Problem(dtype, rule), 0.07
    expected = [_expected(problem, i, rate, rule) for i in range(len(problem.steps))]
    before = [[x.clone() for x in problem.everything(i)] for i in range(len(problem.steps))]
    rates = torch.tensor([rate], dtype=torch.float64)
    lists = problem.parameters, problem.gradients, problem.moments, problem.steps
    ops.move(*lists, rates, problem.finite, rule, backend=backend)
    digits = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype]
    for i, is_finite in enumerate(problem.finite):
        for new, right, old in zip(problem.everything(i), expected[i], before[i], strict=True):
            if is_finite:
                torch.testing.assert_close(new.double(), right.double(), rtol=digits, atol=digits)
                assert new.stride() == old.stride()
            else:
                assert torch.equal(new, old)


@pytest.mark.parametrize("adam", [False, True])
def test_types_that_are_mixed_go_by_themselves(adam: bool) -> None:
    rule = Rule(adam, momentum=0.0 if adam else 0.5)
    torch.manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float32]
    lists = [[torch.rand(5).to(kind) for kind in kinds] for _ in range(2 + rule.moments)]
    steps = [torch.tensor(float(i)) for i in range(3)]
    found = []
    for backend in ("torch", "triton"):
        params, gradients, *moments = ([x.clone() for x in tensors] for tensors in lists)
        counters = [x.clone() for x in steps]
        flags, rate = torch.tensor([True, True, False]), torch.full((1,), 0.1, dtype=torch.float64)
        ops.move(params, gradients, moments, counters, rate, flags, rule, backend=backend)
        found.append([*params, *(x for tensors in moments for x in tensors), *counters])
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)
    assert [float(x) for x in counters] == [1, 2, 2]


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_correction_of_the_bias_keeps_its_digits(nesterov: bool) -> None:
    """After the first step with a beta near one: in single precision 1 - beta has four digits."""
    rule = Rule(adam=True, nesterov=nesterov, betas=(0.9, 0.99999), eps=0.0)
    p, gradient = torch.zeros(4), torch.full((4,), 0.3)
    moments, step = [[torch.zeros(4)], [torch.zeros(4)]], torch.zeros(())
    rate = torch.ones(1, dtype=torch.float64)
    ops.move([p], [gradient], moments, [step], rate, torch.tensor([True]), rule, backend="triton")
    torch.testing.assert_close(p, torch.full((4,), -1.0), rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("p", "gradient", "message"),
    [
        (torch.ones(3).double(), torch.ones(3).double(), r"parameters\[0\] is torch.float64"),
        (torch.ones(3), torch.ones(3).half(), "its gradient or state has others"),
        (torch.ones(4, 6), torch.ones(6, 4).T, "its gradient or state has others"),
        (torch.ones(4, 6)[:, ::2], torch.ones(4, 6)[:, ::2], "gaps"),
    ],
)
def test_move_leaves_to_the_reference_what_the_kernel_cannot_move(p: Tensor, gradient: Tensor, message: str) -> None:
    step, rate, flags = torch.zeros(()), torch.ones(1, dtype=torch.float64), torch.tensor([True])
    with pytest.raises(ValueError, match=message):
        ops.move([p], [gradient], [], [step], rate, flags, Rule(adam=False), backend="triton")
    ops.move([p], [gradient], [], [step], rate, flags, Rule(adam=False))
    assert (p == 0).all()
    assert step == 1


def test_move_refuses_what_does_not_fit() -> None:
    p, step, rate, flags = torch.ones(3), torch.zeros(()), torch.ones(1, dtype=torch.float64), torch.tensor([True])
    good: list[Any] = [[p], [p], [[p]], [step], rate, flags, Rule(adam=False, momentum=0.9)]
    for place, wrong, message in (
        (1, [], "must have 1 tensors"),
        (2, [], "1 lists of moments"),
        (4, rate.float(), "rate must be float64"),
        (5, torch.ones(2).bool(), "finite must have shape"),
        (3, [torch.zeros((), device="meta")], r"steps\[0\] must be on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.move(*[wrong if i == place else x for i, x in enumerate(good)])
    ops.move([], [], [[]], [], rate, flags, Rule(adam=False, momentum=0.9))
