"""A run that is saved, killed and resumed in another process is the uninterrupted one, bit for bit."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import SETTINGS, backward, net, same_factors, train, vector
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from kfac_triton import KFAC, KFACPreconditioner

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SETTINGS)
def test_through_a_file_of_plain_values(name: str, dtype: torch.dtype) -> None:
    settings = {"lr": 0.1, **SETTINGS[name]}
    model = net(dtype)
    optimizer = KFAC(model, **settings)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(5, 9))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = net(dtype)
    resumed.load_state_dict(saved["model"])
    other = KFAC(resumed, **{**settings, "lr": 0.7})
    other.load_state_dict(saved["optimizer"])
    train(resumed, other, range(5, 9))
    assert torch.equal(vector(resumed), vector(model))
    assert same_factors(optimizer, other)
    assert other.diagnostics()["steps"] == 9


@pytest.mark.parametrize("name", ["default", "ekfac, old", "adamw"])
def test_a_preconditioner(name: str) -> None:
    settings = {key: value for key, value in SETTINGS[name].items() if key not in ("tail", "lr")}

    def make() -> tuple[nn.Module, torch.optim.Optimizer, KFACPreconditioner]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        preconditioner = KFACPreconditioner(model, **settings)
        preconditioner.attach(optimizer)
        return model, optimizer, preconditioner

    first = make()
    train(*first[:2], range(5))
    file = io.BytesIO()
    torch.save([x.state_dict() for x in first], file)
    train(*first[:2], range(5, 9))
    file.seek(0)
    second = make()
    for part, saved in zip(second, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(*second[:2], range(5, 9))
    assert torch.equal(vector(first[0]), vector(second[0]))
    assert same_factors(first[2], second[2])


def test_without_inverses_it_goes_on_with_fresh_ones() -> None:
    """Half the size; where the last inverses were old it is another run, where they were new the same one."""
    for settings, is_same in (({"inverse_every": 3}, False), ({}, True)):
        model = net()
        optimizer = KFAC(model, lr=0.1, **settings)
        train(model, optimizer, range(5))
        small = optimizer.state_dict(include_inverses=False)
        assert not any("inverse" in key or "certificates" in key for state in small["state"].values() for key in state)
        resumed = net()
        resumed.load_state_dict(model.state_dict())
        other = KFAC(resumed, lr=0.1, **settings)
        other.load_state_dict(small)
        train(model, optimizer, range(5, 6))
        train(resumed, other, range(5, 6))
        assert torch.equal(vector(resumed), vector(model)) == is_same


def test_inverses_of_another_method_are_not_taken() -> None:
    model, other_model = net(), net()
    optimizer = KFAC(model, inverse="factored")
    train(model, optimizer, range(3))
    other = KFAC(other_model, inverse="cholesky", inverse_every=5)
    other.load_state_dict(optimizer.state_dict())
    assert same_factors(optimizer, other)
    train(other_model, other, range(3, 4))
    for inverse in other.engine.curvature.inverses:
        assert (inverse.residual <= 0.3).all()  # made anew, and certified


def test_an_optimizer_and_its_loaded_state_share_nothing() -> None:
    model, other_model = net(), net()
    optimizer, other = KFAC(model, lr=0.1), KFAC(other_model, lr=0.1)
    train(model, optimizer, range(2))
    other.load_state_dict(optimizer.state_dict())
    before = [optimizer.state[p][key].clone() for p in model.parameters() for key in ("step", "momentum_buffer")]
    train(other_model, other, range(2, 4))
    after = [optimizer.state[p][key] for p in model.parameters() for key in ("step", "momentum_buffer")]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


@pytest.mark.parametrize("damage", ["nan", "inf", "shape", "groups"])
def test_a_damaged_state_of_the_tail_is_refused_and_changes_nothing(damage: str) -> None:
    model = net()
    optimizer = KFAC(model, lr=0.1)
    train(model, optimizer, range(2))
    saved = KFAC(net(), lr=0.7).state_dict()
    buffer = saved["state"][3]["momentum_buffer"]
    if damage == "groups":
        saved["param_groups"][0]["params"].pop()
    elif damage == "shape":
        saved["state"][3]["momentum_buffer"] = buffer.new_zeros(7)
    else:
        buffer.view(-1)[0] = float(damage)
    before = optimizer.factors()
    with pytest.raises(
        ValueError, match={"nan": "not finite", "inf": "not finite", "shape": "shape", "groups": "groups"}[damage]
    ):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert all(torch.equal(x, y) for k, pair in optimizer.factors().items() for x, y in zip(pair, before[k], strict=True))


def test_a_checkpoint_of_adamw_starts_kfac() -> None:
    """What it lacks has the values of the constructor; its moments go on."""
    model = net()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.02)
    train(model, adamw, range(3))
    optimizer = KFAC(model, tail="adamw", lr=0.5)
    optimizer.load_state_dict(adamw.state_dict())
    group = optimizer.param_groups[0]
    assert (group["lr"], group["tail"]) == (0.02, "adamw")
    assert optimizer.state[model.scale]["step"] == 3
    assert torch.equal(optimizer.state[model.scale]["exp_avg"], adamw.state[model.scale]["exp_avg"])
    train(model, optimizer, range(3, 5))


SCRIPT = """
import os, signal, sys, torch
from support.runs import net, train, vector
from kfac_triton import KFAC

path, dtype = sys.argv[1], getattr(torch, sys.argv[2])
first, last, dies = int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "dies"
model = net(dtype)
optimizer = KFAC(model, lr=0.1, statistics_every=2, inverse_every=4)
if first:
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
for step in range(first, last):
    train(model, optimizer, range(step, step + 1))
    if step == 98:  # the 99th step: neither statistics nor inverses are due in the next
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    if dies and step == 120:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save(vector(model), path + ".result")
"""


def _process(path: Path, *arguments: str) -> int:
    """Runs the script in a process of its own."""
    here = Path(__file__).parents[1]
    command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(path), *arguments]
    return subprocess.run(command, env={"PYTHONPATH": f"{here}:{here.parent}", "OMP_NUM_THREADS": "1"}, check=False).returncode


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_killed_run_resumed_from_its_last_checkpoint(dtype: str, tmp_path: Path) -> None:
    """200 steps in one go; 121, killed in the middle, and the rest in a new process from the checkpoint of step 99."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert _process(whole, dtype, "0", "200", "lives") == 0
    assert _process(killed, dtype, "0", "200", "dies") == -9
    assert _process(killed, dtype, "99", "200", "lives") == 0
    one, other = (torch.load(f"{path}.result", weights_only=True) for path in (whole, killed))
    assert one.isfinite().all()
    assert (one - other).abs().max() == 0


def _all(model: nn.Module, optimizer: KFAC, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}


@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
@pytest.mark.parametrize("name", [*SETTINGS, "auto"])
def test_through_a_distributed_checkpoint(name: str, flat: bool, tmp_path: Path) -> None:
    """torch.distributed.checkpoint, in one process: what it loads into is the state dict of a fresh optimizer."""
    auto = {"lr": "auto", "loss": nn.MSELoss(), "damping": 1.0}
    settings: dict[str, Any] = auto if name == "auto" else {"lr": 0.1, **SETTINGS[name]}
    dtype = torch.float64 if name == "auto" else torch.float32
    model = net(dtype)
    optimizer = KFAC(model, **settings)
    train(model, optimizer, range(4))
    dcp.save(_all(model, optimizer, flat), checkpoint_id=tmp_path, no_dist=True)
    train(model, optimizer, range(4, 8))

    resumed = net(dtype)
    other = KFAC(resumed, **settings)
    state = _all(resumed, other, flat)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(resumed, state["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(resumed, other, state["optimizer"], options=options)
    train(resumed, other, range(4, 8))
    assert torch.equal(vector(resumed), vector(model))
    assert same_factors(optimizer, other)


@pytest.mark.parametrize("key", ["kfac_updates", "kfac_steps", "kfac_G"])
def test_a_checkpoint_that_lacks_something_is_refused_and_changes_nothing(key: str) -> None:
    model = net()
    preconditioner = KFACPreconditioner(model, inverse_every=2)
    backward(model, 0)
    preconditioner.precondition_()
    before, saved = preconditioner.factors(), KFACPreconditioner(net(), inverse_every=2).state_dict()
    del saved["layers"]["head"][key]
    with pytest.raises(ValueError, match=f"has no {key} of layer 'head'"):
        preconditioner.load_state_dict(saved)
    with pytest.raises(ValueError, match="has no kfac_format, kfac_steps, layers"):
        preconditioner.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    saved = preconditioner.state_dict()
    saved["layers"]["head"]["kfac_certificates"][0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="kfac_certificates of layer 'head' has values that are not finite"):
        preconditioner.load_state_dict(saved)
    assert all(torch.equal(x, y) for k, pair in preconditioner.factors().items() for x, y in zip(pair, before[k], strict=True))


@pytest.mark.parametrize("inverse", ["cholesky", "newton_schulz"])
@pytest.mark.parametrize("intervals", [(2, 3), (3, 2), (4, 3)], ids=str)
def test_between_any_two_steps(intervals: tuple[int, int], inverse: str) -> None:
    """What is due next may be statistics, inverses, both or neither: the same bits, by as many refreshes."""
    settings: dict[str, Any] = dict(zip(("statistics_every", "inverse_every"), intervals, strict=True), inverse=inverse, lr=0.1)

    def damping(step: int) -> float:
        return 0.1 if step < 2 else 0.05

    model = net()
    optimizer, saved = KFAC(model, damping=damping, **settings), []
    for step in range(8):
        train(model, optimizer, range(step, step + 1))
        saved.append(copy.deepcopy((model.state_dict(), optimizer.state_dict(), optimizer.engine.progress.refreshes)))
    for step, (its, state, refreshes) in enumerate(saved[:-1], 1):
        resumed = net()
        resumed.load_state_dict(its)
        other = KFAC(resumed, damping=damping, **settings)
        other.load_state_dict(state)
        train(resumed, other, range(step, 8))
        assert torch.equal(vector(resumed), vector(model)), f"saved after {step} steps"
        assert other.engine.progress.refreshes == optimizer.engine.progress.refreshes - refreshes, f"saved after {step} steps"


@pytest.mark.parametrize("name", ["old inverses", "ekfac, old", "adamw", "adam", "adam, blocks"])
def test_back_to_the_start(name: str) -> None:
    """A state of before the first step, in an optimizer that has taken steps since: the next statistics are the first again."""
    model = net()
    optimizer = KFAC(model, **SETTINGS[name])
    start = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(5))
    once = vector(model)
    model.load_state_dict(start[0])
    optimizer.load_state_dict(start[1])
    train(model, optimizer, range(5))
    assert torch.equal(vector(model), once)


def test_another_damping_than_that_of_the_saved_inverses_makes_new_ones() -> None:
    model = net()
    optimizer = KFAC(model, damping=0.1, statistics_every=9, inverse_every=2)
    train(model, optimizer, range(3))
    for damping, refreshes in ((0.1, 0), (0.5, 1)):
        other_model = net()
        other = KFAC(other_model, damping=damping, statistics_every=9, inverse_every=2)
        other.load_state_dict(optimizer.state_dict())
        train(other_model, other, range(3, 5))
        assert other.engine.progress.refreshes == refreshes


@pytest.mark.parametrize("damage", ["lacks a layer", "lacks inverses of a layer", "has inverses of another size"])
def test_inverses_of_some_layers_alone_are_not_taken(damage: str) -> None:
    """All are made anew then, in the next step, whether due or not."""

    def trained(seed: int) -> tuple[nn.Module, KFACPreconditioner]:
        model = net()
        preconditioner = KFACPreconditioner(model, inverse_every=9)
        for step in range(seed, seed + 2):
            backward(model, step)
            preconditioner.precondition_()
        return model, preconditioner

    saved = trained(0)[1].state_dict()
    key = next(key for key in saved["layers"]["conv"] if key.endswith("_G") and key != "kfac_G")
    if damage == "lacks a layer":
        del saved["layers"]["conv"]
    elif damage == "lacks inverses of a layer":
        del saved["layers"]["conv"][key]
    else:
        saved["layers"]["conv"][key] = saved["layers"]["conv"][key][:, :-1]
    plain = {
        n: {k: x for k, x in layer.items() if k in ("kfac_A", "kfac_G", "kfac_updates", "kfac_steps")}
        for n, layer in saved["layers"].items()
    }
    results = []
    for layers in (saved["layers"], plain):
        model, preconditioner = trained(7)
        before = preconditioner.engine.progress.refreshes
        preconditioner.load_state_dict({**saved, "layers": layers})
        backward(model, 2)
        preconditioner.precondition_()
        assert preconditioner.engine.progress.refreshes == before + 1
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.equal(*results)


def test_a_complex_number_that_is_not_finite_is_refused_too() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    model.register_parameter("phase", nn.Parameter(torch.ones(2, dtype=torch.complex64)))
    optimizer = KFAC(model, lr=0.1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    number = [id(p) for p in model.parameters()].index(id(model.phase))
    saved["state"][number]["momentum_buffer"][0] = complex(0.0, torch.nan)
    with pytest.raises(ValueError, match=f"momentum_buffer of parameter {number} has values that are not finite"):
        optimizer.load_state_dict(saved)
