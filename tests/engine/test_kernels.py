"""The engine on the Triton kernels: the same training as on the torch backend, whatever way statistics take."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from support.helpers import TokenModel, conv_net, mlp, relative_error
from torch import Tensor, nn

from kfac_triton import KFAC, KFACPreconditioner
from kfac_triton.curvature import factor_update

# Both backends compute in float32: they differ by the order of sums, which the condition of a damped factor magnifies.
FACTORS, GRADIENTS = 1e-5, 1e-3
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(torch.float32), (12, 5)),
    "conv": (lambda: conv_net(torch.float32), (6, 2, 9, 9)),
    "tokens": (lambda: TokenModel(), (6, 3, 5)),
    "channel groups": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4)),
        (6, 4, 5, 5),
    ),
}


def _train(case: str, backend: str, passes: int = 1, **settings: object) -> tuple[KFACPreconditioner, list[Tensor]]:
    torch.manual_seed(0)
    make_model, shape = CASES[case]
    model = make_model()
    ours = KFACPreconditioner(model, damping=0.1, backend=backend, **settings)
    for _ in range(3):
        model.zero_grad()
        for _ in range(passes):
            x = torch.randn(shape)
            # a leaf that requires gradients is nobody's batch: its layer may wait, too
            nn.functional.cross_entropy(model(x.requires_grad_()), torch.randint(4, shape[:1])).backward()
        ours.precondition_()
    return ours, [p.grad for p in model.parameters() if p.grad is not None]


OTHER_WAYS = [pytest.param(*way, marks=pytest.mark.slow) for way in (("expand", 3), ("reduce", 1))]


@pytest.mark.parametrize(("weight_sharing", "passes"), [("expand", 1), ("reduce", 3), *OTHER_WAYS])
@pytest.mark.parametrize("case", CASES)
def test_both_backends_train_alike(case: str, weight_sharing: str, passes: int) -> None:
    (kernels, gradients), (torch_backend, expected) = (
        _train(case, backend, passes, weight_sharing=weight_sharing) for backend in ("triton", "torch")
    )
    truth = torch_backend.factors()
    for name, pair in kernels.factors().items():
        for ours, theirs in zip(pair, truth[name], strict=True):
            assert relative_error(ours, theirs) <= FACTORS
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) <= GRADIENTS


@pytest.mark.parametrize("inverse", ["newton_schulz", "factored", "cholesky", "eigh"])
def test_every_inverse_method_serves(inverse: str) -> None:
    (kernels, gradients), (_, expected) = (
        _train("mlp", b, inverse=inverse, inverse_tolerance=1e-3) for b in ("triton", "torch")
    )
    layers = kernels.diagnostics()["layers"].values()
    assert all(layer[f"residual_{side}"] <= 0.3 for layer in layers for side in "AG")
    for ours, theirs in zip(gradients, expected, strict=True):
        assert relative_error(ours, theirs) <= 1e-2


def test_small_passes_wait_and_large_ones_are_summed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    ours = KFACPreconditioner(model, backend="triton")
    for rows, waits in ((4, True), (4000, False)):
        model(torch.randn(rows, 8)).sum().backward()
        first, second = ours.engine.statistics
        assert not first.deferred  # its batch is the user's, who may overwrite it before the step
        assert first.on_host.passes == 1
        assert bool(second.deferred) == waits
        assert second.on_host.passes == (not waits)
        ours.precondition_()


class Branches(nn.Module):
    """A network that uses some of its layers in a step."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4 + i % 2) for i in range(4))

    def forward(self, x: Tensor, chosen: tuple[int, ...]) -> Tensor:
        return sum((self.branches[i](x).sum(1) for i in chosen), torch.zeros(len(x)))


def test_other_layers_may_wait_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """More sets of them than are remembered, some twice."""
    monkeypatch.setattr(factor_update, "_KEPT", 2)
    results = []
    subsets = [subset for size in (1, 2, 3, 4) for subset in itertools.combinations(range(4), size)]
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = Branches()
        ours = KFACPreconditioner(model, backend=backend, inverse="cholesky")
        for chosen in [*subsets, *reversed(subsets)]:
            model.zero_grad()
            model(torch.randn(3, 4).requires_grad_(), chosen).square().mean().backward()
            if backend == "triton":
                assert [bool(s.deferred) for s in ours.engine.statistics] == [i in chosen for i in range(4)]
                assert len(ours.engine.collector._arranged) <= 2
            ours.precondition_()
        results.append(ours.factors())
    for name, pair in results[0].items():
        for ours_, theirs in zip(pair, results[1][name], strict=True):
            assert relative_error(ours_, theirs) <= FACTORS


def test_a_batch_that_is_overwritten_before_the_step_has_counted() -> None:
    model = nn.Linear(3, 2)
    ours = KFACPreconditioner(model, backend="triton")
    batch = torch.randn(4, 3)
    expected = torch.cat([batch, torch.ones(4, 1)], 1)
    model(batch).sum().backward()
    batch.zero_()
    ours.precondition_()
    torch.testing.assert_close(ours.factors()[""][0], expected.T @ expected / 4)


def test_passes_that_wait_and_summed_ones_add_up() -> None:
    """In one step, of one layer: a small micro-batch and a large one."""
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        ours = KFACPreconditioner(model, backend=backend)
        for _ in range(2):
            for rows in (3, 500):
                model(torch.randn(rows, 4).requires_grad_()).square().mean().backward()
                if backend == "triton":  # what had waited is summed with the other
                    assert all(
                        bool(s.deferred) == (rows == 3) and s.on_host.passes == (rows == 500) for s in ours.engine.statistics
                    )
            ours.precondition_()
        results.append(ours.factors())
    for name, pair in results[0].items():
        for ours_, theirs in zip(pair, results[1][name], strict=True):
            assert relative_error(ours_, theirs) <= FACTORS


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
@pytest.mark.parametrize("rows", [3, 300])
def test_a_bad_number_drops_that_layers_statistics_only(bad: float, rows: int) -> None:
    """Whether they wait (3 rows) or are summed (300)."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    ours = KFACPreconditioner(model, backend="triton")
    for poison in (False, True, False):
        handle = (
            model[0].register_forward_hook(lambda m, args, out: out.index_fill(0, torch.tensor([1]), bad)) if poison else None
        )
        before = ours.factors()
        model.zero_grad()
        (model(torch.randn(rows, 6).requires_grad_()) * 1e-3).square().sum().backward()
        ours.precondition_()
        if handle is not None:
            handle.remove()
            assert all(torch.equal(a, b) for a, b in zip(ours.factors()["1"], before["1"], strict=True))
    layers = ours.diagnostics()["layers"]
    assert layers["1"]["dropped_statistics"] == 1
    assert layers["1"]["updates"] == 2
    assert all(side.isfinite().all() for pair in ours.factors().values() for side in pair)


@pytest.mark.parametrize("inverse", ["newton_schulz", "factored"])
def test_a_layer_that_comes_late_has_an_inverse_at_once(inverse: str) -> None:
    """A mixture of experts: until then its certified inverse was that of nothing but damping."""
    updates = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        experts = nn.ModuleList([nn.Linear(6, 5), nn.Linear(6, 5)])
        ours = KFACPreconditioner(experts, damping=1e-4, kl_clip=None, inverse=inverse, backend=backend)
        for number in (0, 0, 1):
            experts.zero_grad()
            (100 * experts[number](100 * torch.randn(40, 6))).square().mean().backward()
            ours.precondition_()
        assert experts[1].weight.grad is not None
        updates.append(experts[1].weight.grad)
        assert all((i.residual <= 0.3).all() for i in ours.engine.curvature.inverses)
    assert relative_error(*updates) <= 0.3  # a bound on the error of an inverse; that of nothing is off by a factor of 1e6


def test_a_model_that_no_kernel_can_serve_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend is 'triton', but layer '0' has torch.float64 factors.*use backend='auto'"):
        KFAC(mlp(torch.float64), backend="triton")


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, but is 'cuda'"):
        KFAC(mlp(torch.float32), backend="cuda")
