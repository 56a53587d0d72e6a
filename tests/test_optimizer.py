"""KFAC as a torch.optim.Optimizer."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from support.helpers import mlp
from torch import Tensor, nn

import kfac_triton.optimizer
import kfac_triton.preconditioner
from kfac_triton import KFAC


class Mixed(nn.Module):
    """Covered layers beside a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.norm = nn.LayerNorm(6)
        self.layer = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.scale * torch.tanh(self.layer(self.norm(self.embedding(tokens))))).mean(1)


def _loss(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(10, (32, 4), generator=generator), torch.arange(32) % 3
    tokens[:, 0] = labels  # something to learn
    return nn.functional.cross_entropy(model(tokens), labels)


def _train(optimizer: KFAC, model: nn.Module, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("tail", ["sgd", "adamw"])
@pytest.mark.parametrize("inverse", ["auto", "newton_schulz", "factored", "cholesky", "eigh"])
def test_every_parameter_trains_and_the_loss_falls(tail: str, inverse: str) -> None:
    model = Mixed()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lr = 0.1 if tail == "sgd" else 0.03  # at 0.3 SGD oscillates, and rounding decides about the last loss
    optimizer = KFAC(model, lr=lr, damping=0.1, kl_clip=None, tail=tail, inverse=inverse)
    losses = _train(optimizer, model, 30)
    assert losses[-1] < 0.7 * losses[0]
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), f"{name} did not move"


def test_it_is_an_optimizer_to_schedulers_with_float_and_tensor_lr() -> None:
    for lr in (0.1, torch.tensor(0.1)):
        model = Mixed()
        optimizer = KFAC(model, lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            _train(optimizer, model, 1)
            scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.1 * 0.5**3)


def test_gradients_are_not_written() -> None:
    model = Mixed()
    optimizer = KFAC(model, lr=0.1)
    _loss(model).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    optimizer.step()
    assert all(torch.equal(a, p.grad) for a, p in zip(before, model.parameters(), strict=True) if p.grad is not None)


def test_closure_runs_once_with_gradients_enabled_and_its_loss_comes_back() -> None:
    model = Mixed()
    optimizer = KFAC(model, lr=0.1)
    calls = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss.item()

    expected = _loss(model).item()
    assert optimizer.step(closure) == expected
    assert calls == [True]


def test_closure_and_plain_step_agree() -> None:
    results = []
    for use_closure in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        optimizer = KFAC(model, lr=0.1)
        for _ in range(3):

            def closure(optimizer: KFAC = optimizer, model: nn.Module = model) -> Tensor:
                optimizer.zero_grad()
                loss = _loss(model)
                loss.backward()
                return loss

            if use_closure:
                optimizer.step(closure)  # type: ignore[arg-type]
            else:
                closure()
                optimizer.step()
        results.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*results)


def test_weight_and_bias_in_different_groups() -> None:
    """The usual split of decayed and undecayed parameters gives the same update as one group."""
    results = []
    for split in (False, True):
        torch.manual_seed(0)
        model = Mixed()
        decayed = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups: Any = [{"params": decayed}, {"params": others}] if split else None
        _train(KFAC(model, groups, lr=0.1), model, 3)
        results.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*results)


def test_group_options_override_defaults() -> None:
    model = Mixed()
    uncovered = [*model.embedding.parameters(), *model.norm.parameters(), model.scale]
    covered = [*model.layer.parameters(), *model.head.parameters()]
    groups = [{"params": covered}, {"params": uncovered, "tail": "adamw", "lr": 0.0}]
    optimizer = KFAC(model, groups, lr=0.1)
    before = [p.detach().clone() for p in uncovered]
    _train(optimizer, model, 3)
    assert all(torch.equal(a, b) for a, b in zip(before, uncovered, strict=True))
    assert set(optimizer.state[model.scale]) == {"step", "exp_avg", "exp_avg_sq"}


def test_named_parameters_are_accepted() -> None:
    model = Mixed()
    _train(KFAC(model, model.named_parameters(), lr=0.1), model, 1)


def test_only_the_layers_of_given_parameters_are_covered() -> None:
    model = Mixed()
    optimizer = KFAC(model, model.head.parameters(), lr=0.1)
    before = model.layer.weight.detach().clone()
    _train(optimizer, model, 2)
    assert list(optimizer.factors()) == ["head"]
    assert torch.equal(model.layer.weight, before)
    assert optimizer.diagnostics()["skipped"] == dict.fromkeys(("embedding", "norm", "layer"), "its weight is not optimized")


def test_add_param_group_covers_new_layers_and_keeps_factors() -> None:
    model = Mixed()
    optimizer = KFAC(model, model.head.parameters(), lr=0.1)
    _train(optimizer, model, 3)
    before = optimizer.factors()["head"]
    optimizer.add_param_group({"params": list(model.layer.parameters())})
    assert all(torch.equal(a, b) for a, b in zip(before, optimizer.factors()["head"], strict=True))
    _train(optimizer, model, 2)
    updates = {name: layer["updates"] for name, layer in optimizer.diagnostics()["layers"].items()}
    assert updates == {"layer": 2, "head": 5}
    hooks = [type(hook).__name__ for module in model.modules() for hook in module._forward_hooks.values()]
    assert sorted(hooks) == ["CaptureHook", "CaptureHook", "EndHook"]


def test_every_parameter_has_state_from_the_start() -> None:
    model = Mixed()
    optimizer = KFAC(model, lr=0.1)
    assert all("step" in optimizer.state[p] for p in model.parameters())


def test_parameter_without_gradient_is_skipped() -> None:
    model = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    optimizer = KFAC(model, lr=0.1, weight_decay=0.1)
    before = model[1].weight.detach().clone()
    model[0](torch.randn(4, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model[1].weight, before)


def test_bias_frozen_in_mid_run_stays() -> None:
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, lr=0.1, momentum=0.0)
    for frozen in (False, True):
        model.bias.requires_grad_(not frozen)
        before = model.bias.detach().clone()
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
        assert torch.equal(model.bias, before) == frozen


def test_parameter_objects_may_be_swapped() -> None:
    """Accelerate with FSDP2 replaces parameters in groups and modules between construction and the first step."""
    model = nn.Linear(3, 2)
    optimizer = KFAC(model, lr=0.1, momentum=0.0, kl_clip=None)
    new = nn.Parameter(model.weight.detach().clone())
    group = optimizer.param_groups[0]
    state = optimizer.state.pop(model.weight)
    group["params"] = [new if p is model.weight else p for p in group["params"]]
    optimizer.state[new] = state
    model.weight = new
    before = new.detach().clone()
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(new, before)


def test_closed_optimizer_refuses_to_step_and_changes_nothing() -> None:
    model = Mixed()
    with KFAC(model, lr=0.1) as optimizer:
        _train(optimizer, model, 1)
    _loss(model).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="closed"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_sparse_gradients_are_refused_before_anything_moves() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4, sparse=True), "head": nn.Linear(4, 2)})
    optimizer = KFAC(model, lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    updates = optimizer.engine.bank.updates.clone()
    model["head"](model["embedding"](torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert torch.equal(updates, optimizer.engine.bank.updates)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_bad_param_groups() -> None:
    model = Mixed()
    with pytest.raises(ValueError, match="empty parameter list"):
        KFAC(model, [], lr=0.1)
    with pytest.raises(TypeError):
        KFAC(model, model.head.weight, lr=0.1)
    optimizer = KFAC(model, model.head.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"lr must be .* but is -1"):
        optimizer.add_param_group({"params": [model.scale], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_failed_construction_leaves_no_hooks() -> None:
    model = mlp()
    with pytest.raises(ValueError, match="damping"):
        KFAC(model, damping=-1.0)
    with pytest.raises(ValueError, match="more than one parameter group"):
        KFAC(model, [{"params": list(model.parameters())}, {"params": list(model.parameters())}])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("module", [kfac_triton.optimizer, kfac_triton.preconditioner])
def test_examples_in_docstrings_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


def test_repr_names_the_options() -> None:
    text = repr(KFAC(mlp(), lr=0.25))
    assert "KFAC" in text
    assert "lr: 0.25" in text


def test_every_argument_reaches_the_engine_or_the_groups() -> None:
    """Each has a value of its own, so that one in the place of another would show."""
    settings: dict[str, Any] = {
        "damping": 0.11, "kl_clip": 0.12, "ema_decay": 0.13, "statistics_every": 2, "inverse_every": 3, "warmup": 4,
        "fisher": "mc", "fisher_samples": 5, "loss": nn.CrossEntropyLoss(), "curvature": "ekfac", "exact_damping": True,
        "weight_sharing": "reduce", "inverse": "eigh", "inverse_tolerance": 0.14, "loss_reduction": "sum",
        "loss_terms": "tokens", "batch_dim": 1, "calls": "joint", "loss_scale": 16.0, "rows": "nonzero", "stats_fraction": 0.5,
        "max_stats_tokens": 6, "max_kept_bytes": 8, "max_factor_size": 7, "oversize": "block", "factor_dtype": "bfloat16",
        "norms": "full", "bias": "joint", "noise_damping": 0.15, "refresh": "qr",
        "skip": "none", "include": "*e*", "split": {"layer": 2}, "capturable": False, "backend": "torch",
    }  # fmt: skip
    options = {
        "lr": 0.21, "momentum": 0.22, "nesterov": True, "weight_decay": 0.23, "tail": "adamw", "betas": (0.24, 0.25),
        "eps": 0.26, "foreach": False, "maximize": True, "capturable": False,
    }  # fmt: skip
    optimizer = KFAC(Mixed(), **{**settings, **options})
    assert vars(optimizer.engine.settings) == settings
    (group,) = optimizer.param_groups
    assert {name: value for name, value in group.items() if name != "params"} == options
    optimizer = KFAC(nn.Linear(2, 2), capturable=True)
    assert optimizer.engine.settings.capturable
    assert optimizer.param_groups[0]["capturable"]


def test_a_group_that_is_added_again_starts_anew() -> None:
    """Its parameters get new momentum and counters."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = KFAC(net)
    optimizer.add_param_group({"params": [extra := nn.Parameter(torch.ones(3))]})
    for _ in range(2):
        optimizer.zero_grad()
        (net(torch.randn(6, 4)).square().mean() + extra.square().sum()).backward()
        optimizer.step()
    assert optimizer.state[extra]["step"] == 2
    group = optimizer.param_groups.pop()
    optimizer.add_param_group({"params": group["params"]})
    assert optimizer.state[extra]["step"] == 0
    assert not optimizer.state[extra]["momentum_buffer"].any()
