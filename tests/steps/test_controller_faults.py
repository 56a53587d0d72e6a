"""The controller: rejections that leave no trace, batches that are not finite, checkpoints, what is refused."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support.controllers import Run, bn_net, flat, regression, snapshot, spoiling, unchanged
from support.helpers import batch_for_mlp, mlp
from torch import Tensor, nn

from kfac_triton.steps.controller import PREVIOUS, REJECTION_FACTOR


@pytest.mark.parametrize("value", [1e3, math.nan, math.inf])
def test_a_rejected_step_leaves_no_trace(value: float) -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), covered=2, damping=0.1)
    run.step()
    assert run.step()["momentum"] != 0
    before = snapshot(run.model)
    report = run.step(spoiling(run, value))
    assert report["rejected"]
    assert unchanged(run.model, before)
    assert report["damping"] == 0.1 * REJECTION_FACTOR
    assert run.controller.rejected == 1
    after = run.step()
    assert not after["rejected"]
    assert after["momentum"] == 0
    assert run.step()["momentum"] != 0


def test_a_closure_that_raises_at_the_new_point_leaves_no_trace() -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss())
    before = snapshot(run.model)
    evaluate = spoiling(run)

    def broken() -> tuple[Tensor, Tensor]:
        outputs, targets = evaluate()
        if float(outputs.detach().abs().max()) > 100:
            raise KeyError("no memory")
        return outputs, targets

    with pytest.raises(KeyError, match="no memory"):
        run.step(broken)
    assert unchanged(run.model, before)


def test_a_rise_within_rounding_is_no_reason_to_reject() -> None:
    run = Run(*regression(), damping=1e-12, damping_floor=1e-12)
    for _ in range(40):  # conjugate gradients are at the minimum after ten
        report = run.step()
        assert not report["rejected"]
    assert math.isnan(report["reduction_ratio"])


def test_statistics_and_random_numbers_advance_once_a_step() -> None:
    run, plain = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), damping=0.1), bn_net()
    torch.manual_seed(3)
    plain(batch_for_mlp()[0])
    torch.rand(5)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    masks: list[Tensor] = []
    run.before_backward = lambda: torch.rand(5)  # draws, as for labels
    run.model[3].register_forward_hook(lambda module, args, output: masks.append(output.detach() == 0))
    assert not run.step()["rejected"]
    assert torch.equal(torch.get_rng_state(), state)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(run.model.state_dict()[f"1.{key}"], plain.state_dict()[f"1.{key}"])
    assert len(masks) == 3
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert masks[0].any()


def test_hooks_are_paused_except_in_the_first_pass() -> None:
    run = Run(*regression())
    inside, depth, losses = list[bool](), [0], list[int]()

    @contextmanager
    def paused() -> Any:
        depth[0] += 1
        yield
        depth[0] -= 1

    run.model.register_forward_hook(lambda *_: inside.append(depth[0] > 0))
    run.loss.register_forward_hook(lambda *_: losses.append(0))
    run.engine.paused = paused
    run.step()
    assert len(losses) == 3  # old, new, and the derivative that is checked in the first step
    run.step()
    assert len(losses) == 5
    assert inside == [False, True, True, False, True, True, True]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(where: str) -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), damping=0.1)
    run.step()
    before, state = snapshot(run.model), run.auto.export()
    asked = len(run.dampings)
    if where == "loss":
        run.batch = (run.batch[0] * math.nan, run.batch[1])
    else:
        for p in run.parameters:
            p.register_hook(lambda g: torch.full_like(g, math.inf))
    report = run.step()
    assert report["skipped"]
    assert not report["rejected"]
    assert unchanged(run.model, before)
    assert run.controller.skipped == 1
    run.controller.skipped = 0
    for old, new in zip(state, run.auto.export(), strict=True):
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert len(run.dampings) == asked


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_without_terms_changes_nothing(reduction: str) -> None:
    x, y = batch_for_mlp()
    run = Run(mlp(), (x, torch.full_like(y, -100)), nn.CrossEntropyLoss(reduction=reduction))
    before = snapshot(run.model)
    assert run.step()["skipped"]
    assert unchanged(run.model, before)


def test_a_preconditioner_that_is_not_finite_is_a_rejection() -> None:
    run = Run(bn_net(), batch_for_mlp(), nn.CrossEntropyLoss(), damping=0.1)
    run.precondition = lambda h, damping: [g * math.nan for g in h]
    before = snapshot(run.model)
    assert run.step()["rejected"]
    assert unchanged(run.model, before)


def test_a_zero_gradient_moves_nothing() -> None:
    model, (x, _), loss = regression()
    run = Run(model, (x, model(x).detach()), loss)
    before = snapshot(model)
    report = run.step()
    assert unchanged(model, before)
    assert (report["predicted"], report["rejected"], report["lr"]) == (0, False, 0)
    assert math.isnan(report["reduction_ratio"])


def test_a_parameter_without_gradient_stays() -> None:
    model, (x, y) = mlp(), batch_for_mlp()
    run = Run(model, (x, y), nn.CrossEntropyLoss(), weight_decay=0.1)
    run.step()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.detach().clone()
    report = run.step()
    assert torch.equal(model[0].weight, before)
    assert not report["rejected"]
    whole = snapshot(model)
    assert run.step(lambda: (model(x).detach() + torch.zeros((), requires_grad=True), y))["predicted"] == 0
    assert unchanged(model, whole)


def test_a_checkpoint_goes_on_as_if_nothing_had_happened() -> None:
    def make() -> Run:
        torch.manual_seed(0)
        return Run(mlp(), batch_for_mlp(), nn.CrossEntropyLoss(), covered=4, damping=0.1)

    whole, first, second = make(), make(), make()
    for _ in range(7):
        whole.step()
    for _ in range(5):
        first.step()
    second.model.load_state_dict(first.model.state_dict())
    second.auto.restore(first.auto.export())
    for _ in range(2):
        second.step()
    assert torch.equal(flat(second.parameters), flat(whole.parameters))
    assert second.controller.damping == whole.controller.damping == 0.1 * 0.95**5
    first.controller.damping = 3.0
    states = first.auto.export()
    for wrong in ([*states, {}], [{**state, PREVIOUS: torch.ones(1)} for state in states]):
        with pytest.raises(ValueError, match="same model"):
            second.auto.restore(wrong)
    assert second.controller.damping == whole.controller.damping


def test_bad_closures_are_told_what_to_return() -> None:
    run = Run(*regression())
    x, y = run.batch
    with pytest.raises(TypeError, match=r"closure must return \(outputs, targets\)"):
        run.step(lambda: run.model(x))
    with pytest.raises(ValueError, match="without a graph"):
        run.step(lambda: (run.model(x).detach(), y))
    batches = iter(torch.randn(9, 20, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="same batch each time"):
        run.step(lambda: (run.model(next(batches)), y))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"damping": 0.0}, ValueError, "damping must be finite and greater than 0"),
        ({"damping_every": 0}, ValueError, "damping_every must be at least 1"),
        ({"damping_floor": 0.0}, ValueError, r"damping_range\[0\]"),
        ({"damping_floor": 1.0, "damping_ceiling": 0.5}, ValueError, r"damping_range\[1\]"),
        ({"damping": "high"}, TypeError, "damping must be a real number"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Run(*regression(), **options)


def test_training_with_float32_reaches_a_low_loss() -> None:
    run = Run(mlp(torch.float32), batch_for_mlp(), nn.CrossEntropyLoss())
    run.batch = (run.batch[0].float(), run.batch[1])
    reports = [run.step() for _ in range(150)]
    assert float(reports[-1]["loss"]) < 0.05 * float(reports[0]["loss"])
    assert sum(r["rejected"] for r in reports) < 15
