"""The choice between implementations, and what makes a call cheap: a plan that is made once, tables that are hashed once."""

from __future__ import annotations

import pytest
import torch

from kfac_triton.kernels import operators, ops, runtime
from kfac_triton.kernels.covariance import launch as covariance_launch
from kfac_triton.kernels.covariance.plan import plan_of
from kfac_triton.kernels.device_tables import Table, device_table

CPU = torch.device("cpu")


def test_a_call_with_a_plan_is_looked_at_once() -> None:
    """And not asked again whether the kernel can serve it."""
    looked: list[covariance_launch.Call] = []

    def look_at(*arguments: object) -> covariance_launch.Call:
        looked.append(covariance_launch.Call(None, plan_of((), (), (), (), (), (), (), (), ()), (1, 2)))
        return looked[-1]

    launched: list[object] = []
    operator = operators.Operator(
        reference=lambda *arguments: pytest.fail("the reference ran"),
        launch=lambda *arguments, plan: launched.append((arguments, plan)),
        can_use=lambda *arguments: pytest.fail("it was asked again"),
        plan=look_at,
    )
    first = [torch.ones(1)]
    operator.run("name", first, 5, backend="triton")
    assert len(looked) == 1
    assert launched == [((first, 5), looked[0])]


def test_the_plan_says_why_not() -> None:
    ran: list[object] = []
    call = covariance_launch.Call("it is Monday", plan_of((), (), (), (), (), (), (), (), ()), ())
    operator = operators.Operator(
        reference=lambda *arguments: ran.append(arguments),
        launch=lambda *arguments, plan: pytest.fail("it was launched"),
        can_use=lambda *arguments: pytest.fail("it was asked again"),
        plan=lambda *arguments: call,
    )
    with pytest.raises(ValueError, match="no kernel can serve name: it is Monday"):
        operator.run("name", torch.ones(1), backend="triton")
    operator.run("name", torch.ones(1), backend="auto")
    assert len(ran) == 1


def test_a_device_is_made_current_only_if_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(runtime, "current", lambda device: entered.append(device) or operators.nullcontext())
    for device in (CPU, torch.device("cuda", 1), torch.device("cuda", 0)):
        with operators.on_device(device):
            pass
    assert entered == [torch.device("cuda", 0)]


def test_a_plan_is_found_again_by_what_decides_it() -> None:
    """Not by addresses, except for what of them is no multiple of 16 bytes."""

    def plan(source: torch.Tensor, ones: bool = False) -> object:
        return covariance_launch.look_at([torch.zeros(64, 64)], [source], torch.ones(1), torch.ones(1), [ones], []).plan

    storage = torch.zeros(30, 32)
    first = plan(torch.zeros(20, 32))
    assert plan(storage[:20]) is first
    assert plan(storage[4:24]) is first
    others = [
        plan(torch.zeros(21, 32)),
        plan(torch.zeros(20, 32).half()),
        plan(torch.zeros(32, 20).T),
        plan(torch.zeros(20, 32), ones=True),
        plan(storage.flatten()[1 : 1 + 20 * 32].view(20, 32)),
    ]
    assert len({id(found) for found in [first, *others]}) == 6


def test_a_table_is_the_tuple_that_it_holds() -> None:
    rows = ((1, 2), (3, 4))
    table = Table(rows)
    assert table == rows
    assert hash(table) == hash(rows) == hash(table)
    assert Table([(1, 2)]) != table
    assert device_table(table, CPU) is device_table(Table(rows), CPU)
    assert device_table(table, CPU).tolist() == [[1, 2], [3, 4]]
    assert device_table(Table((5, 6)), CPU).tolist() == [5, 6]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": [torch.zeros(4, 4).half()]}, r"factors\[0\] must be float32 or float64, but is torch.float16"),
        (
            {"factors": [torch.zeros(3, 3)]},
            r"factors\[0\] must be square and at least 4 wide for inputs\[0\] of",
        ),
        ({"factors": [torch.zeros(4, 5)]}, r"factors\[0\] must be square and at least 4 wide"),
        ({"ones_column": [True]}, r"at least 5 wide"),
        ({"inputs": [torch.zeros(4)]}, r"inputs\[0\] must be a matrix of rows or .* but has shape \(4,\)"),
        ({"inputs": [torch.zeros(1, 1, 1, 1, 1, 1)]}, r"inputs\[0\] must be a matrix of rows or .*\(1, 1, 1, 1, 1, 1\)"),
        (
            {"inputs": [torch.zeros(2, 4, device="meta")]},
            r"inputs\[0\] must be on the device of all factors, cpu, but is on",
        ),
        ({"inputs": [torch.zeros(2, 1, 4)]}, r"windows\[0\] must come from window\(...\)"),
        (
            {"inputs": [torch.zeros(2, 1, 4)], "windows": [ops.window((5,))]},
            r"inputs\[0\] of shape \(2, 1, 4\) must be at least as large as its kernel, but the kernel is \[5\]",
        ),
        (
            {"inputs": [torch.zeros(2, 1, 4)], "windows": [ops.Window((1,), (0,), (0,), (1,))]},
            r"windows\[0\] must come from window\(...\)",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    usual = {"factors": [torch.zeros(4, 4)], "inputs": [torch.zeros(2, 4)], "ones_column": [False], "windows": [ops.ROWS]}
    arguments = usual | change
    with pytest.raises(ValueError, match=message):
        ops.covariance_ema(alpha=torch.ones(1), beta=torch.ones(1), **arguments)  # type: ignore[arg-type]


def test_what_was_right_is_checked_again_when_something_changes() -> None:
    """Shapes, types, biases and windows are in the key of what is remembered; devices are compared every time."""
    usual = {"factors": [torch.zeros(4, 4)], "inputs": [torch.zeros(2, 4)], "ones_column": [False], "windows": [ops.ROWS]}
    meta = {"inputs": [torch.zeros(2, 4, device="meta")]}
    wrong = [{"factors": [torch.zeros(4, 4).half()]}, {"factors": [torch.zeros(3, 3)]}, {"ones_column": [True]}, meta]
    for change in [*wrong, *wrong]:
        ops.covariance_ema(alpha=torch.ones(1), beta=torch.ones(1), **usual)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"\[0\] must be"):
            ops.covariance_ema(alpha=torch.ones(1), beta=torch.ones(1), **(usual | change))  # type: ignore[arg-type]
