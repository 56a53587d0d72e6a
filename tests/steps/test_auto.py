"""lr="auto" in the optimizer: what the closure is asked for, what a step changes, and that it trains without tuning."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from support.helpers import mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, Likelihood


def _data(n: int = 64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, (x @ torch.randn(5, 4, generator=generator, dtype=torch.float64)).argmax(1)


def _auto(model: nn.Module, **options: object) -> KFAC:
    return KFAC(model, **{"lr": "auto", "loss": nn.CrossEntropyLoss(), "damping": 0.1, **options})


@pytest.mark.parametrize("fisher", ["empirical", "mc", "ggn"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_it_trains_without_a_learning_rate(fisher: str, curvature: str) -> None:
    model, (x, y) = mlp(), _data()
    optimizer = _auto(model, fisher=fisher, curvature=curvature)
    losses = [optimizer.step(lambda: (model(x), y)).item() for _ in range(25)]
    assert losses[-1] < 0.25 * losses[0]
    found = optimizer.diagnostics()
    assert found["learning_rate"] > 0
    assert found["damping"] < 0.1  # the model was trusted
    assert found["steps"] == 25
    assert math.isfinite(found["reduction_ratio"])


def test_least_squares_takes_one_step() -> None:
    """One Linear layer and squared error: exact Fisher, exact quadratic model, and the minimum in one step."""
    model, x = nn.Linear(5, 2).double(), _data()[0]
    y = x @ torch.randn(5, 2, dtype=torch.float64) + 1
    optimizer = KFAC(model, lr="auto", fisher="ggn", loss=nn.MSELoss(), damping=1e-8, damping_range=(1e-12, 1.0))
    optimizer.step(lambda: (model(x), y))
    assert float(nn.functional.mse_loss(model(x), y)) <= 1e-8
    assert optimizer.diagnostics()["learning_rate"] == pytest.approx(1.0, abs=1e-3)


def test_a_sum_takes_the_steps_of_a_mean() -> None:
    results, (x, y) = [], _data()
    for reduction in ("mean", "sum"):
        torch.manual_seed(0)
        model = mlp()
        optimizer = _auto(model, fisher="empirical", loss=nn.CrossEntropyLoss(reduction=reduction))
        for _ in range(6):
            optimizer.step(lambda model=model: (model(x), y))
        results.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) <= 1e-8


def test_parameters_that_are_not_covered_move_by_a_coefficient_of_their_own() -> None:
    model, (x, y) = mlp(), _data()
    optimizer = _auto(model, skip="2")
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step(lambda: (model(x), y))
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert optimizer.engine.change.__self__ is optimizer.engine
    assert optimizer._run.auto.report["lr_others"] > 0
    assert optimizer._run.auto.report["lr_others"] != optimizer._run.auto.report["lr"]


def test_weight_decay_is_a_penalty() -> None:
    """With a strong one the weights come out near zero."""
    sizes, (x, y) = [], _data()
    for decay in (0.0, 10.0):
        torch.manual_seed(0)
        model = mlp()
        optimizer = _auto(model, weight_decay=decay)
        for _ in range(15):
            optimizer.step(lambda model=model: (model(x), y))
        sizes.append(sum(float(p.detach().square().sum()) for p in model.parameters()))
    assert sizes[1] < 0.01 * sizes[0]


def test_a_rejected_step_restores_everything_bit_for_bit() -> None:
    """The loss rises whatever the step: the second evaluation of the closure lies."""
    model, (x, y) = nn.Sequential(nn.BatchNorm1d(5), *mlp()).double(), _data()
    optimizer = _auto(model, include="Linear")
    calls = []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(torch.is_grad_enabled())
        outputs = model(x)
        moved = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        return (outputs * 1e6 if moved else outputs), y

    before = [p.detach().clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    optimizer.step(closure)
    assert optimizer.diagnostics()["rejected_steps"] == 1
    assert optimizer.diagnostics()["damping"] == 0.1  # that the step was tried with; the next one takes more
    assert optimizer._run.auto.controller.damping == pytest.approx(0.4)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(b, old) for b, old in zip(model.buffers(), buffers, strict=True))
    assert calls[0]


@pytest.mark.parametrize("where", ["input", "target"])
def test_a_batch_that_is_not_finite_changes_nothing(where: str) -> None:
    model, x = nn.Linear(5, 2).double(), _data()[0]
    y = torch.randn(64, 2, dtype=torch.float64)
    optimizer = KFAC(model, lr="auto", fisher="empirical", loss=nn.MSELoss(), damping=0.1)
    optimizer.step(lambda: (model(x), y))
    before, factors = [p.detach().clone() for p in model.parameters()], optimizer.factors()
    bad_x, bad_y = x.clone(), y.clone()
    (bad_x if where == "input" else bad_y)[3, 1] = torch.nan
    optimizer.step(lambda: (model(bad_x), bad_y))
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(optimizer.factors()[""], factors[""], strict=True))
    assert optimizer.diagnostics()["skipped_steps"] == 1
    assert all(s.counts.tolist() == [0, 0] for s in optimizer.engine.statistics)
    loss = optimizer.step(lambda: (model(x), y))
    assert math.isfinite(float(loss))


def test_a_gradient_that_is_not_finite_leaves_no_statistics() -> None:
    """The loss is finite, so backward passes ran; the step is skipped all the same."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 3).double(), nn.Linear(3, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).abs().sqrt())

    model, x, y = Root(), _data()[0], torch.randn(64, 2, dtype=torch.float64)
    optimizer = KFAC(model, lr="auto", fisher="mc", loss=nn.MSELoss(), damping=0.1)
    optimizer.step(lambda: (model(x), y))
    factors = optimizer.factors()
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        bias = model.first.bias.clone()
        model.first.bias.copy_(-(model.first.weight @ x[0]))  # the root of nothing
    optimizer.step(lambda: (model(x), y))
    assert optimizer.diagnostics()["skipped_steps"] == 1
    assert all(s.counts.tolist() == [0, 0] for s in optimizer.engine.statistics)
    with torch.no_grad():
        model.first.bias.copy_(bias)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    for name, pair in optimizer.factors().items():
        assert all(torch.equal(a, b) for a, b in zip(pair, factors[name], strict=True))


def test_an_error_in_the_closure_leaves_no_statistics() -> None:
    model, (x, y) = mlp(), _data()
    optimizer = _auto(model, fisher="mc")
    calls = []

    def closure() -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyError("the data loader is gone")
        return model(x), y

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyError):
        optimizer.step(closure)
    assert all(s.counts.tolist() == [0, 0] for s in optimizer.engine.statistics)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    optimizer.step(lambda: (model(x), y))


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """Damping, counters and the step before are in the checkpoint."""
    model, (x, y) = mlp(), _data()
    optimizer = _auto(model)
    for _ in range(7):
        optimizer.step(lambda: (model(x), y))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    loaded = torch.load(tmp_path / "run.pt", weights_only=True)
    other = copy.deepcopy(model)
    resumed = _auto(other)
    other.load_state_dict(loaded["model"])
    resumed.load_state_dict(loaded["optimizer"])
    for _ in range(5):
        optimizer.step(lambda: (model(x), y))
        resumed.step(lambda: (other(x), y))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert optimizer.diagnostics()["damping"] == resumed.diagnostics()["damping"] < 0.1


def test_a_checkpoint_of_a_fixed_learning_rate_starts_the_controller_anew() -> None:
    model, (x, y) = mlp(), _data()
    fixed = KFAC(model, lr=0.1, damping=0.1)
    nn.functional.cross_entropy(model(x), y).backward()
    fixed.step()
    optimizer = _auto(model)
    optimizer.load_state_dict(copy.deepcopy(fixed.state_dict()))
    assert optimizer._run.auto.controller.damping == 0.1
    optimizer.step(lambda: (model(x), y))


def test_a_group_that_is_added_later_trains_too() -> None:
    """And the damping, the step before, and a changed penalty stay."""
    model, (x, y) = mlp(), _data()
    optimizer = _auto(model, params=list(model[4].parameters()))
    for _ in range(6):
        optimizer.step(lambda: (model(x), y))
    damping = optimizer._run.auto.controller.damping
    first = model[0].weight.detach().clone()
    optimizer.add_param_group({"params": [*model[0].parameters(), *model[2].parameters()], "weight_decay": 0.5})
    assert optimizer._run.auto.controller.damping == damping < 0.1
    optimizer.step(lambda: (model(x), y))
    assert not torch.equal(model[0].weight, first)
    assert optimizer._run.auto.weight_decay == [0.0] * 2 + [0.5] * 4
    optimizer.param_groups[1]["weight_decay"] = 0.0
    optimizer.step(lambda: (model(x), y))
    assert optimizer._run.auto.weight_decay == [0.0] * 6
    assert optimizer._run.auto.controller.steps == 8


class _Squares(Likelihood):
    """A likelihood that can be evaluated, too."""

    def columns(self, outputs: Tensor, targets: Tensor | None = None):
        for d in range(outputs.shape[-1]):
            column = torch.zeros_like(outputs)
            column[..., d] = 1
            yield column

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return 0.5 * (outputs - targets).square().sum(-1).mean()


def test_a_likelihood_of_the_users_own_that_can_be_called() -> None:
    model, x = nn.Linear(5, 2).double(), _data()[0]
    y = torch.randn(64, 2, dtype=torch.float64)
    optimizer = KFAC(model, lr="auto", fisher="ggn", loss=_Squares(), damping=1e-8)
    optimizer.step(lambda: (model(x), y))
    expected = torch.linalg.lstsq(torch.cat([x, torch.ones(64, 1, dtype=torch.float64)], 1), y).solution
    torch.testing.assert_close(torch.cat([model.weight, model.bias[:, None]], 1), expected.T, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": "fast"}, TypeError, "lr must be a number, a tensor or 'auto', but is 'fast'"),
        ({"loss": None}, ValueError, r"lr is 'auto', so loss must be a function of \(outputs, targets\), but is None; pass"),
        ({"damping": lambda step: 0.1}, ValueError, "adapts damping by itself: damping must be a number"),
        ({"damping_every": 0}, ValueError, "damping_every must be at least 1"),
        ({"damping_range": 3.0}, TypeError, "damping_range must be a pair of numbers, but is 3.0"),
        ({"damping_range": (1.0, 0.1)}, ValueError, r"damping_range\[1\] must be"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay must be"),
    ],
)
def test_bad_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _auto(mlp(), **options)


def test_bad_closures() -> None:
    model, (x, y) = mlp(), _data()
    optimizer = _auto(model)
    with pytest.raises(TypeError, match=r"needs a closure .*: optimizer.step\(lambda: \(model\(inputs\), targets\)\)"):
        optimizer.step()
    with pytest.raises((TypeError, ValueError), match=r"closure must return \(outputs, targets\)"):
        optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    with pytest.raises((TypeError, ValueError), match=r"outputs"):
        optimizer.step(lambda: ({"logits": model(x)}, y))
    optimizer.close()
    with pytest.raises(RuntimeError, match="is closed"):
        optimizer.step(lambda: (model(x), y))
