"""What an optimizer remembers, and how it comes back (conventions 9 to 12)."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from support.contenders import ALL, Contender, convention, equal, factors, net, preconditioner_of, train, vector
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer


def _tensors(state_dict: Any) -> list[Tensor]:
    if isinstance(state_dict, dict):
        return [tensor for value in state_dict.values() for tensor in _tensors(value)]
    return [state_dict] if isinstance(state_dict, Tensor) else []


def _other_net() -> nn.Module:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    return model


def _parts(model: nn.Module, optimizer: Optimizer) -> list[Any]:
    """What a checkpoint is made of: the model, the optimizer and, if it is another object, what preconditions."""
    owner = preconditioner_of(optimizer)
    return [model, optimizer] if owner is optimizer or owner is None else [model, optimizer, owner]


def _save(model: nn.Module, optimizer: Optimizer) -> list[dict[str, Any]]:
    return [part.state_dict() for part in _parts(model, optimizer)]


def _load(saved: list[dict[str, Any]], model: nn.Module, optimizer: Optimizer) -> None:
    for part, state_dict in zip(_parts(model, optimizer), saved, strict=True):
        part.load_state_dict(state_dict)


@convention(9, ALL)
def test_state_dict_resumes_bit_for_bit(contender: Contender) -> None:
    for options in contender.variants().values():
        model, resumed = net(), _other_net()
        optimizer = contender(model, **options)
        train(model, optimizer, 4)
        saved = copy.deepcopy(_save(model, optimizer))
        fresh = contender(resumed, **options)
        _load(saved, resumed, fresh)
        again = fresh.state_dict()
        assert again["param_groups"] == saved[1]["param_groups"]
        assert {i: set(values) for i, values in again["state"].items()} == {
            i: set(values) for i, values in saved[1]["state"].items()
        }
        assert torch.equal(train(resumed, fresh, 3, first=4), train(model, optimizer, 3, first=4))
        assert equal(factors(fresh), factors(optimizer))


def _pickled(parts: Any) -> Any:
    return pickle.loads(pickle.dumps(parts))


@convention(9, ALL)
def test_copies_of_model_and_optimizer_train_alone(contender: Contender) -> None:
    """Deep copies and pickles of model and optimizer go on as the original does, bit for bit, and leave it alone."""
    for duplicate in (copy.deepcopy, _pickled):
        for options in contender.variants().values():
            model = net()
            optimizer = contender(model, **options)
            train(model, optimizer, 3)
            before, factors_before = vector(model), factors(optimizer)
            other_model, other, *front = duplicate(_parts(model, optimizer))
            if front:
                other.in_front = front[0]
            assert other.param_groups[0]["params"][0] is other_model[0].weight
            others = train(other_model, other, 3, first=3)
            assert torch.equal(vector(model), before)
            assert equal(factors(optimizer), factors_before)
            assert torch.equal(train(model, optimizer, 3, first=3), others)
            assert equal(factors(optimizer), factors(other))


@convention(9)
def test_copy_of_the_optimizer_alone(contender: Contender) -> None:
    """Its parameters are copies, too: given the same gradients, they move in the same way."""
    for duplicate in (copy.deepcopy, _pickled):
        model = net()
        optimizer = contender(model)
        train(model, optimizer, 3)
        optimizer.zero_grad()
        other = duplicate(optimizer)
        assert equal(_tensors(other.state_dict()), _tensors(optimizer.state_dict()))
        copies = other.param_groups[0]["params"]
        for p, q in zip(model.parameters(), copies, strict=True):
            assert p is not q
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        before = vector(model)
        other.step()
        assert torch.equal(vector(model), before)
        optimizer.step()
        assert not torch.equal(vector(model), before)
        assert equal([p.detach() for p in model.parameters()], [q.detach() for q in copies])


@convention(10, ALL)
def test_plain_values_only(contender: Contender, tmp_path: Path) -> None:
    """What torch.load(weights_only=True) lets pass, before the first step and later; and it resumes."""
    for options in contender.variants().values():
        model, resumed = net(), _other_net()
        optimizer = contender(model, **options)
        for steps in (0, 3):
            train(model, optimizer, steps)
            torch.save(_save(model, optimizer), tmp_path / "saved.pt")
            fresh = contender(resumed, **options)
            _load(torch.load(tmp_path / "saved.pt", weights_only=True), resumed, fresh)
        assert torch.equal(train(resumed, fresh, 2, first=3), train(model, optimizer, 2, first=3))


@convention(11)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_distributed_checkpoint(contender: Contender, tmp_path: Path) -> None:
    """Saved by names of parameters, flat and nested, through files; loaded into a fresh optimizer, it resumes."""
    for flat, full in ((False, False), (True, False), (False, True)):
        for name, variant in contender.variants().items():
            options = StateDictOptions(flatten_optimizer_state_dict=flat, full_state_dict=full)
            path = tmp_path / f"{name}{flat}{full}"
            model, resumed = net(), _other_net()
            optimizer = contender(model, **variant)
            train(model, optimizer, 3)
            state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
            kinds = (Tensor, int, float, bool, str, tuple, list, type(None))
            assert not flat or all(isinstance(value, kinds) for value in state["optimizer"].values())
            dcp.save(state, checkpoint_id=path, no_dist=True)

            fresh = contender(resumed, **variant)
            # The template that values are read into has to have what a trained optimizer has.
            template = {"optimizer": get_optimizer_state_dict(resumed, fresh, options=options)}
            if flat:
                assert template["optimizer"].keys() == state["optimizer"].keys(), name
            dcp.load(template, checkpoint_id=path, no_dist=True)
            set_optimizer_state_dict(resumed, fresh, template["optimizer"], options=options)
            resumed.load_state_dict(model.state_dict())
            assert torch.equal(train(resumed, fresh, 2, first=3), train(model, optimizer, 2, first=3)), name
            assert equal(factors(fresh), factors(optimizer))


def _fake_step(model: nn.Module, optimizer: Optimizer) -> None:
    """What the distributed checkpoint does to an optimizer without state."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step(closure=None)
    for group, lr in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = lr
    optimizer.zero_grad(set_to_none=True)


@convention(11, ALL)
@pytest.mark.filterwarnings("ignore:no statistics came:UserWarning")
def test_fake_step_changes_nothing(contender: Contender) -> None:
    """Zero gradients, lr 0 and no backward pass: parameters and factors stay, before the first step and later."""
    model = net()
    optimizer = contender(model, weight_decay=0.1)
    for steps in (0, 3):
        train(model, optimizer, steps)
        owner = preconditioner_of(optimizer)
        before, factors_before = vector(model), factors(optimizer)
        updates = None if owner is None else owner.engine.bank.updates.clone()
        _fake_step(model, optimizer)
        assert torch.equal(vector(model), before)
        assert equal(factors(optimizer), factors_before)
        assert owner is None or torch.equal(owner.engine.bank.updates, updates)


@convention(11)
def test_asking_for_state_before_the_first_step(contender: Contender) -> None:
    model, untouched = net(), net()
    optimizer = contender(model)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    assert set(state) == {name for name, _ in model.named_parameters()}
    assert all("step" in values for values in state.values())
    assert torch.equal(vector(model), vector(untouched))
    if contender.is_kfac:  # AdamW's count of steps has gone on by then
        assert torch.equal(train(model, optimizer, 2), train(untouched, contender(untouched), 2))


@convention(12)
def test_types_survive_loading(contender: Contender) -> str:
    """State of bfloat16 parameters keeps its types and values; factors are float32 there."""
    for options in contender.variants().values():
        model, other = net(torch.bfloat16), net(torch.bfloat16)
        optimizer = contender(model, **options)
        train(model, optimizer, 3)
        fresh = contender(other, **options)
        saved = copy.deepcopy(optimizer.state_dict())
        fresh.load_state_dict(saved)
        loaded = fresh.state_dict()
        kinds = [{(i, k): v.dtype for i, s in x["state"].items() for k, v in s.items()} for x in (saved, loaded)]
        assert kinds[0] == kinds[1]
        torch.testing.assert_close(loaded["state"], saved["state"], rtol=0, atol=0, equal_nan=True)
        assert all(kind == torch.float32 for (_, key), kind in kinds[0].items() if key in ("step", "kfac_A", "kfac_G"))
        assert all(side.dtype == torch.float32 for side in factors(fresh))
        assert not contender.is_kfac or len(factors(fresh)) == 6
    moments = {str(kind).removeprefix("torch.") for (_, key), kind in kinds[0].items() if key.startswith("exp_avg")}
    return "pass" if contender.is_kfac else f"pass: moments {', '.join(moments)} before and after"
