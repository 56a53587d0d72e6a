"""The first-order tail: parameters that K-FAC does not cover move as under torch.optim, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kfac_triton import KFAC
from kfac_triton.steps import first_order, param_groups

STEPS = 5


class Uncovered(nn.Module):
    """One layer that K-FAC covers and never gets a gradient here, beside parameters that it does not cover."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.covered = nn.Linear(2, 2, dtype=dtype)
        self.norm = nn.LayerNorm(7, dtype=dtype)
        self.embedding = nn.Embedding(4, 3, dtype=dtype)
        self.scale = nn.Parameter(torch.randn((), dtype=dtype))
        self.columns = nn.Parameter(torch.randn(5, 3, dtype=dtype).T)  # not contiguous

    def others(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if not name.startswith("covered")]


def copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


def train_together(optimizers: list[torch.optim.Optimizer], sides: list[list[nn.Parameter]], steps: int = STEPS) -> None:
    """The same gradients for both sides; every other step leaves one parameter without."""
    for step in range(steps):
        for i, twins in enumerate(zip(*sides, strict=True)):
            gradient = None if step % 2 and i == 1 else torch.randn_like(twins[0])
            for parameter in twins:
                parameter.grad = None if gradient is None else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
        for twins in zip(*sides, strict=True):
            assert torch.equal(*twins)


def check(options: dict[str, Any], reference: type[torch.optim.Optimizer], its: dict[str, Any], dtype: torch.dtype) -> None:
    model = Uncovered(dtype)
    ours = model.others()
    start, theirs = copies(ours), copies(ours)
    with KFAC(model, **options) as optimizer:
        train_together([optimizer, reference(theirs, **its)], [ours, theirs])
    assert not any(torch.equal(a, b) for a, b in zip(start, ours, strict=True))  # they moved


TYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "momentum": 0.0},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True},
        {"lr": torch.tensor(0.03), "momentum": 0.5},
        {"lr": torch.tensor(0.03), "momentum": 0.5, "nesterov": True},
    ],
    ids=str,
)
def test_sgd(options: dict[str, Any], dtype: torch.dtype) -> None:
    check(options, torch.optim.SGD, options, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 1e-2, "weight_decay": 0.0},
        {"lr": 1e-2, "weight_decay": 0.1},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.5, 0.9), "eps": 1e-4},
        {"lr": torch.tensor(1e-2), "weight_decay": 0.1},
        {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.0, 0.0)},
    ],
    ids=str,
)
def test_adamw(options: dict[str, Any], dtype: torch.dtype) -> None:
    check({"tail": "adamw", **options}, torch.optim.AdamW, options, dtype)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.5, 0.9])
@pytest.mark.parametrize("decay", [1e-2, 0.5])
def test_weight_decay_of_sgd_is_decoupled(decay: float, momentum: float, nesterov: bool) -> None:
    """W <- (1 - lr decay) W - lr (buffer), the decay not in the momentum buffer: by hand."""
    model, lr = Uncovered(torch.float64), 0.1
    parameter = model.scale
    optimizer = KFAC(model, lr=lr, momentum=momentum, nesterov=nesterov, weight_decay=decay)
    value, buffer = parameter.item(), 0.0
    for gradient in (1.0, -2.0, 0.5, 3.0):
        parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        buffer = momentum * buffer + gradient
        value = (1 - lr * decay) * value - lr * (gradient + momentum * buffer if nesterov else buffer)
        assert parameter.item() == pytest.approx(value, rel=1e-14)


def test_a_parameter_without_gradient_does_not_decay() -> None:
    for kind in ("sgd", "adamw"):
        model = Uncovered(torch.float32)
        optimizer = KFAC(model, weight_decay=0.5, tail=kind)
        before = [p.detach().clone() for p in model.parameters()]
        model.scale.grad = torch.ones_like(model.scale)
        optimizer.step()
        for (name, parameter), old in zip(model.named_parameters(), before, strict=True):
            assert torch.equal(parameter, old) == (name != "scale")


def test_groups_override_the_defaults() -> None:
    """Four groups, each with a rule of its own, against an optimizer of torch each."""
    model = Uncovered(torch.float32)
    ours = model.others()
    theirs = copies(ours)
    rules: list[dict[str, Any]] = [
        {},
        {"lr": 0.01, "momentum": 0.9, "nesterov": True},
        {"lr": 0.02, "tail": "adamw", "weight_decay": 0.3},
        {"tail": "adamw", "betas": (0.8, 0.7), "eps": 1e-3},
        {"momentum": 0.25},
    ]
    assert len(rules) == len(ours)
    groups = [{"params": [p], **rule} for p, rule in zip(ours, rules, strict=True)]
    optimizer = KFAC(model, [*groups, {"params": list(model.covered.parameters())}], lr=0.05, momentum=0.0)
    references: list[torch.optim.Optimizer] = []
    for twin, rule in zip(theirs, rules, strict=True):
        options = {"lr": 0.05, **rule}
        kind = torch.optim.AdamW if options.pop("tail", "sgd") == "adamw" else torch.optim.SGD
        if kind is torch.optim.AdamW:
            options.setdefault("weight_decay", 0.0)
        references.append(kind([twin], **options))
    train_together([optimizer, *references], [ours, theirs])


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_schedulers_change_the_rate_of_the_tail(kind: str) -> None:
    model = Uncovered(torch.float32)
    ours = model.others()
    theirs = copies(ours)
    options = {"lr": 0.1, "weight_decay": 0.0}
    optimizer = KFAC(model, tail=kind, momentum=0.9, **options)
    reference = torch.optim.AdamW(theirs, **options) if kind == "adamw" else torch.optim.SGD(theirs, momentum=0.9, **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(x, 0.5) for x in (optimizer, reference)]
    for _ in range(3):
        train_together([optimizer, reference], [ours, theirs], steps=1)
        for schedule in schedules:
            schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0125)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_rate_in_a_tensor_of_one_element_is_that_rate(shape: tuple[int, ...], kind: str) -> None:
    """Of whatever shape: the step, and the KL clip that reckons with it, are those of the number."""
    trained = []
    for lr in (0.1, torch.full(shape, 0.1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = KFAC(model, lr=lr, kl_clip=1e-4, tail=kind)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        assert optimizer.engine.kl_clip_scale < 1
        trained.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    torch.testing.assert_close(trained[1], trained[0], rtol=1e-5, atol=1e-7)


def run(group: dict[str, Any], parameter: Tensor, gradients: list[Tensor]) -> dict[str, Tensor]:
    state = param_groups.initial_state(nn.Parameter(parameter), group)
    with torch.no_grad():
        for gradient in gradients:
            first_order.apply(group, [parameter], [gradient], [state])
    return state


GROUP: dict[str, Any] = {
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 0.01,
    "tail": "sgd",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "foreach": None,
    "maximize": False,
    "capturable": False,
}


@pytest.mark.parametrize("kind", param_groups.TAILS)
def test_apply_counts_steps_and_leaves_gradients_alone(kind: str) -> None:
    gradients = [torch.randn(3, 2) for _ in range(4)]
    before = [g.clone() for g in gradients]
    state = run({**GROUP, "tail": kind}, torch.randn(3, 2), gradients)
    assert state["step"] == 4
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))


@pytest.mark.parametrize("kind", param_groups.TAILS)
def test_initial_state_has_the_layout_of_the_parameter(kind: str) -> None:
    parameter = nn.Parameter(torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
    state = param_groups.initial_state(parameter, {**GROUP, "tail": kind})
    buffers = {"sgd": {"momentum_buffer"}, "adamw": {"exp_avg", "exp_avg_sq"}}[kind]
    assert state.keys() == buffers | {"step"}
    assert state["step"] == 0
    for name in buffers:
        assert state[name].stride() == parameter.stride()
        assert (state[name] == 0).all()


def test_momentum_off_touches_no_buffer() -> None:
    state = run({**GROUP, "momentum": 0.0}, torch.randn(3), [torch.randn(3)])
    assert (state["momentum_buffer"] == 0).all()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"lr": -1.0}, r"lr must .*-1\.0"),
        ({"lr": torch.ones(2)}, r"lr must .*\(2,\)"),
        ({"momentum": 1.0}, r"momentum must .*1\.0"),
        ({"weight_decay": float("nan")}, "weight_decay must .*nan"),
        ({"eps": -1e-8}, "eps must .*-1e-08"),
        ({"tail": "adam"}, "tail must .*sgd, adamw.*'adam'"),
        ({"nesterov": True, "momentum": 0.0}, "nesterov"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must .*1\.0"),
    ],
)
def test_groups_are_checked(change: dict[str, Any], error: str) -> None:
    param_groups.validate_group(GROUP)
    param_groups.validate_group({**GROUP, "tail": "adamw", "nesterov": True, "momentum": 0.0})  # its momentum is a beta
    with pytest.raises(ValueError, match=error):
        param_groups.validate_group({**GROUP, **change})


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"nesterov": 1}, "nesterov must be True or False, but is 1"),
        ({"maximize": 0}, "maximize must be True or False, but is 0"),
        ({"capturable": None}, "capturable must be True or False, but is None"),
        ({"foreach": "no"}, "foreach must be True, False or None, but is 'no'"),
        ({"betas": (0.9,)}, r"betas must be a pair of numbers, but is \(0.9,\)"),
        ({"betas": (0.9, 0.9, 0.9)}, "betas must be a pair of numbers"),
        ({"betas": 0.9}, "betas must be a pair of numbers, but is 0.9"),
    ],
)
def test_types_of_a_groups_options(change: dict[str, Any], error: str) -> None:
    with pytest.raises(TypeError, match=error):
        param_groups.validate_group({**GROUP, **change})


def test_foreach_and_a_rate_in_a_tensor() -> None:
    """PyTorch's foreach AdamW reads the tensor unless it is capturable; SGD is given a number."""
    options = {**GROUP, "foreach": True, "lr": torch.tensor(0.1)}
    param_groups.validate_group(options)
    param_groups.validate_group({**options, "tail": "adamw", "capturable": True})
    param_groups.validate_group({**options, "tail": "adamw", "foreach": None})
    with pytest.raises(ValueError, match="foreach is True and lr is a tensor"):
        param_groups.validate_group({**options, "tail": "adamw"})
    with pytest.raises(RuntimeError, match="fused is not supported"):
        param_groups.validate_group({**GROUP, "fused": True})


@pytest.mark.parametrize("capturable", [False, True])
def test_a_step_counter_is_on_the_device_if_a_graph_is_to_count(capturable: bool) -> None:
    parameter = nn.Parameter(torch.empty(2, device="meta"))
    state = param_groups.initial_state(parameter, {**GROUP, "capturable": capturable})
    assert state["step"].device.type == ("meta" if capturable else "cpu")
    assert state["momentum_buffer"].device.type == "meta"


def test_what_moves_is_what_has_a_gradient_and_goes_along_its_update_in_its_own_type() -> None:
    updated, plain, stopped, idle = params = [nn.Parameter(torch.ones(2, dtype=torch.bfloat16)) for _ in range(4)]
    for p in (updated, plain, stopped):
        p.grad = torch.full_like(p, 3.0)
    states = {p: {"step": torch.tensor(float(i))} for i, p in enumerate(params)}
    found, along, its = first_order.prepare({**GROUP, "params": params}, {updated: torch.ones(2), stopped: None}, states)
    assert [id(p) for p in found] == [id(updated), id(plain)]
    assert [x.tolist() for x in along] == [[1.0, 1.0], [3.0, 3.0]]
    assert {x.dtype for x in along} == {torch.bfloat16}
    assert its == [states[updated], states[plain]]
    assert idle.grad is None
