"""An optimizer under DistributedDataParallel and FSDP2, one process (conventions 20 and 21)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.contenders import ALL, Contender, convention, equal, factors, loss_of, net, train, vector
from support.helpers import relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@convention(20, ALL)
def test_distributed_data_parallel(contender: Contender, alone: None) -> None:
    """Made before or after the wrapping; accumulated with no_sync or without."""

    def accumulate(model: nn.Module, optimizer: Optimizer, skips: bool) -> None:
        for step in range(3):
            optimizer.zero_grad()
            with model.no_sync() if skips else nullcontext():
                (loss_of(model, 2 * step) / 2).backward()
            (loss_of(model, 2 * step + 1) / 2).backward()
            optimizer.step()

    plain_model = net()
    plain = contender(plain_model)
    accumulate(plain_model, plain, skips=False)
    for before in (False, True):
        for skips in (False, True):
            model = net()
            optimizer = contender(model) if before else None
            wrapped = DistributedDataParallel(model)
            optimizer = optimizer or contender(wrapped)
            accumulate(wrapped, optimizer, skips)
            assert relative_error(vector(model), vector(plain_model)) <= 1e-12
            assert all(relative_error(a, b) <= 1e-12 for a, b in zip(factors(optimizer), factors(plain), strict=True))


def _whole(model: nn.Module) -> torch.Tensor:
    return torch.cat([(p.full_tensor() if isinstance(p, DTensor) else p).detach().flatten() for p in model.parameters()])


@convention(21, ALL)
def test_fully_sharded(contender: Contender, alone: None) -> str:
    """Parameters and gradients are DTensors. Training is the plain one, or is refused in words when the optimizer is made."""
    plain_model = net()
    expected = train(plain_model, contender(plain_model), 3)
    model = net()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    try:
        optimizer = contender(model)
    except (NotImplementedError, ValueError) as error:
        assert "DTensor" in str(error)
        return "refused, in words"
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    assert relative_error(_whole(model), expected) <= 1e-6
    return "pass"


@convention(21)
def test_swapped_parameters(contender: Contender) -> None:
    """Accelerate puts the sharded parameters into groups that were made with others, and leaves the state to itself."""
    model, plain_model = net(), net()
    optimizer = contender(model)
    new = {p: nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, new[p])
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    optimizer.state_dict()
    plain = contender(plain_model)
    assert torch.equal(train(model, optimizer, 3), train(plain_model, plain, 3))
    assert equal(factors(optimizer), factors(plain))
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert {i: set(values) for i, values in saved["state"].items()} == {i: set(v) for i, v in expected["state"].items()}
    optimizer.load_state_dict(saved)
