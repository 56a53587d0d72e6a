"""What goes wrong around KFACAdam: checkpoints of other runs, bases that products refuse, and steps that fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.runs import backward, net, train, vector
from torch import Tensor, nn

from kfac_triton import KFAC, KFACAdam
from kfac_triton.kernels import ops


def _refuse(
    factors: list[Tensor], bases: list[Tensor], residuals: list[Tensor], refused: list[Tensor], *_: Any, **__: Any
) -> None:
    for flags in refused:
        flags.fill_(True)


def _off_diagonal(optimizer: KFACAdam) -> float:
    """The largest share of Q^T A Q that is not on its diagonal, of any factor."""
    shares = []
    for stack, basis in zip(optimizer.engine.bank.stacks, optimizer.engine.curvature.inverses, strict=False):
        rotated = basis.values.mT @ stack.factors @ basis.values
        off = rotated - torch.diag_embed(rotated.diagonal(dim1=-2, dim2=-1))
        shares.append(float((off.flatten(1).norm(dim=1) / rotated.flatten(1).norm(dim=1)).max()))
    return max(shares)


def _bases(optimizer: KFACAdam) -> list[Tensor]:
    return [inverse.values.clone() for inverse in optimizer.engine.curvature.inverses]


@pytest.mark.parametrize("options", [{"refresh_every": 1}, {"refresh_warmup": 1000}], ids=["every step", "warm-up"])
def test_bases_that_products_refuse_in_every_step_follow_their_factors(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where each step refreshes, none is left to rescue in."""
    shares = {}
    for refresh in ("qr", "products"):
        model = net(torch.float64)
        optimizer = KFACAdam(model, lr=0.02, refresh=refresh, **options)
        train(model, optimizer, range(1))
        monkeypatch.setattr(ops, "orthogonal_iteration", _refuse)
        train(model, optimizer, range(1, 30))
        shares[refresh] = _off_diagonal(optimizer)
    assert shares["products"] < 1.5 * shares["qr"] + 1e-3


def test_a_rescue_in_a_step_that_fails_comes_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    for fails in (False, True):
        model = net(torch.float64)
        optimizer = KFACAdam(model, lr=0.02, refresh="products", refresh_every=5, refresh_warmup=0)
        train(model, optimizer, range(5))
        with monkeypatch.context() as patch:
            patch.setattr(ops, "orthogonal_iteration", _refuse)
            train(model, optimizer, range(5, 6))
        before = _bases(optimizer)
        if fails:
            backward(model, 6)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(optimizer.engine, "commit", _interrupt)
                optimizer.step()
            assert all(map(torch.equal, before, _bases(optimizer)))
        train(model, optimizer, range(6, 8))
        assert not any(map(torch.equal, before, _bases(optimizer)))
        moved.append(vector(model))
    assert torch.equal(*moved)


def _interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("used", [0, 4])
@pytest.mark.parametrize("include_inverses", [True, False])
def test_a_checkpoint_of_a_run_before_its_first_step(used: int, include_inverses: bool) -> None:
    model, other = net(), net()
    optimizer, loaded = KFACAdam(model, refresh_every=3), KFACAdam(other, refresh_every=3)
    train(other, loaded, range(20, 20 + used))
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict(include_inverses=include_inverses))
    for m, o in ((model, optimizer), (other, loaded)):
        train(m, o, range(5))
    assert torch.equal(vector(model), vector(other))


def test_a_checkpoint_of_kfac_is_refused_unless_its_tail_is_adamw() -> None:
    """The rule of a group is part of a checkpoint. Averages in other coordinates are left out."""
    for tail, steps in (("sgd", 0), ("sgd", 2), ("adamw", 0), ("adamw", 2)):
        source = net()
        saved = KFAC(source, tail=tail, lr=0.01)
        train(source, saved, range(steps))
        model = net()
        optimizer = KFACAdam(model)
        train(model, optimizer, range(10, 12))
        before = vector(model)
        if tail == "sgd":
            with pytest.raises(ValueError, match="tail of every group must be 'adamw', but is"):
                optimizer.load_state_dict(saved.state_dict())
            assert optimizer.param_groups[0]["tail"] == "adamw"
            assert optimizer.engine.progress.steps == 2
        else:
            optimizer.load_state_dict(saved.state_dict())
            assert optimizer.engine.progress.steps == steps
            assert _counts(optimizer) == {0.0}
        train(model, optimizer, range(steps, steps + 1))
        assert bool(vector(model).isfinite().all())
        assert not torch.equal(vector(model), before)


@pytest.mark.parametrize("bias", ["separate", "joint"])
def test_tiles_of_two_diagonals_take_the_same_averages_from_kernels(bias: str) -> None:
    """Nothing is rotated there: averages must not take the buffer that updates are scattered into for the gradient."""
    averages = {}
    for backend in ("torch", "triton"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
        optimizer = KFACAdam(model, lr=0.02, max_factor_size=8, refresh="products", backend=backend, bias=bias)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(12, 20)).square().mean().backward()
            optimizer.step()
        adam = optimizer.engine.curvature.adam
        assert adam is not None
        averages[backend] = [*adam.means, *adam.squares, vector(model)]
    for kernels, plain in zip(averages["triton"], averages["torch"], strict=True):
        torch.testing.assert_close(kernels, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


def _counts(optimizer: KFACAdam) -> set[float]:
    adam = optimizer.engine.curvature.adam
    assert adam is not None
    return set(adam.steps.tolist())
