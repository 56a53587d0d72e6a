"""Autocast and GradScaler: statistics in the loss's units, skipped steps without a trace, no second copy of an activation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.helpers import mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner


def _batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 5, generator=generator), torch.randint(4, (16,), generator=generator)


def _loss(model: nn.Module, seed: int) -> Tensor:
    x, y = _batch(seed)
    return nn.functional.cross_entropy(model(x), y)


@pytest.mark.parametrize("given", ["scaler", "get_scale", "lambda"])
@pytest.mark.parametrize("fisher", ["empirical", "ggn"])
def test_scaled_statistics_are_the_plain_ones(given: str, fisher: str) -> None:
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = mlp(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**13, growth_interval=2, enabled=enabled)
        scale = {"scaler": scaler, "get_scale": scaler.get_scale, "lambda": lambda scaler=scaler: scaler.get_scale()}[given]
        optimizer = KFAC(model, lr=0.1, damping=0.1, loss_scale=scale, fisher=fisher, loss=nn.CrossEntropyLoss())
        for seed in range(5):
            x, y = _batch(seed)
            optimizer.zero_grad()
            outputs = model(x)
            optimizer.accumulate_fisher(outputs, y)
            scaler.scale(nn.functional.cross_entropy(outputs, y)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # of raw gradients
            scaler.step(optimizer)
            scaler.update()
        results.append([side for pair in optimizer.factors().values() for side in pair])
        results[-1] += [p.detach() for p in model.parameters()]
    assert scaler.get_scale() > 2.0**13  # it has grown in between
    assert max(relative_error(a, b) for a, b in zip(*results, strict=True)) <= 1e-6


def _skip(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """A step whose gradients overflow in the first layer alone."""
    handle = model[0].weight.register_hook(lambda g: g * torch.inf)
    scaler.scale(_loss(model, 99)).backward()
    handle.remove()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_skipped_step_leaves_no_trace(set_to_none: bool, compiled: bool) -> None:
    """Neither at once nor in the next step, bit for bit."""
    results = []
    for skips in (False, True):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = mlp(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=0.999999999)
        optimizer = KFAC(model, lr=0.1, damping=0.1, loss_scale=scaler)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        for seed in range(4):
            if skips and seed == 2:
                before = [p.detach().clone() for p in model.parameters()] + [s for f in optimizer.factors().values() for s in f]
                optimizer.zero_grad(set_to_none)
                _skip(model, optimizer, scaler) if not compiled else _skip_compiled(run, model, optimizer, scaler)
                after = [*model.parameters(), *(s for f in optimizer.factors().values() for s in f)]
                assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
                scaler.update(2.0**10)
            optimizer.zero_grad(set_to_none)
            scaler.scale(_loss(run, seed)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert all(layer["dropped_statistics"] == 0 for layer in optimizer.diagnostics()["layers"].values())
        results.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert torch.equal(*results)


def _skip_compiled(run: Any, model: nn.Module, optimizer: KFAC, scaler: torch.amp.GradScaler) -> None:
    scaler.scale(_loss(run, 99)).backward()
    assert model[0].weight.grad is not None
    model[0].weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    scaler.update()


def test_what_a_preconditioner_forgets_by_hand_costs_nothing() -> None:
    model = mlp(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFACPreconditioner(model, loss_scale=scaler)
    preconditioner.attach(optimizer)
    _skip(model, optimizer, scaler)
    optimizer.zero_grad()
    preconditioner.forget_statistics()
    scaler.scale(_loss(model, 0)).backward()
    scaler.step(optimizer)
    layers = preconditioner.diagnostics()["layers"].values()
    assert all(layer["updates"] == 1 and layer["dropped_statistics"] == 0 for layer in layers)


@pytest.mark.parametrize("given", ["scaler", "get_scale"])
def test_where_nobody_calls_zero_grad_of_ours_a_skipped_step_costs_the_next_statistics(given: str) -> None:
    """A preconditioner does not see zero_grad. Statistics of two scales are told by the scale, and dropped."""
    model = mlp(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    preconditioner = KFACPreconditioner(model, loss_scale=scaler if given == "scaler" else scaler.get_scale)
    preconditioner.attach(optimizer)
    updates = []
    for seed in range(4):
        optimizer.zero_grad()
        if seed == 1:
            _skip(model, optimizer, scaler)
        else:
            scaler.scale(_loss(model, seed)).backward()
            scaler.step(optimizer)
            scaler.update()
        updates.append(preconditioner.diagnostics()["layers"]["2"]["updates"])
    assert updates == [1, 1, 1, 2]  # the step after the skipped one has statistics of both, and takes none
    assert preconditioner.diagnostics()["layers"]["2"]["dropped_statistics"] == 1


def test_unscaled_and_scaled_differ_without_the_setting() -> None:
    """The comparison above can fail."""
    factors = []
    for scale in (1.0, 1024.0):
        torch.manual_seed(0)
        model = mlp(torch.float32)
        with KFACPreconditioner(model) as preconditioner:
            (scale * _loss(model, 0)).backward()
            preconditioner.precondition_()
            factors.append(preconditioner.factors()["0"][1])
    assert relative_error(factors[1], factors[0]) == pytest.approx(1024**2 - 1, rel=1e-4)


def _conv_net(padding_mode: str) -> nn.Module:
    convolutions = nn.Conv2d(2, 4, 3, padding=1, padding_mode=padding_mode), nn.ReLU(inplace=True), nn.ConvTranspose2d(4, 3, 3)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.LayerNorm(192), nn.Linear(192, 3))


NETS = {
    "conv": (lambda: _conv_net("zeros"), (8, 2, 6, 6)),
    "conv, circular": (lambda: _conv_net("circular"), (8, 2, 6, 6)),
    "tokens": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), (4, 5, 6)),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_autocast_gives_the_outputs_and_gradients_that_it_gives_without_hooks(
    name: str, dtype: torch.dtype, compiled: bool
) -> None:
    torch.manual_seed(0)
    make, shape = NETS[name]
    model, x, found = make(), torch.randn(shape), []
    for hooked in (False, True):
        torch.compiler.reset()
        one = copy.deepcopy(model)
        optimizer = KFAC(one) if hooked else None
        run = torch.compile(one, fullgraph=True, backend="aot_eager") if compiled else one
        with torch.autocast("cpu", dtype):
            outputs = run(x)
        outputs.float().square().mean().backward()
        found.append([outputs, *(p.grad for p in one.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert optimizer is not None
    optimizer.step()
    assert all(layer["updates"] == 1 for layer in optimizer.diagnostics()["layers"].values())
    assert all(side.dtype == torch.float32 for pair in optimizer.factors().values() for side in pair)


def _saved_bytes(run: Any) -> int:
    """Bytes of the distinct tensors that a forward pass saves for backward."""
    storages: dict[int, int] = {}
    kept = []

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        kept.append(x)  # so that no address is given out again
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(storages.values())


@pytest.mark.parametrize("name", ["conv", "tokens"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_the_tap_saves_no_copy_of_an_activation(name: str, dtype: torch.dtype | None) -> None:
    """But for what a circular convolution pads: it saves the padded input alone."""
    make, shape = NETS[name]
    model, x = make(), torch.randn(shape)

    def run() -> None:
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            model(x)

    without = _saved_bytes(run)
    with KFAC(model, skip="LayerNorm"):
        assert _saved_bytes(run) == without


def test_factors_under_autocast_are_near_those_of_full_precision() -> None:
    factors = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = mlp(torch.float32)
        with KFACPreconditioner(model) as preconditioner:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = _loss(model, 0)
            loss.backward()
            preconditioner.precondition_()
            factors.append([side for pair in preconditioner.factors().values() for side in pair])
    assert max(relative_error(a, b) for a, b in zip(*factors, strict=True)) <= 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lr_auto_with_autocast_in_the_closure(dtype: torch.dtype) -> None:
    model = mlp(torch.float32)
    x, y = _batch(0)
    optimizer = KFAC(model, lr="auto", loss=nn.CrossEntropyLoss(), damping=0.1, fisher="mc")

    def closure() -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype):
            outputs = model(x)
        return outputs.float(), y

    losses = [float(optimizer.step(closure).detach()) for _ in range(15)]
    assert losses[-1] < 0.5 * losses[0]


class _Calls(nn.Module):
    """Calls a layer in one of the ways that its forward allows."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.layer = nn.ConvTranspose1d(2, 3, 3, stride=2) if how == "two arguments" else nn.Linear(5, 3)
        self.layer.double() if how == "double" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "keyword":
            return self.layer(input=x)
        return self.layer(x, [12]) if self.how == "two arguments" else self.layer(x)


@pytest.mark.parametrize("how", ["keyword", "two arguments", "double"])
def test_autocast_and_the_ways_to_call_a_layer(how: str) -> None:
    """Autocast leaves double precision alone; what is beside the input is handed on."""
    model = _Calls(how)
    x = torch.randn(4, 2, 5) if how == "two arguments" else torch.randn(4, 5, dtype=torch.float64 if how == "double" else None)

    def run() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(x)
        output.square().sum().backward()
        assert model.layer.weight.grad is not None
        return output.detach(), model.layer.weight.grad.clone()

    plain = run()
    with KFACPreconditioner(model) as preconditioner:
        hooked = run()
        preconditioner.precondition_()
        assert preconditioner.diagnostics()["layers"]["layer"]["updates"] == 1
    for one, other in zip(plain, hooked, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
