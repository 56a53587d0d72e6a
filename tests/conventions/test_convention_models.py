"""What an optimizer with hooks owes to the model and its other users (conventions 22 to 27, 31, 32)."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings

import pytest
import torch
from support.contenders import ALL, Contender, batch, convention, equal, factors, loss_of, net, preconditioner_of, train, vector
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """The first layers run again in backward."""

    def __init__(self, inner: nn.Sequential, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return self.inner[4:](checkpoint(self.inner[:4], x, use_reentrant=self.use_reentrant))


@convention(22, ALL)
def test_activation_checkpointing(contender: Contender) -> None:
    plain_model = net()
    plain = contender(plain_model)
    expected = train(plain_model, plain, 3)
    for use_reentrant in (False, True):
        model = net()
        optimizer = contender(model)
        assert torch.equal(train(Checkpointed(model, use_reentrant), optimizer, 3), expected)
        assert equal(factors(optimizer), factors(plain))


@convention(23, ALL)
def test_evaluation_leaves_nothing(contender: Contender) -> None:
    """Passes in eval, no_grad and inference_mode, before backward and between steps, and such as no backward follows."""
    results = []
    for evaluates in (False, True):
        model = net()
        optimizer = contender(model)
        x = 100.0 * batch(model, 99)[0]

        def evaluate(model: nn.Module = model, x: Tensor = x, evaluates: bool = evaluates) -> None:
            if not evaluates:
                return
            with torch.no_grad():
                model(x)
            with torch.inference_mode():
                model(x)
            model.eval()
            with torch.no_grad():
                model(x)
            model(x)
            model.train()

        for step in range(3):
            optimizer.zero_grad()
            evaluate()
            loss = loss_of(model, step)
            evaluate()
            loss.backward()
            evaluate()
            optimizer.step()
        results.append([vector(model), *factors(optimizer)])
    assert equal(*results)


@convention(24, ALL)
def test_functional_transforms(contender: Contender) -> None:
    """grad, per-example vmap(grad), jvp and jacrev give what they give without an optimizer, and leave training alone."""

    def evaluate(model: nn.Module) -> list[Tensor]:
        values = {name: p.detach() for name, p in model.named_parameters()}
        x, y = batch(model, 7)

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.cross_entropy(functional_call(model, values, (x[None],)), y[None])

        per_example = vmap(grad(loss), (None, 0, 0))(values, x, y)
        _, forward = jvp(lambda v: functional_call(model, v, (x,)), (values,), (values,))
        jacobian = jacrev(lambda z: functional_call(model, values, (z,)))(x[:2])
        return [*grad(loss)(values, x[0], y[0]).values(), *per_example.values(), forward, jacobian]

    results, found = [], []
    for evaluates in (False, True):
        model = net()
        if not evaluates:
            found.append(evaluate(model))
        optimizer = contender(model)
        if evaluates:
            found.append(evaluate(model))
        results.append([train(model, optimizer, 2), *factors(optimizer)])
    assert equal(*found)
    assert equal(*results)


@convention(25, ALL)
def test_copies_of_the_model_are_inert(contender: Contender) -> None:
    """A deep copy, an average of weights and a pickle carry no optimizer, and their backward passes leave nothing."""
    model, bare = net(), net()
    optimizer = contender(model)
    train(model, optimizer, 2)
    copies = [copy.deepcopy(model), AveragedModel(model).module, pickle.loads(pickle.dumps(model))]
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies.append(torch.load(file, weights_only=False))
    assert len(pickle.dumps(model)) < len(pickle.dumps(bare)) + 1000
    optimizer.zero_grad()
    loss_of(model, 2).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    for other in copies:
        assert torch.equal(vector(other), vector(model))
        loss_of(other, 5).backward()
    assert equal(gradients, [p.grad for p in model.parameters()])
    optimizer.step()
    reference = net()
    plain = contender(reference)
    assert torch.equal(vector(model), train(reference, plain, 3))
    assert equal(factors(optimizer), factors(plain))


def _hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@convention(26, ALL)
def test_hooks_go_with_the_optimizer(contender: Contender) -> None:
    model = net()
    optimizer = contender(model)
    train(model, optimizer, 1)
    assert (_hooks(model) > 0) == contender.has_hooks
    del optimizer
    gc.collect()
    assert _hooks(model) == 0
    loss_of(model, 0).backward()


@convention(26, ALL)
def test_close(contender: Contender) -> str | None:
    """At once, twice, as a context, and with a backward pass still to come through the hooks."""
    model = net()
    optimizer = contender(model)
    owner = preconditioner_of(optimizer)
    if owner is None:
        assert not hasattr(optimizer, "close")
        return "n.a.: has no hooks"
    loss = loss_of(model, 0)
    factors_before = factors(optimizer)
    with owner:
        pass
    assert _hooks(model) == 0
    loss.backward()
    expected = torch.autograd.grad(loss_of(model, 0), list(model.parameters()))
    assert equal([p.grad for p in model.parameters()], list(expected))
    assert equal(factors(optimizer), factors_before)
    owner.close()
    other = contender(model)
    train(model, other, 1)
    assert not equal(factors(other), factors_before)
    return None


class Aside(nn.Module):
    """Reads the weight of its second layer, whose forward never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 7).double()
        self.second = nn.Linear(7, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(torch.tanh(self.first(x)), self.second.weight, self.second.bias)


@convention(27, ALL)
def test_one_warning_at_the_users_line(
    contender: Contender, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
) -> str:
    """In step, however it is called; nothing is printed or logged, then or later."""
    for way in ("step", "closure", "precondition_"):
        model = Aside()
        optimizer = contender(model)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(model, 0).backward()
                line = inspect.currentframe().f_lineno  # type: ignore[union-attr]
                if way == "step":
                    optimizer.step()
                elif way == "closure":
                    optimizer.step(lambda: None)
                elif contender.name == "KFACPreconditioner":
                    preconditioner_of(optimizer).precondition_()
                else:
                    optimizer.step()
        assert "".join(capfd.readouterr()) == ""
        assert not caplog.records
        if not contender.has_hooks:
            assert not caught
            continue
        assert [warning.category for warning in caught] == [UserWarning]
        assert "'second'" in str(caught[0].message)
        assert caught[0].filename == __file__, f"{way}: the warning points at {caught[0].filename}:{caught[0].lineno}"
        assert line < caught[0].lineno <= line + 8
    return "pass" if contender.has_hooks else "n.a.: nothing to warn about"


class Everything(nn.Module):
    """What K-FAC covers in full, in part and not at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.convolution = nn.Conv1d(8, 8, 3, padding=1, groups=4)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.batch_norm = nn.BatchNorm1d(8)
        self.scale = nn.Parameter(torch.ones(8))
        self.weight_normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.recurrent(x)[0]
        x = self.convolution(x.mT).mT
        # Without the tanh, batch normalization would cancel the bias: its gradient would be rounding noise, or zero.
        x = self.batch_norm(self.bilinear(x, x).tanh().flatten(0, 1)).view_as(x) * self.scale
        return self.head(self.weight_normed(x).mean(1))


def test_no_gradient_is_rounding_noise() -> None:
    """Of the model above: whether a parameter moves must not depend on the processor."""
    model, tokens, labels = Everything(), torch.randint(10, (16, 5)), torch.arange(16) % 4
    gradients = []
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        nn.functional.cross_entropy(model(tokens), labels).backward()
        gradients.append({name: p.grad.double() for name, p in model.named_parameters()})
    single, exact = gradients
    assert [name for name in exact if (single[name] - exact[name]).norm() > 1e-3 * exact[name].norm()] == []


@convention(31, ALL)
def test_every_parameter_trains(contender: Contender) -> None:
    """None is left out without a word; the loss falls."""
    model = Everything()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = contender(model)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
    tokens, labels = torch.randint(10, (16, 5)), torch.arange(16) % 4
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@convention(32, ALL)
def test_a_layer_whose_forward_never_runs(contender: Contender) -> str:
    """It trains along its gradient, and is named in a warning."""
    model = Aside()
    optimizer = contender(model)
    before = vector(model.second)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    gradient = torch.cat([p.grad.flatten() for p in model.second.parameters()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    moved = vector(model.second) - before
    if contender.is_kfac and not contender.is_adam:
        torch.testing.assert_close(moved, -0.1 * gradient, rtol=1e-10, atol=1e-12)
    assert bool((moved * gradient <= 0).all())
    assert bool((moved != 0).any())
    named = ["'second'" in str(warning.message) for warning in caught]
    assert named == [True] * contender.has_hooks
    return "pass" if contender.has_hooks else "pass: no warning needed"


@convention(32, ALL)
def test_attention_with_its_own_output_projection(contender: Contender) -> None:
    """nn.MultiheadAttention reads the weight of out_proj itself: no warning, and training goes on."""
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    optimizer = contender(model)
    before = vector(model.out_proj)
    x = torch.randn(4, 5, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            optimizer.zero_grad()
            model(x, x, x)[0].square().mean().backward()
            optimizer.step()
    assert not torch.equal(vector(model.out_proj), before)
