"""What `print(optimizer)` says of the curvature and of what it covers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support.launches import nobody_waits
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam


def network() -> nn.Module:
    """Weights 32 and 16, biases 8 and 2, a norm with 16: 74 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 2))


def lines(optimizer: KFAC) -> list[str]:
    """Those about the curvature."""
    text = repr(optimizer).splitlines()
    assert text[0] == f"{type(optimizer).__name__} (" and text[-1] == ")"
    return [line.strip() for line in text[text.index("Curvature") + 1 : -1]]


def step(model: nn.Module, optimizer: KFAC) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(torch.randn(16, 4)), torch.randint(2, (16,))).backward()
    optimizer.step()


def test_settings_of_kfac() -> None:
    optimizer = KFAC(network(), damping=0.25, kl_clip=None, statistics_every=2, inverse_every=5, norms="skip")
    settings = ["curvature: kfac", "damping: 0.25", "kl_clip: None", "statistics_every: 2", "inverse_every: 5"]
    assert lines(optimizer) == [*settings, "covered: 2 layers, 58 of 74 trainable parameters (78.3 %)"]
    optimizer.change(damping=0.5)
    assert "damping: 0.5" in lines(optimizer)


@pytest.mark.parametrize(("bias", "covered"), [("separate", "48 of 74"), ("joint", "58 of 74")])
def test_settings_of_kfacadam_have_its_names(bias: str, covered: str) -> None:
    optimizer = KFACAdam(network(), refresh_every=3, factor_decay=0.875, noise_damping=0.5, bias=bias)
    share = {"48 of 74": 64.8, "58 of 74": 78.3}[covered]
    settings = ["statistics_every: 3", "refresh_every: 3", "factor_decay: 0.875", "noise_damping: 0.5", f"bias: {bias}"]
    assert lines(optimizer) == [*settings, f"covered: 2 layers, {covered} trainable parameters ({share} %)"]


def test_the_same_rule_in_kfac_has_those_of_kfac() -> None:
    found = lines(KFAC(network(), curvature="adam", tail="adamw", inverse_every=3))
    assert found[:4] == ["curvature: adam", "statistics_every: 1", "inverse_every: 3", "ema_decay: 0.95"]


def test_options_of_groups_are_printed_as_by_pytorch() -> None:
    optimizer = KFAC(network(), lr=0.25)
    head, _, _ = repr(optimizer).partition("Curvature")
    assert head + ")" == torch.optim.Optimizer.__repr__(optimizer)


def test_of_packed_and_frozen_parameters() -> None:
    """The projections have 4 (8 x 8 + 8); bias_k and bias_v, 16 more, are no projections'. The input projection is frozen."""
    attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
    assert lines(KFAC(attention))[-1] == "covered: 4 layers, 288 of 304 trainable parameters (94.7 %)"
    attention.in_proj_weight.requires_grad_(False)
    attention.in_proj_bias.requires_grad_(False)
    assert lines(KFAC(attention))[-1] == "covered: 1 layer, 72 of 88 trainable parameters (81.8 %)"


def test_parameters_of_no_group_do_not_count() -> None:
    model = network()
    optimizer = KFAC(model, [model[0].weight, model[2].bias])
    assert lines(optimizer)[-1] == "covered: 1 layer, 32 of 40 trainable parameters (80.0 %)"


def test_all_but_one_are_not_all() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    model.register_parameter("temperature", nn.Parameter(torch.ones(())))
    assert lines(KFAC(model))[-1] == "covered: 2 layers, 20,200 of 20,201 trainable parameters (99.9 %)"


@pytest.mark.parametrize("kind", [KFAC, KFACAdam])
def test_it_does_not_fail_in_any_state(kind: Callable[..., KFAC]) -> None:
    model = network()
    optimizer = kind(model)
    before = lines(optimizer)
    with nobody_waits():
        assert lines(optimizer) == before
    step(model, optimizer)
    assert lines(optimizer) == lines(copy.deepcopy(optimizer)) == before
    optimizer.close()
    assert lines(optimizer) == lines(copy.deepcopy(optimizer)) == [*before, "closed: hooks are removed"]


def test_schedules_are_not_called() -> None:
    model, calls = network(), []

    def damping(step: int) -> float:
        calls.append(step)
        return 0.5 / (1 + step)

    optimizer = KFAC(model, damping=damping, inverse_every=lambda step: 1)
    step(model, optimizer)
    step(model, optimizer)
    before = len(calls)
    found = lines(optimizer)
    assert len(calls) == before
    assert found[1] == "damping: 0.25, by a function of the step" and found[4] == "inverse_every: a function of the step"


def test_steps_of_the_quadratic_model() -> None:
    optimizer = KFAC(network(), lr="auto", loss=nn.CrossEntropyLoss(), fisher="mc")
    assert "lr: auto" in lines(optimizer) and "lr: auto" not in lines(KFAC(network()))


def test_a_rate_on_a_device_is_not_read() -> None:
    optimizer = KFAC(network())
    optimizer.param_groups[0]["lr"] = torch.full((), 0.1, device="meta")
    assert "    lr: a tensor on meta" in repr(optimizer)
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert "    lr: 0.5" in repr(optimizer) or "    lr: tensor(0.5" in repr(optimizer)


def test_an_optimizer_that_is_being_made_has_groups_alone() -> None:
    """As errors and debuggers print it."""
    seen: list[str] = []

    class Watched(KFAC):
        def add_param_group(self, param_group: dict[str, Tensor]) -> None:
            super().add_param_group(param_group)
            seen.append(repr(self))

    Watched(network())
    assert seen[0].startswith("Watched (\nParameter Group 0") and "Curvature" not in seen[0]
