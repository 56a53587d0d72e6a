"""A parameter whose gradient has a NaN or Inf stays as it is, bit for bit, where the host looks and where it does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.launches import counted_launches, nobody_waits
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.curvature.finite_flags import FiniteFlags
from kfac_triton.kernels import ops
from kfac_triton.steps import first_order, hold, param_groups

BAD = [torch.nan, torch.inf, -torch.inf]
TAILS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.3},
    "decay alone": {"lr": 0.1, "momentum": 0.0, "weight_decay": 0.3},
    "nesterov": {"lr": 0.1, "nesterov": True, "weight_decay": 0.3, "maximize": True},
    "rate in a tensor": {"lr": torch.tensor(0.1), "weight_decay": 0.3},
    "adamw": {"tail": "adamw", "lr": 0.01, "weight_decay": 0.3},
    "adamw up": {"tail": "adamw", "lr": 0.01, "weight_decay": 0.3, "maximize": True},
    "nesterov's adamw": {"tail": "adamw", "nesterov": True, "lr": 0.01, "weight_decay": 0.3},
}
# Whether the host looks at what was computed, and whether a graph could record the tail.
WAYS = {
    "looks": (True, {}),
    "looks, capturable": (True, {"capturable": True}),
    "does not look": (False, {}),
    "capturable": (False, {"capturable": True}),
}


class Net(nn.Module):
    """Two layers, the second in two tiles; a packed projection; and a parameter that is not covered."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.second((self.first(x) * self.scale).tanh())
        return self.attention(x, x, x, need_weights=False)[0]


PLACES = {  # whose gradient is bad -> which parameters stay
    "a covered weight": ("first.weight", ("first.weight", "first.bias")),
    "a tile": ("second.weight", ("second.weight", "second.bias")),
    "a third": ("attention.in_proj_weight", ("attention.in_proj_weight", "attention.in_proj_bias")),
    "not covered": ("scale", ("scale",)),
}


def _run(name: str, way: str, **options: Any) -> tuple[Net, KFAC]:
    """As on a GPU where the host does not look, but without the kernels, which take long in the interpreter."""
    torch.manual_seed(0)
    model = Net()
    host_looks, more = WAYS[way]
    optimizer = KFAC(model, max_factor_size=5, oversize="block", **TAILS[name], **more, **options)
    optimizer.engine.host_looks = host_looks
    return model, optimizer


def _backward(model: Net, optimizer: KFAC, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    model(torch.randn(2, 3, 3)).square().mean().backward()


def _state(model: nn.Module, optimizer: KFAC, names: tuple[str, ...] | None = None) -> list[Tensor]:
    """Parameters, moments and counters."""
    chosen = [p for name, p in model.named_parameters() if names is None or name in names]
    keys = ("step", "momentum_buffer", "exp_avg", "exp_avg_sq")
    kept = [optimizer.state[p][key] for p in chosen for key in keys if key in optimizer.state[p]]
    return [x.detach().clone() for x in (*chosen, *kept)]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TAILS)
def test_nothing_of_a_parameter_with_a_bad_gradient_moves(name: str, way: str, foreach: bool | None) -> None:
    """A run in which a gradient is bad once is, bit for bit, one in which those parameters had no gradient that once."""
    for (source, stopped), bad in zip(PLACES.values(), (*BAD, torch.nan), strict=True):
        results = []
        for is_bad in (True, False):
            model, optimizer = _run(name, way, foreach=foreach)
            parameters = dict(model.named_parameters())
            for step in range(4):
                _backward(model, optimizer, step)
                before = _state(model, optimizer, stopped)
                if step == 1 and is_bad:
                    parameters[source].grad.view(-1)[-1] = bad  # type: ignore[union-attr]
                elif step == 1:
                    for place in stopped:
                        parameters[place].grad = None
                optimizer.step()
                assert _equal(before, _state(model, optimizer, stopped)) == (step == 1)
            results.append(_state(model, optimizer))
            counts = {key: int(optimizer.state[p]["step"]) for key, p in parameters.items()}
            assert counts == {key: 3 if key in stopped else 4 for key in parameters}
        assert _equal(*results)
        assert all(x.isfinite().all() for x in results[0])


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_bad_batch_moves_nothing(name: str, backend: str) -> None:
    """With the kernels, too; and the next step is as if it had not been."""
    results = []
    for is_bad in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        optimizer = KFAC(model, backend=backend, **TAILS[name])
        for step in range(4):
            if step == 2 and not is_bad:
                continue
            torch.manual_seed(step)
            optimizer.zero_grad()
            model(torch.randn(5, 4) * (torch.nan if step == 2 else 1.0)).square().mean().backward()
            before = _state(model, optimizer)
            optimizer.step()
            assert _equal(before, _state(model, optimizer)) == (step == 2)
        results.append(_state(model, optimizer))
        layers = optimizer.diagnostics()["layers"].values()
        assert [layer["dropped_gradients"] for layer in layers] == [int(is_bad)] * 2
    assert _equal(*results)


@pytest.mark.parametrize("way", ["looks", "does not look"])
def test_rows_without_statistics_keep_no_nan_in(way: str) -> None:
    """The rows of a packed projection that have none go along their gradient."""
    model, optimizer = _run("sgd", way)
    _backward(model, optimizer, 0)
    optimizer.step()
    names = [layer.name for layer in optimizer.engine.layers]
    _backward(model, optimizer, 1)
    optimizer.change(statistics_every=100)
    engine = optimizer.engine
    engine.progress = replace(engine.progress, without_statistics=frozenset({names.index("attention.v")}))
    model.attention.in_proj_weight.grad[-1, 0] = torch.nan
    before = _state(model, optimizer, ("attention.in_proj_weight",))
    optimizer.step()
    assert _equal(before, _state(model, optimizer, ("attention.in_proj_weight",)))
    assert optimizer.diagnostics()["dropped_gradients"] == 1


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_nobody_waits_to_hear_of_a_bad_gradient(name: str, capturable: bool) -> None:
    with counted_launches():  # the kernels are not run: all that they would have written is zero
        model = Net()
        optimizer = KFAC(model, inverse="factored", backend="triton", capturable=capturable, **TAILS[name])
        for step in range(4):
            _backward(model, optimizer, step)
            model.scale.grad.fill_(torch.nan)  # type: ignore[union-attr]
            if step < 3:
                optimizer.step()
        for group in optimizer.engine.curvature.inverse_groups:
            group.refused.arrived()  # type: ignore[union-attr]
        before = _state(model, optimizer, ("scale",))
        with nobody_waits():
            optimizer.step()
    assert _equal(before, _state(model, optimizer, ("scale",)))
    assert optimizer.diagnostics()["dropped_gradients"] == 4


@pytest.mark.parametrize("way", ["does not look", "capturable"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_after_a_bad_gradient_resumes(name: str, way: str) -> None:
    """Counters differ from parameter to parameter then."""
    model, optimizer = _run(name, way)
    for step in range(2):
        _backward(model, optimizer, step)
        if step == 1:
            model.first.bias.grad[0] = torch.inf  # type: ignore[index]
        optimizer.step()
    other, resumed = _run(name, way)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in ((model, optimizer), (other, resumed)):
        _backward(*run, seed=2)
        run[1].step()
    assert _equal(_state(model, optimizer), _state(other, resumed))


@pytest.mark.parametrize("host_looks", [True, False])
def test_a_preconditioner_zeroes_the_layer_and_leaves_the_rest(host_looks: bool) -> None:
    """All that it can do to keep a NaN from another optimizer; one of several tiles is bad."""
    torch.manual_seed(0)
    model = Net()
    preconditioner = KFACPreconditioner(model, max_factor_size=5, oversize="block")
    preconditioner.engine.host_looks = host_looks
    model(torch.randn(2, 3, 3)).square().mean().backward()
    model.second.weight.grad[-1, -1] = torch.nan
    model.scale.grad[0] = torch.nan
    preconditioner.precondition_()
    zero = {name for name, p in model.named_parameters() if not p.grad.any()}
    assert zero == {"second.weight", "second.bias"}
    assert model.scale.grad.isnan().tolist() == [True, False, False, False]
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if name != "scale")


# The parts


GROUP: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.1,
    "tail": "sgd",
    "betas": (0.9, 0.999),
    "eps": 1e-6,
    "foreach": None,
    "maximize": False,
    "capturable": True,
}
KINDS = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]


def _apply(group: dict[str, Any], make: Callable[[torch.dtype], Tensor], stopped: set[int] | None) -> list[Tensor]:
    """Three steps of three parameters of each type; in the second one the gradients of some are bad."""
    torch.manual_seed(0)
    params = [nn.Parameter(make(kind)) for kind in KINDS for _ in range(3)]
    states = [param_groups.initial_state(p, group) for p in params]
    with torch.no_grad():
        for step in range(3):
            gradients = [torch.randn(p.shape, dtype=torch.float64).to(p.dtype) for p in params]
            bad = (stopped or set()) if step == 1 else set()
            for i in bad:
                gradients[i].view(-1)[:1] = torch.nan
            finite = FiniteFlags.of({p: torch.tensor(i not in bad) for i, p in enumerate(params)})
            held = None if stopped is None else first_order.hold([group], [(params, gradients, states)], finite)  # type: ignore[list-item]
            moving: list[Tensor] = list(params)
            first_order.apply(group, moving, gradients, states, held)
    return [x for p, state in zip(params, states, strict=True) for x in (p.detach(), *state.values())]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("change", [{}, {"momentum": 0.0}, {"tail": "adamw"}, {"tail": "adamw", "maximize": True}], ids=str)
def test_what_is_held_changes_no_number_of_the_others(change: dict[str, Any], foreach: bool | None) -> None:
    """All types, in portions of any size: those that move are where a step without a hold takes them, bit for bit."""
    group = {**GROUP, **change, "foreach": foreach}
    each = len(param_groups.initial_state(nn.Parameter(torch.ones(1)), group)) + 1
    make = lambda kind: torch.randn(2, 3, dtype=torch.float64).to(kind).T  # noqa: E731
    free, held = _apply(group, make, None), _apply(group, make, set())
    assert _equal(free, held)
    stopped = {0, 4, 6, 10, 12, 14}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hold, "_FEW", 0)
        some = _apply(group, make, stopped)
    for i in range(len(free) // each):
        assert _equal(free[each * i : each * (i + 1)], some[each * i : each * (i + 1)]) == (i not in stopped)
    assert all(x.isfinite().all() for x in some)


def test_a_negative_zero_stays_one() -> None:
    p = nn.Parameter(torch.tensor([-0.0, 1.0]))
    state = param_groups.initial_state(p, GROUP)
    state["momentum_buffer"].fill_(-0.0)
    held = first_order.hold([GROUP], [([p], [], [state])], FiniteFlags.of({p: torch.tensor(False)}))
    with torch.no_grad():
        first_order.apply(GROUP, [p], [torch.full((2,), torch.nan)], [state], held)
    assert p.signbit().tolist() == [True, False]
    assert state["momentum_buffer"].signbit().all()
    assert state["step"] == 0


def test_a_kernel_without_room_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """When parameters have moved already, what failed must not stay half done."""
    real = ops.restore

    def restore(*args: Any, backend: str) -> None:
        if backend != "torch":
            raise RuntimeError("no compiler")
        real(*args, backend=backend)

    monkeypatch.setattr(ops, "restore", restore)
    p = nn.Parameter(torch.ones(2))
    state = param_groups.initial_state(p, GROUP)
    held = first_order.hold([GROUP], [([p], [], [state])], FiniteFlags.of({p: torch.tensor(False)}))
    with torch.no_grad(), pytest.warns(UserWarning, match="restored without a kernel, because it failed: no compiler"):
        first_order.apply(GROUP, [p], [torch.ones(2)], [state], held)
    assert p.tolist() == [1, 1] and state["step"] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TAILS)
def test_parameters_without_elements_are_no_trouble(name: str, way: str) -> None:
    model, optimizer = _run(name, way)
    empty = nn.Parameter(torch.ones(0, 3))
    optimizer.add_param_group({"params": [empty], **({"capturable": True} if "capturable" in WAYS[way][1] else {})})
    for step in range(2):
        _backward(model, optimizer, step)
        empty.grad = torch.ones(0, 3)
        before = _state(model, optimizer, ("scale",))
        optimizer.step()
        assert not _equal(before, _state(model, optimizer, ("scale",)))
    assert optimizer.state[empty]["step"] == 2


def test_views_that_are_conjugated_or_negated_stay_too() -> None:
    """Operators that write to lists refuse them, when others have moved already."""
    group = {**GROUP, "capturable": False, "weight_decay": 0.0}
    number = torch.randn(4, dtype=torch.complex64)
    for stored in (number.conj(), number.conj().imag):
        p = nn.Parameter(stored)
        assert p.is_conj() or p.is_neg()
        before, state = p.detach().clone(), param_groups.initial_state(p, group)
        held = first_order.hold([group], [([p], [], [state])], FiniteFlags.of({p: torch.tensor(False)}))
        with torch.no_grad():
            first_order.apply(group, [p], [torch.ones(4, dtype=p.dtype)], [state], held)
        assert torch.equal(p, before)


def test_portions_are_of_one_type_and_no_larger_than_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [3, 5, 10, 4, 4, 4, 0]
    params = [torch.empty(n) for n in sizes]
    params[1] = params[1].double()
    assert hold.portions(params, together=True) == [[0, 2, 3, 4, 5, 6], [1]]
    monkeypatch.setattr(hold, "_FEW", 2)
    assert hold.portions(params, together=True) == [[0], [1], [2], [3, 4], [5, 6]]
    assert hold.portions(params, together=False) == [[i] for i in range(7)]
    assert hold.portions([], together=True) == []


def test_room_is_that_of_the_largest_portion_and_counters_move_to_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, or a step before the first one, has them on the host."""
    monkeypatch.setattr(hold, "_FEW", 0)
    params = [nn.Parameter(torch.empty(n, device="meta")) for n in (10, 100, 0)]
    group = {**GROUP, "capturable": False}
    states = [param_groups.initial_state(p, group) for p in params]
    assert {state["step"].device.type for state in states} == {"cpu"}
    held = hold.Hold(FiniteFlags.of({p: torch.ones((), dtype=torch.bool) for p in params}))
    held.reserve(params, states, ("momentum_buffer",), together=True)
    assert {state["step"].device.type for state in states} == {"meta"}
    assert [len(room) for room in held._room.values()] == [2 * 448]  # 400 bytes each, aligned
