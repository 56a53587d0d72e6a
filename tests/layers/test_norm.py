"""Norms: the Fisher matrix of scale and shift against gradients of single loss terms, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.adapters import (
    DAMPING,
    Losses,
    assert_an_idle_expert_stays,
    assert_checkpoint_keeps_the_run,
    assert_close,
    gradients_of_terms,
    preconditioned,
)
from torch import Tensor, nn

from kfac_triton import KFACPreconditioner
from kfac_triton.layers import Layer, find_layers

N, CLASSES = 6, 3

# Module and shape of its input. Epsilons are large: a test must see whether they are where they belong.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(5, eps=0.2), (N, 5)),
    "layer, tokens": (lambda: nn.LayerNorm(5, eps=0.2), (N, 4, 5)),
    "layer, images": (lambda: nn.LayerNorm((3, 5), eps=0.2), (N, 2, 4, 3, 5)),
    "layer without bias": (lambda: nn.LayerNorm(5, bias=False), (N, 4, 5)),
    "rms": (lambda: nn.RMSNorm(5, eps=0.2), (N, 4, 5)),
    "rms, default eps": (lambda: nn.RMSNorm((2, 5)), (N, 2, 5)),
    "batch": (lambda: nn.BatchNorm1d(5, eps=0.2), (N, 5)),
    "batch, sequence": (lambda: nn.BatchNorm1d(5, eps=0.2), (N, 5, 4)),
    "batch, 2d": (lambda: nn.BatchNorm2d(5, eps=0.2), (N, 5, 3, 2)),
    "batch, 3d": (lambda: nn.BatchNorm3d(5, eps=0.2), (N, 5, 3, 1, 2)),
    "batch, no running statistics": (lambda: nn.BatchNorm2d(5, eps=0.2, track_running_stats=False).eval(), (N, 5, 3, 2)),
    "batch, evaluation": (lambda: nn.BatchNorm2d(5, eps=0.2).eval(), (N, 5, 3, 2)),
    "group": (lambda: nn.GroupNorm(2, 6, eps=0.2), (N, 6)),
    "group, images": (lambda: nn.GroupNorm(3, 6, eps=0.2), (N, 6, 3, 2)),
}


def trained(norm: nn.Module) -> nn.Module:
    """Scale and shift, and running statistics, away from where they start; one scale is zero."""
    for p in norm.parameters():
        torch.nn.init.normal_(p)
    norm.weight.data.flatten()[1] = 0.0
    for name, buffer in norm.named_buffers():
        if name.startswith("running"):
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return norm.double()


def net(case: str) -> tuple[nn.Sequential, Losses]:
    """The norm between other layers, none of which mixes examples."""
    make, shape = CASES[case]
    norm = trained(make())
    model = nn.Sequential(
        nn.Tanh(), norm, nn.Sigmoid(), nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), CLASSES).double()
    )
    x, y = 3 * torch.randn(shape, dtype=torch.float64) + 1, torch.randint(CLASSES, (N,))
    return model, lambda model: F.cross_entropy(model(x), y, reduction="none")


def column(norm: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in norm.parameters() if p.grad is not None])


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("curvature", [{}, {"exact_damping": True}, {"curvature": "ekfac"}], ids=["kfac", "exact", "ekfac"])
@pytest.mark.parametrize("norms", ["full", "diagonal"])
@pytest.mark.parametrize("case", CASES)
def test_the_fisher_matrix_is_that_of_single_gradients(
    case: str, norms: str, curvature: dict[str, Any], weight_sharing: str
) -> None:
    model, losses = net(case)
    gradients = gradients_of_terms(model, losses, list(model[1].parameters()))
    fisher = gradients.T @ gradients / N
    preconditioner, _ = preconditioned(model, losses, norms=norms, weight_sharing=weight_sharing, **curvature)
    a, g = preconditioner.factors()["1"]
    assert torch.equal(a, torch.ones(1, dtype=torch.float64))
    fisher = fisher if norms == "full" else fisher.diagonal()
    assert_close(g, fisher)
    damped = (fisher if norms == "full" else torch.diag(fisher)) + DAMPING * torch.eye(len(fisher), dtype=torch.float64)
    assert_close(column(model[1]), torch.linalg.solve(damped, gradients.mean(0)), 1e-10)


@pytest.mark.parametrize("oversize", ["diagonal", "block"])
def test_a_wide_norm(oversize: str) -> None:
    model, losses = net("layer, tokens")
    gradients = gradients_of_terms(model, losses, list(model[1].parameters()))
    fisher = gradients.T @ gradients / N
    preconditioner, _ = preconditioned(model, losses, norms="full", max_factor_size=5, oversize=oversize, include="LayerNorm")
    kept = fisher.diagonal() if oversize == "diagonal" else torch.block_diag(fisher[:5, :5], fisher[5:, 5:])
    assert_close(preconditioner.factors()["1"][1], kept)
    damped = (torch.diag(kept) if oversize == "diagonal" else kept) + DAMPING * torch.eye(10, dtype=torch.float64)
    assert_close(column(model[1]), torch.linalg.solve(damped, gradients.mean(0)), 1e-10)


TOKEN_NETS: dict[str, Callable[[], nn.Sequential]] = {
    "layer": lambda: nn.Sequential(trained(nn.LayerNorm(5)), nn.Tanh(), nn.Linear(5, CLASSES).double()),
    "rms": lambda: nn.Sequential(trained(nn.RMSNorm(5)), nn.Tanh(), nn.Linear(5, CLASSES).double()),
    "batch": lambda: nn.Sequential(trained(nn.BatchNorm2d(5)), nn.Tanh(), nn.Conv2d(5, CLASSES, 1).double()),
    "group": lambda: nn.Sequential(trained(nn.GroupNorm(1, 5)), nn.Tanh(), nn.Conv2d(5, CLASSES, 1).double()),
}


@pytest.mark.parametrize("weight_sharing", ["expand", "reduce"])
@pytest.mark.parametrize("case", TOKEN_NETS)
def test_loss_terms_that_are_positions(case: str, weight_sharing: str) -> None:
    """Expand: the gradients of single positions, exactly. Reduce: those of an example's positions are summed."""
    model = TOKEN_NETS[case]()
    last = case in ("layer", "rms")
    x = torch.randn((N, 2, 3, 5) if last else (N, 5, 2, 3), dtype=torch.float64)
    y = torch.randint(CLASSES, (N, 2, 3))

    def losses(model: nn.Module) -> Tensor:
        out = model(x)
        return F.cross_entropy(out.movedim(-1, 1) if last else out, y, reduction="none")

    gradients = gradients_of_terms(model, losses, list(model[0].parameters()))
    assert len(gradients) == N * 6
    if weight_sharing == "reduce":
        summed = gradients.view(N, 6, -1).sum(1)
        fisher = summed.T @ summed / len(gradients)
    else:
        fisher = gradients.T @ gradients / len(gradients)
    preconditioner, _ = preconditioned(model, losses, norms="full", loss_terms="tokens", weight_sharing=weight_sharing)
    a, g = preconditioner.factors()["0"]
    assert_close(a, torch.ones(1, dtype=torch.float64))
    assert_close(g, fisher)


def layer_of(norm: nn.Module, loss_terms: str = "examples") -> Layer:
    (layer,), _ = find_layers(norm, loss_terms=loss_terms)
    return layer


@pytest.mark.parametrize(
    ("case", "loss_terms", "input_count", "terms"),
    [
        ("layer", "examples", N, N),
        ("layer, images", "examples", N, N),
        ("layer, images", "tokens", N * 8, N * 8),
        ("batch, 2d", "examples", N, N),
        ("batch, 2d", "tokens", N * 6, N * 6),
        ("group", "tokens", N, N),
    ],
)
def test_counts(case: str, loss_terms: str, input_count: int, terms: int) -> None:
    make, shape = CASES[case]
    rows = layer_of(make(), loss_terms).rows(torch.randn(shape), torch.randn(shape)).made()
    assert (rows.input_count, rows.terms, rows.examples, len(rows.gradients[0])) == (input_count, terms, N, input_count)


@pytest.mark.parametrize("module", [nn.LayerNorm((2, 3)), nn.RMSNorm((2, 3))], ids=["layer", "rms"])
def test_one_example_without_a_batch_dimension(module: nn.Module) -> None:
    x, gradient = torch.randn(2, 3), torch.randn(2, 3)
    alone, batch = (layer_of(module).rows(*pair).made() for pair in ((x, gradient), (x[None], gradient[None])))
    assert (alone.examples, alone.input_count, alone.terms) == (1, 1, 1)
    assert torch.equal(alone.gradients[0], batch.gradients[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_rows_of_16_bit_tensors_are_made_in_single_precision(case: str, dtype: torch.dtype) -> None:
    make, shape = CASES[case]
    norm = make()
    x, gradient = (10 + torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    rows = layer_of(norm.to(dtype)).rows(x, gradient).made().gradients[0]
    exact = layer_of(norm.double()).rows(x.double(), gradient.double()).made().gradients[0]
    assert rows.dtype == torch.float32
    assert_close(rows.double(), exact, 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_training_in_bfloat16(case: str) -> None:
    make, shape = CASES[case]
    model = nn.Sequential(make().train(), nn.Flatten(), nn.Linear(torch.Size(shape[1:]).numel(), CLASSES)).to(torch.bfloat16)
    x = torch.randn(shape, dtype=torch.bfloat16)
    preconditioner, before = preconditioned(model, lambda model: model(x).square().mean(1), norms="full")
    assert preconditioner.factors()["0"][1].dtype == torch.float32
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.grad is not None
        assert torch.isfinite(p.grad).all()
        assert not torch.equal(p.grad, old)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
def test_an_empty_batch_has_no_rows(case: str, loss_terms: str) -> None:
    make, shape = CASES[case]
    layer = layer_of(make(), loss_terms)
    rows = layer.rows(torch.randn(0, *shape[1:]), torch.randn(0, *shape[1:])).made()
    assert (rows.input_count, rows.terms) == (0, 0)
    assert rows.gradients[0].shape == (0, layer.output_size)


@pytest.mark.parametrize("norms", ["full", "diagonal"])
@pytest.mark.parametrize("case", ["layer, tokens", "rms", "batch, 2d", "group, images"])
def test_an_expert_without_tokens(case: str, norms: str) -> None:
    make, shape = CASES[case]
    assert_an_idle_expert_stays(make(), make(), torch.randn(shape), norms=norms)


@pytest.mark.parametrize("norms", ["full", "diagonal"])
@pytest.mark.parametrize("case", ["layer, tokens", "rms", "batch, 2d", "group, images"])
def test_checkpoints(case: str, norms: str) -> None:
    losses = net(case)[1]
    assert_checkpoint_keeps_the_run(lambda: net(case)[0], losses, norms=norms)


# Which parameters


def test_skip_leaves_norms_alone() -> None:
    model, losses = net("layer")
    preconditioner, before = preconditioned(model, losses, norms="skip")
    assert list(preconditioner.factors()) == ["4"]
    assert torch.equal(column(model[1]), torch.cat([g.flatten() for g in before[:2]]))


@pytest.mark.parametrize("frozen_by", ["argument", "flag"])
def test_a_scale_without_a_trained_shift(frozen_by: str) -> None:
    norm = nn.LayerNorm(5, bias=frozen_by == "flag").double()
    if frozen_by == "flag":
        norm.bias.requires_grad_(False)
    model = nn.Sequential(norm, nn.Linear(5, 3).double())
    x = torch.randn(N, 5, dtype=torch.float64)

    def losses(model: nn.Module) -> Tensor:
        return model(x).square().sum(1)

    gradients = gradients_of_terms(model, losses, [norm.weight])
    preconditioner, _ = preconditioned(model, losses, norms="full")
    assert_close(preconditioner.factors()["0"][1], gradients.T @ gradients / N)
    assert frozen_by == "argument" or norm.bias.grad is None


def test_a_shift_that_is_frozen_later_is_left_alone() -> None:
    model, losses = net("layer")
    preconditioner, _ = preconditioned(model, losses, norms="full")
    model[1].bias.requires_grad_(False)
    model.zero_grad()
    losses(model).mean().backward()
    gradient = model[1].weight.grad.clone()
    preconditioner.precondition_()
    assert model[1].bias.grad is None
    damped = preconditioner.factors()["1"][1] + DAMPING * torch.eye(10, dtype=torch.float64)
    padded = torch.cat([gradient, torch.zeros(5, dtype=torch.float64)])
    assert_close(model[1].weight.grad, torch.linalg.solve(damped, padded)[:5], 1e-10)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.LayerNorm(4, elementwise_affine=False), "no scale"),
        (nn.RMSNorm(4, elementwise_affine=False), "no scale"),
        (nn.BatchNorm1d(4, affine=False), "no scale"),
        (nn.GroupNorm(2, 4, affine=False), "no scale"),
        (nn.LayerNorm(4).requires_grad_(False), "frozen"),
    ],
    ids=str,
)
def test_norms_without_a_trained_scale_are_left_out(norm: nn.Module, reason: str) -> None:
    if reason == "frozen":
        norm.bias.requires_grad_(True)  # alone it is not covered
    model = nn.Sequential(norm, nn.Linear(4, 2))
    layers, skipped = find_layers(model)
    assert [layer.name for layer in layers] == ["1"]
    assert reason in skipped["0"]
    preconditioned(model, lambda model: model(torch.randn(5, 4)).square())


def test_norms_that_share_a_scale_and_others_of_their_family_are_left_out() -> None:
    first, second = nn.LayerNorm(4), nn.LayerNorm(4)
    second.weight = first.weight
    layers, skipped = find_layers(nn.Sequential(first, second, nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, affine=True)))
    assert layers == []
    assert set(skipped) == {"0", "1"}
    with pytest.raises(ValueError, match="lazy"):
        find_layers(nn.LazyBatchNorm2d())


@pytest.mark.parametrize("case", CASES)
def test_reading_what_was_written_gives_the_gradients(case: str) -> None:
    make, shape = CASES[case]
    norm = make()
    norm(torch.randn(shape)).square().sum().backward()
    layer = layer_of(norm)
    weight, bias = layer.gradient(0)
    assert weight is not None
    assert bias is None
    assert weight.shape == (layer.output_size, layer.input_size)
    updates = dict(layer.read_update([F.pad(weight, (0, 3, 0, 4))]))
    assert list(updates) == list(norm.parameters())
    assert all(torch.equal(update, p.grad) for p, update in updates.items())


# Ways to run it


def test_two_parts_of_a_batch_are_the_batch() -> None:
    results = []
    x = torch.randn(N, 4, 5, dtype=torch.float64)
    torch.manual_seed(1)
    model = nn.Sequential(trained(nn.LayerNorm(5)), nn.Linear(5, 3).double())
    for parts in (1, 2):
        with KFACPreconditioner(model, damping=DAMPING, norms="full") as preconditioner:
            model.zero_grad()
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            preconditioner.precondition_()
            results.append(preconditioner.factors()["0"][1])
    assert_close(results[1], results[0])


@pytest.mark.parametrize("loss_terms", ["examples", "tokens"])
def test_compiled_training_is_eager_training(loss_terms: str) -> None:
    x = torch.randn(N, 6, 4, dtype=torch.float64)
    factors = []
    for compiled in (False, True):
        torch.manual_seed(2)
        torch.compiler.reset()
        model = nn.Sequential(nn.LayerNorm(4), nn.BatchNorm1d(6), nn.GroupNorm(2, 6), nn.RMSNorm(4), nn.Linear(4, 2)).double()
        preconditioner = KFACPreconditioner(model, damping=DAMPING, loss_terms=loss_terms, norms="full")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        run(x).square().mean().backward()
        preconditioner.precondition_()
        factors.append(preconditioner.factors())
    torch.compiler.reset()
    for name, pair in factors[0].items():
        for eager, other in zip(pair, factors[1][name], strict=True):
            assert_close(other, eager)
