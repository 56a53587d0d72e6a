"""What an optimizer takes: parameters, options, closures, gradients (conventions 1 to 8)."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.contenders import ALL, Contender, Fails, convention, equal, loss_of, net, preconditioner_of, train, vector
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau


@convention(1, ALL)
def test_is_an_optimizer(contender: Contender) -> None:
    model = net()
    optimizer = contender(model)
    assert isinstance(optimizer, Optimizer)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    schedulers = [LambdaLR(optimizer, lambda step: 0.5**step), ReduceLROnPlateau(optimizer)]
    lr = optimizer.param_groups[0]["lr"]
    train(model, optimizer, 1)
    schedulers[0].step()
    schedulers[1].step(1.0)
    assert seen == ["before", "after"]
    assert optimizer.param_groups[0]["lr"] == lr / 2
    assert {"state", "param_groups"} <= optimizer.state_dict().keys()


class SharingWrapper(Optimizer):
    """What accelerate makes of an optimizer: the wrapped one's groups and state by property."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)


@convention(2, ALL)
def test_schedulers_reach_through_a_wrapper(contender: Contender) -> None:
    """A scheduler on the wrapper drives the step, and the KL clip where there is one."""
    model, plain_model = net(), net()
    plain = contender(plain_model)
    optimizer = SharingWrapper(contender(model))
    optimizer.optimizer.load_state_dict(optimizer.optimizer.state_dict())  # accelerate does so at once
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        train(model, optimizer, 1, first=step)
        scheduler.step()
        train(plain_model, plain, 1, first=step)
        plain.param_groups[0]["lr"] *= 0.5
    assert torch.equal(vector(model), vector(plain_model))


@convention(2, ALL)
def test_preconditioning_leaves_the_optimizer_its_groups(contender: Contender) -> str | None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=10.0)
    groups, before = optimizer.param_groups, optimizer.state_dict()
    if contender.is_adam:
        return "n.a.: has no KL clip"
    if contender.is_kfac:
        optimizer = contender(model, lr=10.0)
        scheduler = LambdaLR(optimizer, lambda step: 2.0**step)
    elif contender.has_hooks:
        from kfac_triton import KFACPreconditioner

        preconditioner = KFACPreconditioner(model, damping=0.1)
        preconditioner.attach(optimizer)
        assert optimizer.param_groups is groups
        assert optimizer.state_dict() == before
        scheduler = LambdaLR(optimizer, lambda step: 2.0**step)
    else:
        assert not hasattr(optimizer, "attach")
        return "n.a.: wraps nothing"
    owner = optimizer if contender.is_kfac else preconditioner
    vector_before = vector(model)
    scales = []
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
        nn.utils.vector_to_parameters(vector_before, model.parameters())
        scheduler.step()
        scales.append(owner.diagnostics()["kl_clip_scale"])
    assert scales[1] == pytest.approx(scales[0] / 2, rel=1e-9)
    return None


@convention(3, ALL)
def test_forms_of_parameters(contender: Contender) -> None:
    results = []
    for form in (
        lambda model: model.parameters(),
        lambda model: list(model.parameters()),
        lambda model: list(model.named_parameters()),
        lambda model: [{"params": p, "name": str(i), "extra": None} for i, p in enumerate(model.parameters())],
        lambda model: [{"params": list(model.named_parameters())}],
    ):
        model = net()
        optimizer = contender(model, form(model))
        assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
        results.append(train(model, optimizer, 2))
    assert all(torch.equal(results[0], result) for result in results[1:])


@convention(3)
def test_bad_lists_of_parameters(contender: Contender) -> None:
    model = net()
    with pytest.raises(TypeError, match=r"iterable"):
        contender(model, model[0].weight)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        contender(model, [])
    with pytest.raises(ValueError, match="more than one parameter group"):
        contender(model, [{"params": list(model.parameters())}, {"params": [model[0].bias]}])
    with pytest.raises(TypeError, match="ordered"):
        contender(model, [{"params": set(model.parameters())}])
    assert not any(module._forward_hooks for module in model.modules())


@convention(4, ALL)
def test_lr_as_a_tensor(contender: Contender) -> None:
    """Schedulers fill it, a user puts a number in its place, and a checkpoint keeps what it is."""
    variants: list[dict[str, Any]] = [{}, {"maximize": True, "weight_decay": 0.1}]
    if contender.is_adam:
        variants += [{"nesterov": False}, {"foreach": False}]
    elif contender.is_kfac:
        variants += [{"tail": "adamw"}, {"nesterov": True, "foreach": True}, {"momentum": 0.0, "foreach": False}]
    for options in variants:
        models = [net(), net()]
        rates = (0.1, torch.tensor(0.1, dtype=torch.float64))
        optimizers = [contender(model, lr=lr, **options) for model, lr in zip(models, rates, strict=True)]
        schedulers = [LambdaLR(optimizer, lambda step: 0.5**step) for optimizer in optimizers]
        tensor = optimizers[1].param_groups[0]["lr"]
        for model, optimizer, scheduler in zip(models, optimizers, schedulers, strict=True):
            for step in range(2):
                train(model, optimizer, 1, first=step)
                scheduler.step()
        assert optimizers[1].param_groups[0]["lr"] is tensor
        torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-12, atol=1e-12)
        for optimizer, kind in zip(optimizers, (float, Tensor), strict=True):
            model = net()
            other = contender(model, lr=0.3)
            other.load_state_dict(optimizer.state_dict())
            assert isinstance(other.param_groups[0]["lr"], kind)
            assert float(other.param_groups[0]["lr"]) == 0.1 * 0.5**2
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = 0.05
            train(model, optimizer, 1, first=2)
            assert isinstance(optimizer.state_dict()["param_groups"][0]["lr"], float)
        torch.testing.assert_close(vector(models[1]), vector(models[0]), rtol=1e-12, atol=1e-12)


BAD = [
    ("lr", -1.5, "lr|learning rate"),
    ("weight_decay", -1.5, "weight_decay"),
    ("eps", -1.5, "eps"),
    ("betas", (1.5, 0.9), "beta"),
    ("betas", (0.9, 1.5), "beta"),
    ("lr", torch.tensor([1.5, 1.5]), "lr"),
]


@convention(5)
def test_bad_arguments(contender: Contender) -> None:
    for name, value, called in BAD:
        model = net()
        options = contender.tails[-1]
        with pytest.raises(ValueError, match=rf"(?i){called}") as error:
            contender(model, **{name: value}, **options)
        assert "1.5" in str(error.value) or isinstance(value, Tensor)
        assert not any(module._forward_hooks for module in model.modules())


@convention(5, AdamW=Fails("add_param_group takes lr=-1.5", "DID NOT RAISE"))
def test_bad_arguments_of_a_group(contender: Contender) -> None:
    for name, value, called in BAD:
        model = net()
        optimizer = contender(model, model[0].parameters())
        state, hooks = len(optimizer.state), [len(module._forward_hooks) for module in model.modules()]
        with pytest.raises(ValueError, match=rf"(?i){called}"):
            optimizer.add_param_group({"params": list(model[2].parameters()), name: value})
        assert len(optimizer.param_groups) == 1
        assert len(optimizer.state) == state
        assert [len(module._forward_hooks) for module in model.modules()] == hooks


@convention(6, ALL)
def test_closure(contender: Contender) -> None:
    """Run once, with gradients enabled, its loss returned; the rest as without."""
    model, other = net(), net()
    optimizer, plain = contender(model), contender(other)
    calls = []
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        with torch.no_grad():
            expected = loss_of(model, step)
            assert torch.equal(optimizer.step(closure), expected)
        train(other, plain, 1, first=step)
    assert calls == [True] * 3
    assert torch.equal(vector(model), vector(other))
    assert plain.step() is None


@convention(7, ALL)
def test_parameters_without_gradient_stay(contender: Contender) -> None:
    """Frozen, or simply not reached, with weight decay too."""
    model = net()
    optimizer = contender(model, weight_decay=0.1)
    train(model, optimizer, 2)
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    model[2].bias.grad = None
    bias = model[2].bias.detach().clone()
    optimizer.step()
    assert equal(before, list(model[0].parameters()))
    assert torch.equal(bias, model[2].bias)
    assert all(p.grad is None for p in model[0].parameters())


@convention(7, ALL, KFACPreconditioner=Fails("writes them in place", "were written"))
def test_gradients_are_not_written(contender: Contender) -> None:
    model = net()
    optimizer = contender(model, weight_decay=0.1)
    train(model, optimizer, 1)
    optimizer.zero_grad()
    loss_of(model, 1).backward()
    objects = [p.grad for p in model.parameters()]
    before = [g.clone() for g in objects]
    optimizer.step()
    assert all(p.grad is g for p, g in zip(model.parameters(), objects, strict=True))
    assert equal(before, objects), "gradients were written"


@convention(7)
def test_sparse_gradients_are_refused(contender: Contender) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 2)})
    optimizer = contender(model)
    before = vector(model)
    model["head"](model["embedding"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(vector(model), before)


class ComplexModel(nn.Module):
    """A covered layer before and after complex parameters, one of them the weight of a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.complex = nn.Linear(6, 6, dtype=torch.complex64)
        self.phase = nn.Parameter(torch.full((6,), 1 + 1j))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.complex(self.first(x).to(torch.complex64)) * self.phase).abs())


@convention(7)
def test_complex_parameters(contender: Contender) -> str:
    """Trained in both parts, or refused in words before anything moves; no part is dropped on the way."""
    torch.manual_seed(0)
    model = ComplexModel()
    before = [p.detach().clone() for p in model.parameters()]
    outcome = "pass: trained"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            optimizer = contender(model)
            for _ in range(2):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(torch.randn(12, 5)), torch.randint(4, (12,))).backward()
                optimizer.step()
        except (TypeError, ValueError, RuntimeError) as error:
            assert "complex" in str(error)
            outcome = "pass: refused"
    parts = [
        (torch.view_as_real(old), torch.view_as_real(new.detach()))
        for old, new in zip(before, model.parameters(), strict=True)
        if new.is_complex()
    ]
    assert len(parts) == 3
    if outcome == "pass: refused":
        assert equal(before, [p.detach() for p in model.parameters()])
    else:
        assert all(bool((old != new).all()) for old, new in parts)
    return outcome


@convention(8, ALL)
def test_add_param_group(contender: Contender) -> None:
    """After some steps: new parameters train, with their own options, and checkpoints have them."""
    model = net()
    optimizer = contender(model, model[4].parameters())
    first = vector(model[0])
    train(model, optimizer, 2)
    assert torch.equal(vector(model[0]), first)
    optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.0})
    optimizer.add_param_group({"params": list(model[2].parameters())})
    before = vector(model)
    after = train(model, optimizer, 2, first=2)
    assert torch.equal(vector(model[0]), first)  # lr is 0
    assert not torch.equal(before, after)
    optimizer.param_groups[1]["lr"] = 0.1
    train(model, optimizer, 1, first=4)
    assert not torch.equal(vector(model[0]), first)
    assert len(optimizer.state_dict()["state"]) == 6
    owner = preconditioner_of(optimizer)
    assert owner is None or list(owner.diagnostics()["layers"]) == ["0", "2", "4"]
