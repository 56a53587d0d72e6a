"""An optimizer in training loops: loss scaling, clipping, schedulers, trainers (conventions 13 to 17, 28 to 30)."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.contenders import ALL, Contender, convention, equal, factors, loss_of, net, train, vector
from support.helpers import relative_error
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR


def _scaled_steps(model: nn.Module, optimizer: Optimizer, scaler: GradScaler, seeds: list[int]) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        scaler.scale(loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()


def _largest_error(ours: list[Tensor], truth: list[Tensor]) -> float:
    return max((relative_error(a, b) for a, b in zip(ours, truth, strict=True)), default=0.0)


@convention(13, ALL)
def test_loss_scaling_changes_nothing(contender: Contender) -> None:
    """The scale doubles with every step; factors and parameters are those of unscaled losses."""
    plain_model = net(torch.float32)
    plain = contender(plain_model)
    train(plain_model, plain, 4)
    ways: list[Callable[[GradScaler], Any]] = [lambda scaler: scaler.get_scale, lambda scaler: scaler]
    for way in ways:
        scaler = GradScaler("cpu", init_scale=1024.0, growth_interval=1)
        model = net(torch.float32)
        optimizer = contender(model, settings={"loss_scale": way(scaler)})
        _scaled_steps(model, optimizer, scaler, [0, 1, 2, 3])
        assert scaler.get_scale() == 1024.0 * 2**4
        assert _largest_error(factors(optimizer), factors(plain)) <= 1e-6
        assert relative_error(vector(model), vector(plain_model)) <= 1e-6


def _bad_step(model: nn.Module, optimizer: Optimizer, scaler: GradScaler, where: str) -> None:
    optimizer.zero_grad()
    loss = loss_of(model, 2)
    if where == "inputs":
        x = torch.randn(12, 5)
        x[3, 2] = torch.inf
        loss = nn.functional.cross_entropy(model(x), torch.randint(4, (12,)))
    scaler.scale(loss * 1e38 if where == "gradients" else loss).backward()
    scaler.step(optimizer)
    scaler.update()


@convention(14)
def test_a_skipped_step_leaves_no_trace(contender: Contender) -> None:
    """An inf in the inputs, or in the gradients alone: with zero_grad between, the run is the one without that batch."""
    for where in ("inputs", "gradients"):
        ends = []
        for has_bad_batch in (False, True):
            scaler = GradScaler("cpu", init_scale=1024.0)
            model = net(torch.float32)
            optimizer = contender(model, settings={"loss_scale": scaler.get_scale})
            _scaled_steps(model, optimizer, scaler, [0, 1])
            if has_bad_batch:
                before, factors_before = vector(model), factors(optimizer)
                _bad_step(model, optimizer, scaler, where)
                assert scaler.get_scale() == 512.0
                assert torch.equal(vector(model), before)
                assert equal(factors(optimizer), factors_before)
            _scaled_steps(model, optimizer, scaler, [3, 4])
            ends.append((vector(model), factors(optimizer)))
        assert _largest_error(ends[1][1], ends[0][1]) <= 1e-6
        assert relative_error(ends[1][0], ends[0][0]) <= 1e-6


@convention(14, ALL)
def test_an_inf_never_enters_what_is_kept(contender: Contender) -> None:
    """Also when gradients are set to None by hand: later factors and parameters are finite."""
    scaler = GradScaler("cpu", init_scale=1024.0)
    model = net(torch.float32)
    optimizer = contender(model, settings={"loss_scale": scaler.get_scale})
    _scaled_steps(model, optimizer, scaler, [0])
    _bad_step(model, optimizer, scaler, "inputs")
    for seed in (1, 2):
        for p in model.parameters():
            p.grad = None
        before = vector(model)
        scaler.scale(loss_of(model, seed)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(vector(model), before)
    assert all(bool(torch.isfinite(x).all()) for x in [vector(model), *factors(optimizer)])


@convention(15, ALL)
def test_clipping_acts_on_raw_gradients(contender: Contender) -> None:
    """The norm that comes back is that of the loss's gradient, after steps too; the step takes the clipped one."""
    model = net()
    optimizer = contender(model)
    train(model, optimizer, 2)
    optimizer.zero_grad()
    raw = torch.autograd.grad(loss_of(model, 2), list(model.parameters()))
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    expected = torch.linalg.vector_norm(torch.cat([g.flatten() for g in raw]))
    assert float(norm) == pytest.approx(float(expected), rel=1e-12)
    assert all(relative_error(p.grad, g * 1e-3 / expected) < 1e-5 for p, g in zip(model.parameters(), raw, strict=True))
    before = vector(model)
    optimizer.step()
    assert not torch.equal(vector(model), before)
    if contender.is_kfac and not contender.is_adam:  # without a clip of its own, its step is linear in the gradient
        steps = []
        for limit in (1e6, 1e-3):
            model = net()
            optimizer = contender(model, momentum=0.0, kl_clip=None)
            before = vector(model)
            loss_of(model, 2).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            steps.append((vector(model) - before) * min(limit / float(norm), 1.0) ** -1)
        assert relative_error(steps[1], steps[0]) < 1e-5  # clip_grad_norm_ adds 1e-6 to the norm


@convention(16, ALL)
def test_order_of_scheduler_and_optimizer(contender: Contender) -> None:
    """The groups get initial_lr; stepping in the wrong order warns, in the right one does not."""
    model = net()
    optimizer = contender(model, lr=0.05)
    scheduler = ExponentialLR(optimizer, 0.5)
    assert optimizer.param_groups[0]["initial_lr"] == 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            train(model, optimizer, 1, first=step)
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.05 / 4
    wrong = ExponentialLR(contender(net()), 0.5)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step\(\)`"):
        wrong.step()


@convention(17)
def test_foreach(contender: Contender) -> None:
    """Both values are taken, and give the same."""
    for options in contender.tails:
        results = []
        for foreach in (None, False, True):
            model = net()
            optimizer = contender(model, foreach=foreach, weight_decay=0.1, **options)
            results.append(train(model, optimizer, 3))
        torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(results[2], results[0], rtol=1e-12, atol=1e-14)


@convention(17)
def test_fused(contender: Contender) -> str:
    """Taken, and then the numbers are the same, or refused by name."""
    model, plain_model = net(), net()
    try:
        optimizer = contender(model, fused=True)
    except (RuntimeError, TypeError, ValueError) as error:
        assert "fused" in str(error)
        return "pass: refused"
    plain = train(plain_model, contender(plain_model), 3)
    torch.testing.assert_close(train(model, optimizer, 3), plain, rtol=1e-12, atol=1e-14)
    return "pass: taken"


@convention(17, ALL)
def test_maximize(contender: Contender) -> None:
    """Going up the loss is going down its negative, bit for bit."""
    for options in contender.tails:
        results = []
        for sign in (1.0, -1.0):
            model = net()
            optimizer = contender(model, maximize=sign > 0, weight_decay=0.1, **options)
            start = float(loss_of(model, 0).detach())
            for step in range(3):
                optimizer.zero_grad()
                (sign * loss_of(model, step)).backward()
                optimizer.step()
            results.append(vector(model))
            assert float(loss_of(model, 0).detach()) > start
        assert torch.equal(*results)


@convention(28, ALL)
def test_it_has_no_modes(contender: Contender) -> None:
    """Whether a loop tells the optimizer about training and evaluation, as trainers do if it asks for it, does not matter."""
    results = []
    for tells in (False, True):
        model = net()
        optimizer = contender(model)
        for step in range(3):
            if tells and hasattr(optimizer, "train"):
                optimizer.train()
            train(model, optimizer, 1, first=step)
            trained = vector(model)
            if tells and hasattr(optimizer, "eval"):
                optimizer.eval()
            assert torch.equal(vector(model), trained)
        results.append(trained)
    assert torch.equal(*results)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")


@convention(29, ALL)
def test_weight_and_bias_in_different_groups(contender: Contender) -> None:
    """As Hugging Face's Trainer groups parameters, decayed and not; with one decay for both it is the run in one group."""

    def groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
        decayed = [p for name, p in model.named_parameters() if not name.endswith("bias")]
        others = [p for name, p in model.named_parameters() if name.endswith("bias")]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": decay}]

    results = []
    for make in (None, functools.partial(groups, decay=0.1), functools.partial(groups, decay=0.0)):
        model = net()
        optimizer = contender(model, None if make is None else make(model), weight_decay=0.1)
        results.append(train(model, optimizer, 3))
    assert torch.equal(results[1], results[0])
    assert not torch.equal(results[2], results[0])


class Imitation:
    """How Lightning wraps an optimizer: a class made on the spot, everything else left to the wrapped one."""

    def __init__(self, optimizer: Optimizer, copies: bool) -> None:
        if copies:  # as versions before 2.1 did
            self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key not in ("step", "__del__")}
        self._optimizer = optimizer
        self.__class__ = type("Lightning" + type(optimizer).__name__, (type(self), type(optimizer)), {})  # type: ignore[assignment]

    def step(self, closure: Any = lambda: None, scaler: GradScaler | None = None) -> Any:
        if scaler is None:
            return self._optimizer.step(closure=closure)
        result = closure()  # the plugin of 16-bit floats runs it first
        scaler.step(self._optimizer)
        scaler.update()
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


def _driven(contender: Contender, how: str, copies: bool) -> Tensor:
    model = net(torch.float32 if how == "scaler" else torch.float64)
    scaler = GradScaler("cpu", init_scale=1024.0) if how == "scaler" else None
    inner = contender(model, settings={} if scaler is None else {"loss_scale": scaler.get_scale})
    optimizer: Any = Imitation(inner, copies)
    assert isinstance(optimizer, type(inner))
    scheduler = ExponentialLR(optimizer, 1.0)

    def closure(step: int) -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    for step in range(3):
        if how == "manual":
            closure(step)
            assert optimizer.step() is None
        else:
            loss = optimizer.step(closure=functools.partial(closure, step), scaler=scaler)
            assert float(loss.detach()) > 0
        scheduler.step()
    optimizer.load_state_dict(optimizer.state_dict())
    return vector(model)


@convention(30, ALL)
def test_lightning_drives_it(contender: Contender) -> None:
    """Closure by keyword, with a scaler closure first, and manual optimization, where the closure does nothing."""
    for how in ("closure", "scaler", "manual"):
        plain_model = net(torch.float32 if how == "scaler" else torch.float64)
        plain = train(plain_model, contender(plain_model), 3)
        for copies in (False, True):
            assert relative_error(_driven(contender, how, copies), plain) <= (1e-6 if how == "scaler" else 0.0)


@convention(30)
@pytest.mark.parametrize("event", ["wakes", "added"])
def test_layers_that_come_through_the_wrapper(contender: Contender, event: str) -> None:
    """Methods of the optimizer run on the wrapper, which inherits from it: what they replace has to be the optimizer's."""
    results = []
    for wrap in (lambda inner: inner, functools.partial(Imitation, copies=False), functools.partial(Imitation, copies=True)):
        model = net()
        new = list(model[0].parameters())
        for p in new:
            p.requires_grad_(event == "added")
        inner = contender(model, [p for p in model.parameters() if event == "wakes" or all(p is not q for q in new)])
        optimizer = wrap(inner)
        for step in range(4):
            if step == 2 and event == "wakes":
                for p in new:
                    p.requires_grad_(True)
            elif step == 2:
                optimizer.add_param_group({"params": new})
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step(closure=lambda: None)
        results.append([vector(model), *factors(inner)])
        if contender.is_kfac:
            assert optimizer.engine is inner.engine
            assert "0" in inner.factors()
    assert equal(results[0], results[1])
    assert equal(results[0], results[2])
