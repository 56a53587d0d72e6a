"""Training loops as people write them, each against the plain loop: bit for bit where the arithmetic is the same."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import runs
from support.contenders import batch, equal, factors, loss_of, net, train, vector
from support.helpers import relative_error
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

from kfac_triton import KFAC

LOSS = nn.CrossEntropyLoss()


def _all(model: nn.Module, optimizer: KFAC) -> list[Tensor]:
    momentum = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    return [vector(model), *factors(optimizer), *momentum]


def _error(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max(relative_error(a, b) for a, b in zip(ours, truth, strict=True))


def _run(backward: Callable[[nn.Module, KFAC, int], object], steps: int = 4, **settings: Any) -> list[Tensor]:
    """What is left of a run in which each step has these backward passes."""
    model = net()
    optimizer = KFAC(model, **{"lr": 0.1, "damping": 0.1, **settings})
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, optimizer, step)
        optimizer.step()
    return _all(model, optimizer)


def _plain(model: nn.Module, optimizer: KFAC, step: int) -> None:
    x, y = batch(model, step)
    outputs = model(x)
    if optimizer.engine.settings.fisher != "empirical":
        torch.manual_seed(step)
        optimizer.accumulate_fisher(outputs, y)
    LOSS(outputs, y).backward()


# Several backward passes a step


@pytest.mark.parametrize(
    "settings", [{}, {"curvature": "ekfac"}, {"exact_damping": True}, {"fisher": "ggn", "loss": LOSS}], ids=str
)
def test_uneven_micro_batches_are_the_whole_batch(settings: dict[str, Any]) -> None:
    def backward(model: nn.Module, optimizer: KFAC, step: int) -> None:
        x, y = batch(model, step)
        for part, labels in zip(x.split([1, 7, 4]), y.split([1, 7, 4]), strict=True):
            outputs = model(part)
            if settings.get("fisher") == "ggn":
                optimizer.accumulate_fisher(outputs, labels)
            (cross_entropy(outputs, labels, reduction="sum") / len(x)).backward()

    assert _error(_run(backward, **settings), _run(_plain, **settings)) <= 1e-10


def test_one_graph_sent_back_three_times_is_as_once() -> None:
    def backward(model: nn.Module, optimizer: KFAC, step: int) -> None:
        loss = loss_of(model, step) / 3
        for retain_graph in (True, True, False):
            loss.backward(retain_graph=retain_graph)

    assert _error(_run(backward), _run(_plain)) <= 1e-10


def test_two_losses_sent_back_one_after_the_other_are_a_batch_twice_as_long() -> None:
    """Its first half has the first loss and its second half the other; A and G as by hand."""

    def squares(outputs: Tensor) -> Tensor:
        return outputs.square().sum(1).mean()

    def apart(model: nn.Module, optimizer: KFAC, step: int) -> None:
        x, y = batch(model, step)
        outputs = model(x)
        LOSS(outputs, y).backward(retain_graph=True)
        squares(outputs).backward()

    def together(model: nn.Module, optimizer: KFAC, step: int) -> None:
        x, y = batch(model, step)
        outputs = model(torch.cat([x, x]))
        (LOSS(outputs[: len(x)], y) + squares(outputs[len(x) :])).backward()

    assert _error(_run(apart), _run(together)) <= 1e-10
    found = _run(apart, steps=1)
    model = net()
    x, y = batch(model, 0)
    outputs = model(x)
    g = torch.cat([torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (LOSS(outputs, y), squares(outputs))])
    ones = torch.ones(len(x), 1, dtype=x.dtype)
    rows = torch.cat([x, ones], 1)
    assert relative_error(found[1], rows.mT @ rows / len(x)) <= 1e-12
    assert relative_error(found[6], len(g) * g.mT @ g) <= 1e-12


# Evaluation, copies, transforms in between


def test_evaluation_and_updates_of_batch_norm_leave_nothing() -> None:
    """In train mode without gradients, in eval mode with them; between a Fisher pass and the loss's own, too."""
    results = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 4)).double()
        optimizer = KFAC(model, lr=0.1, damping=0.1, fisher="mc", loss=LOSS)

        def evaluate(model: nn.Module = model, evaluates: bool = evaluates) -> None:
            if not evaluates:
                return
            with torch.random.fork_rng():
                with torch.no_grad():
                    model(batch(model, 50)[0])
                with torch.inference_mode():
                    model(batch(model, 51)[0])
                model.eval()
                model(batch(model, 52)[0])
                model.train()

        for step in range(3):
            optimizer.zero_grad()
            evaluate()
            x, y = batch(model, step)
            outputs = model(x)
            evaluate()
            optimizer.accumulate_fisher(outputs, y)
            evaluate()
            LOSS(outputs, y).backward()
            evaluate()
            optimizer.step()
            if evaluates:
                with torch.random.fork_rng():
                    swa_utils.update_bn([batch(model, 53)[0]], model)
        results.append(_all(model, optimizer))
    assert equal(*results)


@pytest.mark.parametrize("kind", ["mean", "ema", "own"])
def test_averages_of_weights(kind: str) -> None:
    """They are averages, and training is as without; their own passes leave nothing."""
    options: dict[str, dict[str, Any]] = {
        "mean": {},
        "ema": {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
        "own": {"avg_fn": lambda average, new, count: 0.9 * average + 0.1 * new},
    }
    model, plain_model = net(), net()
    optimizer, plain = KFAC(model, lr=0.1, damping=0.1), KFAC(plain_model, lr=0.1, damping=0.1)
    average, seen = swa_utils.AveragedModel(model, **options[kind]), []
    for step in range(5):
        seen.append(train(model, optimizer, 1, first=step))
        average.update_parameters(model)
        loss_of(average, 90).backward()
        train(plain_model, plain, 1, first=step)
    expected = seen[0]
    for number, weights in enumerate(seen[1:], 2):
        rate = 1 / number if kind == "mean" else 0.1
        expected = (1 - rate) * expected + rate * weights
    assert relative_error(vector(average.module), expected) <= 1e-12
    assert equal(_all(model, optimizer), _all(plain_model, plain))


def test_a_copy_of_the_model_trains_on_its_own() -> None:
    """Both go their own ways, each with its own optimizer, in turns."""
    model, plain_model = net(), net()
    optimizer, plain = KFAC(model, lr=0.1, damping=0.1), KFAC(plain_model, lr=0.1, damping=0.1)
    train(model, optimizer, 3)
    train(plain_model, plain, 3)
    other, fresh = copy.deepcopy(model), net()
    fresh.load_state_dict(model.state_dict())
    its, fresh_its = (KFAC(m, lr=0.05, damping=0.2) for m in (other, fresh))
    for step in range(3, 6):
        train(model, optimizer, 1, first=step)
        train(other, its, 1, first=10 + step)
    train(plain_model, plain, 3, first=3)
    train(fresh, fresh_its, 3, first=13)
    assert equal(_all(model, optimizer), _all(plain_model, plain))
    assert equal(_all(other, its), _all(fresh, fresh_its))
    assert not torch.equal(vector(model), vector(other))


TRANSFORMED: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "attention, convolutions": (runs.net, False),
    "autocast": (lambda: nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 3)), True),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_functional_transforms(name: str) -> None:
    """Between forward and backward; they give what they give without hooks, and training is as without them."""
    make, autocast = TRANSFORMED[name]

    def loss(values: dict[str, Tensor], model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        # The one kernel of attention that has forward derivatives.
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), sdpa_kernel(SDPBackend.MATH):
            return nn.functional.mse_loss(functional_call(model, values, (x,)).float(), y)

    def transforms(model: nn.Module) -> list[Tensor]:
        values = {name: p.detach() for name, p in model.named_parameters()}
        x, y = runs.batch(7)
        each = vmap(grad(loss), (None, None, 0, 0))(values, model, x[:, None], y[:, None])
        _, slope = jvp(lambda v: loss(v, model, x, y), (values,), (values,))
        return [*grad(loss)(values, model, x, y).values(), *each.values(), slope, loss(values, model, x, y)]

    ends, found = [], []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = make()
        if not hooked:
            found.append(transforms(model))
        optimizer = KFAC(model, lr=0.1)
        for step in range(2):
            optimizer.zero_grad()
            result = loss(dict(model.named_parameters()), model, *runs.batch(step))
            if hooked and step == 0:
                found.append(transforms(model))
            result.backward()
            optimizer.step()
        assert all(layer["updates"] == 2 for layer in optimizer.diagnostics()["layers"].values())
        ends.append(_all(model, optimizer))
    assert equal(*found)
    assert equal(*ends)


# Graphs that are run again, or wait elsewhere


class Dropping(nn.Module):
    """Dropout inside of what may run again."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 7)).double()
        self.last = nn.Linear(7, 4).double()
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        x = self.first(x) if self.mode == "plain" else checkpoint(self.first, x, use_reentrant=self.mode == "reentrant")
        return self.last(torch.tanh(x))


@pytest.mark.parametrize(("mode", "fisher"), [("reentrant", "empirical"), ("other", "empirical"), ("other", "mc")])
def test_checkpointing_with_dropout_and_micro_batches(mode: str, fisher: str) -> None:
    results = []
    for each in ("plain", mode):
        model = Dropping(each)
        optimizer = KFAC(model, lr=0.1, damping=0.1, fisher=fisher, loss=LOSS)
        for step in range(3):
            optimizer.zero_grad()
            x, y = batch(model, step)
            for part, labels in zip(x.split([4, 8]), y.split([4, 8]), strict=True):
                outputs = model(part)
                optimizer.accumulate_fisher(outputs, labels)
                (cross_entropy(outputs, labels, reduction="sum") / len(x)).backward()
            optimizer.step()
        results.append(_all(model, optimizer))
    assert equal(*results)


@pytest.mark.parametrize("where", ["save_on_cpu", "numpy", "disk"])
@pytest.mark.parametrize("fisher", ["empirical", "mc"])
def test_saved_tensors_that_wait_elsewhere(where: str, fisher: str, tmp_path: Path) -> None:
    numbers, unpacked = itertools.count(), []

    def to_disk(x: Tensor) -> Path:
        path = tmp_path / str(next(numbers))
        torch.save(x.detach(), path)
        return path

    def from_disk(path: Path) -> Tensor:
        unpacked.append(path)
        return torch.load(path)

    def offloaded() -> AbstractContextManager[Any]:
        if where == "save_on_cpu":
            return save_on_cpu()
        if where == "numpy":
            # With its strides: another layout would be added up in another order.
            return saved_tensors_hooks(
                lambda x: x.detach().numpy().copy("K"), lambda x: unpacked.append(x) or torch.from_numpy(x)
            )
        return saved_tensors_hooks(to_disk, from_disk)

    results = []
    for waits in (False, True):
        model = runs.net(torch.float64)
        optimizer = KFAC(model, lr=0.1, fisher=fisher, loss=nn.MSELoss())
        for step in range(2):
            optimizer.zero_grad()
            x, y = runs.batch(step, torch.float64)
            with offloaded() if waits else nullcontext():
                outputs = model(x)
            torch.manual_seed(step)
            optimizer.accumulate_fisher(outputs, y)
            nn.functional.mse_loss(outputs, y).backward()
            optimizer.step()
        results.append(_all(model, optimizer))
    assert equal(*results)
    assert unpacked or where == "save_on_cpu"
